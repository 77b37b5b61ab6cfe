"""Whole nodes behind routers, and what happens to a text while its links change beneath it.

Two members hold 20 of the 30 blocks of SmolLM2-135M each, so neither answers alone; both are behind
routers. Two public members hold none and relay, one of them the founder. In each case a text of
hundreds of tokens is asked for on one host, something happens in the middle, and the text must be
the one that a single process writes. Pauses are measured where the text is asked for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.rows import Row

from covey.cli.child import NodeProcess, wait_for
from testbed.artefacts import Artefacts, Cell
from testbed.faults import Cut, Kill, Move, Partition, RestartRouter, Undo
from testbed.lab import Lab
from testbed.links import both_ways
from testbed.machines import Machine
from testbed.nat import Nat, NatKind
from testbed.running_text import RunningText, Story
from testbed.topology import Host, Router, Topology

MODEL = "smollm2"
MAX_BLOCKS = 20
ONE_WAY_MS = 2.5  # of each cable: 10 ms from host to host and back, 20 through a relay
PROMPT = "Once upon a time"
# A sampled text does not go round in circles, so that a lost or doubled token would show.
OPTIONS = {"max_tokens": 1000, "temperature": 0.8, "seed": 7}
AT_PIECE = 60  # when something happens; a better path may take 20 s to be tried again
PLANNED_S, LINKED_S, TEXT_S = 120.0, 90.0, 240.0
PAUSE_S = 3.0  # the target
SIDES, RELAYS = ("left", "right"), ("relay-1", "relay-2")
HEAD, OTHER = SIDES
OWN_PATHS = frozenset({"direct", "mapped", "punched", "webrtc"})
RELAYED = frozenset({"relayed"})
PUNCHABLE = (NatKind.PORT_RESTRICTED, NatKind.PORT_RESTRICTED)
ANY = OWN_PATHS | RELAYED
MOVES_TEST = "tests/property/transport/steady/test_moves.py"


@dataclass(slots=True)
class World:
    """A swarm that runs in a lab."""

    lab: Lab
    machines: Mapping[str, Machine]
    nodes: Mapping[str, NodeProcess]

    def carrying_relay(self) -> str:
        """The relay through which most goes now."""
        before = {relay: self._received_bytes(relay) for relay in RELAYS}
        time.sleep(0.5)
        return max(RELAYS, key=lambda relay: self._received_bytes(relay) - before[relay])

    def _received_bytes(self, name: str) -> int:
        interface = self.lab.interface(name)
        said = self.lab.machines[name].run("ip", "-s", "-j", "link", "show", interface)
        nbytes: int = json.loads(said)[0]["stats64"]["rx"]["bytes"]
        return nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What the routers are, and what happens while the text comes."""

    name: str
    nats: tuple[NatKind, NatKind]  # of the asker's router, and of the worker's
    happens: Callable[[World, list[Undo]], None]
    before: frozenset[str]  # what may carry the link between the two until then
    after: frozenset[str] = ANY  # and what must, at some moment afterwards
    apart: bool = False  # the routers do not hear each other until then
    pause_s: float | None = PAUSE_S


def _let_meet(_: World, undo: list[Undo]) -> None:
    undo.pop()()


def _kill_relay(world: World, _: list[Undo]) -> None:
    relay = world.carrying_relay()
    Kill(world.nodes[relay].process.pid).strike(world.lab)


def _cut_relay(world: World, undo: list[Undo]) -> None:
    undo.append(Cut(world.carrying_relay()).strike(world.lab))


def _restart_router(world: World, _: list[Undo]) -> None:
    RestartRouter(f"r-{OTHER}").strike(world.lab)


def _move_other(world: World, _: list[Undo]) -> None:
    Move(OTHER, "r-cafe").strike(world.lab)


def _move_head(world: World, _: list[Undo]) -> None:
    Move(HEAD, "r-cafe").strike(world.lab)


