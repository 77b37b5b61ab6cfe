"""Real routers: what `attempts` promises for a pair of NAT kinds makes a link, every time."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from testbed.lab import Lab
from testbed.links import Link, both_ways
from testbed.nat import Nat, NatKind
from testbed.observer import PORTS
from testbed.topology import OBSERVERS_V4, Host, Router, Topology

from covey.transport.addresses import format_address
from covey.transport.nat.facts import NatFacts
from covey.transport.nat.facts import NatKind as Known
from covey.transport.punch import AttemptKind, attempts

ROOT = Path(__file__).parents[4]
OBSERVER = format_address(str(OBSERVERS_V4[0]), PORTS[0])
MOST_S = 2.0  # until a direct link stands

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(120)]

_MIRROR = {
    AttemptKind.BIRTHDAY_EASY: AttemptKind.BIRTHDAY_HARD,
    AttemptKind.BIRTHDAY_HARD: AttemptKind.BIRTHDAY_EASY,
}
KINDS = tuple(kind for kind in NatKind if kind is not NatKind.OPEN)
NATS = tuple(
    Nat(kind, cone_for_tcp=cone_for_tcp)
    for kind in KINDS
    for cone_for_tcp in ((True, False) if kind.is_cone else (True,))
)


@dataclass
class Pair:
    """Two hosts, each behind its own router, and the programs on them."""

    lab: Lab
    ends: tuple[subprocess.Popen[str], subprocess.Popen[str]]

    def ask(self, *orders: dict[str, Any]) -> list[dict[str, Any]]:
        """Give each end its order; what each answers."""
        for end, order in zip(self.ends, orders, strict=True):
            assert end.stdin is not None
            end.stdin.write(json.dumps(order) + "\n")
            end.stdin.flush()
        return [self._answer(end) for end in self.ends]

    def observe(self) -> list[str]:
        """Both addresses from outside, of ports that were never used before."""
        return [it["address"] for it in self.ask(*[{"do": "observe", "at": OBSERVER}] * 2)]

    def meet(self, ours: AttemptKind, theirs: AttemptKind) -> list[dict[str, Any]]:
        """Both ends at once."""
        here, there = self.observe()
        return self.ask({"do": ours, "remote": there}, {"do": theirs, "remote": here})

    def webrtc(self, *, deadline_s: float) -> list[dict[str, Any]]:
        """Both ends at once, their descriptions carried by us."""
        seen = [address.rsplit(":", 1)[0] for address in self.observe()]
        described = self.ask(
            *(
                {"do": "webrtc", "hosts": [host], "stun": OBSERVER, "deadline_s": deadline_s}
                for host in reversed(seen)
            )
        )
        return self.ask(*reversed(described))

    def _answer(self, end: subprocess.Popen[str]) -> dict[str, Any]:
        assert end.stdout is not None
        answer: dict[str, Any] = json.loads(end.stdout.readline())
        return answer


@pytest.fixture(scope="module")
def pair(inside: Path) -> Iterator[Pair]:
    """As near to each other as can be."""
    with two_hosts(link=None) as pair:
        yield pair


@pytest.fixture(scope="module")
def distant_pair(inside: Path) -> Iterator[Pair]:
    """A round trip of 60 ms apart."""
    with two_hosts(link=both_ways(delay_ms=15.0)) as pair:
        yield pair


@contextmanager
def two_hosts(*, link: Link | None) -> Iterator[Pair]:
    port_restricted = Nat(NatKind.PORT_RESTRICTED)
    names = ("a", "b")
    topology = Topology(
        routers=tuple(Router(name=f"r{name}", nat=port_restricted, link=link) for name in names),
        hosts=tuple(Host(name=name, at=f"r{name}") for name in names),
    )
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    with Lab(topology) as lab:
        lab.prove()
        dialer, acceptor = (
            lab.start(
                name,
                *(sys.executable, "-m", "support.punch_node", role),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
            for name, role in zip(names, ("dialer", "acceptor"), strict=True)
        )
        with dialer, acceptor:
            yield Pair(lab, (dialer, acceptor))  # type: ignore[arg-type]


def facts(nat: Nat, host: str) -> NatFacts:
    """What a host behind such a router would find out."""
    udp = Known(nat.kind.value.replace(" ", "_").replace("-", "_"))
    is_strict = nat.kind.is_cone and not nat.cone_for_tcp
    tcp = Known.PORT_RESTRICTED if is_strict else udp
    return NatFacts(udp=udp, tcp=tcp, port=4000, public_hosts=(host,), measured_at=0.0)


def name_of(nat: Nat) -> str:
    suffix = "" if nat.cone_for_tcp or not nat.kind.is_cone else ", UDP only"
    return f"{nat.kind.value}{suffix}"


def kinds_of(ours: Nat, theirs: Nat) -> list[AttemptKind]:
    return [it.kind for it in attempts(facts(ours, "11.22.0.1"), facts(theirs, "11.22.0.2"))]


@pytest.mark.parametrize(
    ("ours", "theirs"), list(itertools.product(NATS, NATS)), ids=lambda nat: name_of(nat)
)
def test_the_first_attempt_makes_a_link(pair: Pair, ours: Nat, theirs: Nat) -> None:
    pair.lab.set_nat("ra", ours)
    pair.lab.set_nat("rb", theirs)
    first = next(iter(kinds_of(ours, theirs)), None)
    if first is None:
        assert ours.kind is theirs.kind is NatKind.SYMMETRIC
        return
    assert first in (AttemptKind.PUNCH, *_MIRROR)
    for end in pair.meet(first, _MIRROR.get(first, first)):
        assert end.get("kind") == "punched", end
        assert end["has_echo"]
        assert end["took_s"] < MOST_S


@pytest.mark.parametrize(("ours", "theirs"), list(itertools.product(KINDS, KINDS)))
def test_webrtc_connects_what_ice_can(pair: Pair, ours: NatKind, theirs: NatKind) -> None:
    pair.lab.set_nat("ra", Nat(ours))
    pair.lab.set_nat("rb", Nat(theirs))
    if AttemptKind.WEBRTC in kinds_of(Nat(ours), Nat(theirs)):
        for end in pair.webrtc(deadline_s=8.0):
            assert end.get("kind") == "webrtc", end
            assert end["has_echo"]
            assert end["took_s"] < MOST_S
    else:
        assert NatKind.SYMMETRIC in (ours, theirs)
        for end in pair.webrtc(deadline_s=1.0):
            assert "failed" in end


def test_a_punch_that_cannot_work_ends_in_time_and_the_next_one_works(pair: Pair) -> None:
    pair.lab.set_nat("ra", Nat(NatKind.SYMMETRIC))
    pair.lab.set_nat("rb", Nat(NatKind.SYMMETRIC))
    assert all("LinkTimeout" in end["failed"] for end in pair.meet(*[AttemptKind.PUNCH] * 2))
    pair.lab.set_nat("rb", Nat(NatKind.ADDRESS_RESTRICTED))
    assert all("has_echo" in end for end in pair.meet(*[AttemptKind.PUNCH] * 2))


@pytest.mark.parametrize("theirs", [NatKind.PORT_RESTRICTED, NatKind.SYMMETRIC])
def test_a_direct_link_stands_in_time_at_a_distance(distant_pair: Pair, theirs: NatKind) -> None:
    ours = Nat(NatKind.PORT_RESTRICTED)
    distant_pair.lab.set_nat("ra", ours)
    distant_pair.lab.set_nat("rb", Nat(theirs))
    first = kinds_of(ours, Nat(theirs))[0]
    for end in distant_pair.meet(first, _MIRROR.get(first, first)):
        assert end.get("kind") == "punched", end
        assert end["took_s"] < MOST_S


def test_webrtc_stands_in_time_at_a_distance(distant_pair: Pair) -> None:
    for router in ("ra", "rb"):
        distant_pair.lab.set_nat(router, Nat(NatKind.PORT_RESTRICTED))
    for end in distant_pair.webrtc(deadline_s=8.0):
        assert end.get("kind") == "webrtc", end
        assert end["took_s"] < MOST_S
