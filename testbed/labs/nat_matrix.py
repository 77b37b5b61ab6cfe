"""Two members, each behind every kind of NAT in turn, and others on public addresses.

A cell is one pair: the kind of the one that dials, and of the one that is dialled. The routers stay
and change their rules, members are new for each cell. Every cable takes `ONE_WAY_MS`, so a round
trip between any two machines takes four times that. What connects, how, and after how long is
measured at the member that dials; nothing here helps it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count

from benchmarks.rows import Row

from covey.transport.membership import Swarm
from testbed.artefacts import Artefacts, Cell
from testbed.lab import Lab
from testbed.links import both_ways
from testbed.members import Event, Member, found_swarm
from testbed.nat import Nat, NatKind
from testbed.topology import Host, Router, Topology

ONE_WAY_MS = 15.0
LINK_S = 20.0  # for the first byte
BETTER_S = 10.0  # for a path of its own, after that
FIRST_BYTE_S, DIRECT_S = 1.0, 2.0  # the targets
OWN_PATHS = frozenset({"direct", "mapped", "punched", "webrtc"})
RELAYS = ("relay", "relay-2")
SIDES = ("left", "right")
_PORTS = count(20_000)  # no two members share one, so no old mapping serves a new member


@dataclass(frozen=True, slots=True)
class Pair:
    """The kinds of the one that dials and of the one that is dialled."""

    dialler: NatKind
    dialled: NatKind

    def __str__(self) -> str:
        """As it stands in tables."""
        return f"{self.dialler} x {self.dialled}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a pair; seconds count from the moment one was told to dial the other."""

    first_kind: str | None = None  # None: they did not connect
    first_byte_s: float | None = None
    last_kind: str | None = None
    own_path_s: float | None = None  # None: relayed to the end
    why: str = ""

    @property
    def is_direct(self) -> bool:
        """Whether it ended on a path of its own."""
        return self.last_kind in OWN_PATHS

    def __str__(self) -> str:
        """As it stands in tables: kinds, and the seconds to each."""
        if self.first_kind is None:
            return f"no: {self.why}"
        text = f"{self.first_kind} {self.first_byte_s:.2f}"
        if self.last_kind != self.first_kind:
            text += f", {self.last_kind} {self.own_path_s or 0:.2f}"
        return text


def measure(
    pairs: Sequence[Pair], *, cone_for_tcp: bool, n_relays: int, has_captures: bool
) -> list[Row]:
    """Connect every pair.

    Args:
        pairs: which.
        n_relays: members on public addresses, up to two.
        cone_for_tcp: whether cones are cones for TCP too.
        has_captures: record packets, and keep those of cells that do not connect.
    """
    outcomes: dict[Pair, Outcome] = {}
    with Artefacts("nat") as artefacts, Lab(_topology()) as lab, ExitStack() as stack:
        _prove(lab, cone_for_tcp=cone_for_tcp)
        swarm = found_swarm()
        relays = []
        for host in RELAYS[:n_relays]:
            log = artefacts.root / f"{host}.log"
            relay = Member(lab, host, swarm, port=next(_PORTS), log=log)
            stack.callback(relay.close)
            relay.wait_until_ready()
            relays.append(relay)
        for pair in pairs:
            _set_nats(lab, pair, cone_for_tcp=cone_for_tcp)
            with artefacts.cell(str(pair)) as cell:
                if has_captures:
                    cell.capture(lab, [*SIDES, *(f"o-{side}" for side in SIDES), *RELAYS])
                with _members(lab, pair, relays, swarm, cell) as (left, right):
                    outcomes[pair] = _connect(left, right)
                cell.has_failed = outcomes[pair].first_kind is None
            print(f"{pair!s:40} {outcomes[pair]}", flush=True)
    return rows(outcomes, cone_for_tcp=cone_for_tcp)


def all_pairs() -> list[Pair]:
    """Every kind beside every kind."""
    return [Pair(dialler, dialled) for dialler in NatKind for dialled in NatKind]


def parse_pair(text: str) -> Pair:
    """The pair called "KIND,KIND". Raises ArgumentTypeError if there is no such kind."""
    try:
        dialler, dialled = (NatKind(word.strip()) for word in text.split(","))
    except ValueError as error:
        kinds = ", ".join(NatKind)
        raise argparse.ArgumentTypeError(f"{text!r} is not two of {kinds}") from error
    return Pair(dialler, dialled)