CASES = (
    Case(
        name="upgrade",
        nats=PUNCHABLE,
        apart=True,
        happens=_let_meet,
        before=RELAYED,
        after=OWN_PATHS,
    ),
    Case(
        name="relay killed",
        nats=(NatKind.SYMMETRIC, NatKind.SYMMETRIC),
        happens=_kill_relay,
        before=RELAYED,
        after=RELAYED,
    ),
    Case(
        # Nobody's kernel says that it is gone: only its silence does.
        name="relay's cable pulled out",
        nats=(NatKind.SYMMETRIC, NatKind.SYMMETRIC),
        happens=_cut_relay,
        before=RELAYED,
        after=RELAYED,
        pause_s=None,
    ),
    Case(
        name="router restarted",
        # A port-restricted one would find the old ports free again and go on as if nothing was.
        nats=(NatKind.FULL_CONE, NatKind.SYMMETRIC),
        happens=_restart_router,
        before=OWN_PATHS,
    ),
    Case(
        name="worker to another network",
        nats=PUNCHABLE,
        happens=_move_other,
        before=OWN_PATHS,
        pause_s=None,
    ),
    Case(
        name="asker to another network",
        nats=PUNCHABLE,
        happens=_move_head,
        before=OWN_PATHS,
        pause_s=None,
    ),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which cases."""
    names = [case.name for case in CASES]
    parser.add_argument(
        "--only", action="append", choices=names, metavar="CASE", help=f"of: {', '.join(names)}"
    )
    parser.add_argument("--keep", action="store_true", help="keep the logs of all cases")


def measure(folder: Path, options: argparse.Namespace) -> Sequence[Row]:
    """Run the cases, each with a swarm of its own."""
    figures: list[Row] = []
    with Artefacts("paths") as artefacts, Lab(_topology()) as lab:
        reference = _reference(Machine(lab.machines[HEAD], folder))
        for case in CASES:
            if options.only is None or case.name in options.only:
                with artefacts.cell(case.name) as cell:
                    found = _run(lab, case, reference, cell)
                    cell.has_failed = options.keep or any(row.met is False for row in found)
                figures += found
                for row in found:
                    print(f"{row.figure}: {row.value:.4g}", flush=True)
    if options.only is None:
        figures.append(_thousand_moves())
    return figures


def _topology() -> Topology:
    link = both_ways(delay_ms=ONE_WAY_MS)
    nat = Nat(NatKind.PORT_RESTRICTED)
    routers = [f"r-{name}" for name in (*SIDES, "cafe")]
    return Topology(
        routers=tuple(Router(name=name, nat=nat, link=link) for name in routers),
        hosts=(
            *(Host(name=side, at=f"r-{side}") for side in SIDES),
            *(Host(name=name, link=link) for name in RELAYS),
        ),
    )


def _reference(machine: Machine) -> str:
    """The text that one process writes."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    text: str = machine.facts("run", MODEL, PROMPT, "--raw", "--alone", *words)["text"]
    return text


def _run(lab: Lab, case: Case, reference: str, cell: Cell) -> list[Row]:
    for side, kind in zip(SIDES, case.nats, strict=True):
        lab.set_nat(f"r-{side}", Nat(kind))
        if lab.at(side) != f"r-{side}":
            lab.move(side, f"r-{side}")
    lab.prove(SIDES)
    undo = [Partition(("r-left",), ("r-right",)).strike(lab)] if case.apart else []
    with _swarm(lab, cell) as world:
        head = world.machines[HEAD]
        wait_for(lambda: _is_planned(head), PLANNED_S, f"{case.name}: no plan over both hosts")
        for side in SIDES:  # not only the first that was found
            wait_for(
                lambda side=side: _n_relays(world.machines[side]) == len(RELAYS),  # type: ignore[misc]
                LINKED_S,
                f"{case.name}: {side} does not hold {len(RELAYS)} relays",
            )
        wait_for(
            lambda: _kind_of_link(head) in case.before,
            LINKED_S,
            f"{case.name}: the link was not {' or '.join(sorted(case.before))}",
        )
        wish = {"prompt": PROMPT, "model": MODEL, **OPTIONS}
        with RunningText(head, wish, watched=OTHER) as text:
            text.wait_for_pieces(AT_PIECE, TEXT_S)
            happened_at = time.monotonic()
            case.happens(world, undo)
            story = text.wait(TEXT_S)
    while undo:
        undo.pop()()
    _tell(case, story, happened_at)
    return rows(case, story, reference, happened_at)


def rows(case: Case, story: Story, reference: str, happened_at: float) -> list[Row]:
    """The figures of one case."""
    found = [
        Row(f"{case.name}: same text as one process", float(story.text == reference), 1, "at least")
    ]
    if not story.why:
        gaps = story.gaps_s()
        found += [
            Row(f"{case.name}: longest pause between two tokens, s", max(gaps), case.pause_s),
            Row(f"{case.name}: usual pause between two tokens, s", median(gaps)),
            Row(f"{case.name}: tokens", story.n_tokens),
        ]
    if case.before != case.after:
        has_moved = story.path_after(happened_at, case.after) is not None
        found.append(Row(f"{case.name}: the link moved", float(has_moved), 1, "at least"))
    return found


def _tell(case: Case, story: Story, happened_at: float) -> None:
    """What a person wants to know besides."""
    paths = ", ".join(f"{path.kind} at {path.at - happened_at:+.2f} s" for path in story.paths)
    print(f"{case.name}: {paths}{f'; {story.why}' if story.why else ''}")


@contextmanager
def _swarm(lab: Lab, cell: Cell) -> Iterator[World]:
    """Two relays, one of which founds, and the two behind routers, started at once."""
    machines = {}
    for name in (*RELAYS, *SIDES):
        folder = cell.folder / name
        folder.mkdir()
        machines[name] = Machine(lab.machines[name], folder)
    founder, *others = machines
    with ExitStack() as stack:
        nodes: dict[str, NodeProcess] = {}

        def start(name: str, *arguments: str) -> None:
            max_blocks = MAX_BLOCKS if name in SIDES else 0
            node = machines[name].start(*arguments, "--no-mdns", max_blocks=max_blocks)
            nodes[name] = stack.enter_context(node)

        start(founder, "up", MODEL)
        nodes[founder].wait_until_up()
        invite = machines[founder].covey("invite", "--uses", str(len(others))).strip()
        for name in others:
            start(name, "join", invite, "--model", MODEL)
        for node in nodes.values():
            node.wait_until_up()
        yield World(lab, machines, nodes)


def _is_planned(machine: Machine) -> bool:
    active = machine.facts("plan", MODEL)["active"]
    return active is not None and len(active["stages"]) == 2


def _n_relays(machine: Machine) -> int:
    return len(machine.facts("status")["reach"]["relays"])


def _kind_of_link(machine: Machine) -> str | None:
    members = machine.facts("status")["members"]
    links = [member["link"] for member in members if member["name"] == OTHER]
    kind: str | None = links[0]["kind"] if links and links[0] is not None else None
    return kind


def _thousand_moves() -> Row:
    """The test of that name: a thousand moves of steady links at random moments."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "thousand", MOVES_TEST]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout)
    passed = float(done.returncode == 0)
    return Row("1,000 upgrades at random moments: no frame lost or doubled", passed, 1, "at least")