def rows(outcomes: dict[Pair, Outcome], *, cone_for_tcp: bool) -> list[Row]:
    """The figures of a matrix; targets are for a whole one, and grow smaller with a part of it."""
    flavour = "cones for TCP and UDP" if cone_for_tcp else "cones for UDP only"
    n = len(outcomes)
    n_relayed_at_most = 1 if cone_for_tcp else 3
    firsts = [it.first_byte_s for it in outcomes.values() if it.first_byte_s is not None]
    directs = [it.own_path_s for it in outcomes.values() if it.own_path_s is not None]
    found = [
        Row(f"{flavour}: pairs connected, of {n}", len(firsts), n, "at least"),
        Row(
            f"{flavour}: of these on a path of their own",
            sum(it.is_direct for it in outcomes.values()),
            n - n_relayed_at_most,
            "at least",
        ),
    ]
    if firsts:
        found.append(Row(f"{flavour}: slowest first byte, s", max(firsts), FIRST_BYTE_S))
    if directs:
        found.append(Row(f"{flavour}: slowest path of its own, s", max(directs), DIRECT_S))
    for pair, outcome in outcomes.items():
        if outcome.first_byte_s is not None:
            figure = f"{pair}, {outcome.first_kind}: first byte, s"
            found.append(Row(figure, outcome.first_byte_s))
        if outcome.own_path_s is not None:
            found.append(Row(f"{pair}, {outcome.last_kind}: own path, s", outcome.own_path_s))
    return found


def _topology() -> Topology:
    """On each side a router with a host behind it, and an open host; and the relays."""
    link = both_ways(delay_ms=ONE_WAY_MS)
    any_nat = Nat(NatKind.PORT_RESTRICTED)
    return Topology(
        routers=tuple(Router(name=f"r-{side}", nat=any_nat, link=link) for side in SIDES),
        hosts=(
            *(Host(name=side, at=f"r-{side}") for side in SIDES),
            *(Host(name=f"o-{side}", link=link) for side in SIDES),
            *(Host(name=name, link=link) for name in RELAYS),
        ),
    )


def _prove(lab: Lab, *, cone_for_tcp: bool) -> None:
    """Every kind on both sides, before anything is measured."""
    for kind in NatKind:
        if kind is not NatKind.OPEN:
            _set_nats(lab, Pair(kind, kind), cone_for_tcp=cone_for_tcp)
            lab.prove(SIDES)
    lab.prove(f"o-{side}" for side in SIDES)


def _set_nats(lab: Lab, pair: Pair, *, cone_for_tcp: bool) -> None:
    for side, kind in zip(SIDES, (pair.dialler, pair.dialled), strict=True):
        if kind is not NatKind.OPEN:
            lab.set_nat(f"r-{side}", Nat(kind, cone_for_tcp=cone_for_tcp))


@contextmanager
def _members(
    lab: Lab, pair: Pair, relays: Sequence[Member], swarm: Swarm, cell: Cell
) -> Iterator[tuple[Member, Member]]:
    """The two, each linked to the relays, and told what the other announces."""
    with ExitStack() as stack:
        both = []
        for side, kind in zip(SIDES, (pair.dialler, pair.dialled), strict=True):
            host = f"o-{side}" if kind is NatKind.OPEN else side
            member = Member(lab, host, swarm, port=next(_PORTS), log=cell.log(side))
            stack.callback(member.close)
            both.append(member)
        for member in both:
            member.wait_until_ready()
            member.settle(relays)
        for member in both:
            member.wait_until_settled()
        left, right = both
        left.learn(right)
        right.learn(left)
        yield left, right


def _connect(left: Member, right: Member) -> Outcome:
    """Let one dial the other, and wait for the best path there will be."""
    left.dial(right)
    first = left.wait_for(
        lambda it: it["said"] in ("first-byte", "failed") and it["peer"] == right.peer_id, LINK_S
    )
    if first is None or first["said"] == "failed":
        return Outcome(why="no answer at all" if first is None else first["why"])
    kind, first_byte_s = first["kind"], first["s"]
    if kind in OWN_PATHS:
        return Outcome(kind, first_byte_s, kind, first_byte_s)
    better = left.wait_for(lambda it: _is_own_path(it, right), BETTER_S)
    if better is None:
        return Outcome(kind, first_byte_s, kind)
    return Outcome(kind, first_byte_s, better["kind"], better["s"])


def _is_own_path(event: Event, peer: Member) -> bool:
    return event["said"] == "path" and event["peer"] == peer.peer_id and event["kind"] in OWN_PATHS
