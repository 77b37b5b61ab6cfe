"""A scenario as one value: what there is, what happens, and what must be true at the end.

The file format is Python: a module with a `Scenario`. `run` builds the lab, proves its NATs, does
the steps in order and says what each took, then asks every expectation for its figure. It knows
what a node is only as a command on a machine, so that scenarios of whole nodes and of transports
alone read the same.
"""

from __future__ import annotations

import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from benchmarks.rows import Row

from .artefacts import Artefacts, Cell
from .devices import Device, memory_limit
from .faults import Fault, Kill, Stop, Undo
from .lab import Lab, end
from .topology import Topology

STOP_S = 20.0  # a node lets its generations finish for ten


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A process of a scenario, by the name that steps call it.

    `{host}` and `{folder}` in its command are its host's address and a folder of its own.
    """

    name: str
    host: str
    command: tuple[str, ...]
    device: Device | None = None


@dataclass(slots=True)
class Running:
    """What a running scenario has: its lab, its processes, and what steps leave for each other."""

    lab: Lab
    cell: Cell
    folder: Path
    programs: dict[str, Program]
    stack: ExitStack
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    undo: dict[str, Undo] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)

    def pid(self, name: str) -> int:
        """Of a program that runs. Raises KeyError if it was not started."""
        return self.processes[name].pid


class Step(Protocol):
    """Something that happens; its `str` is what the run prints."""

    def do(self, running: Running) -> None:
        """Let it happen; waits until it has. Raises CoveyError if it cannot be."""


@dataclass(frozen=True, slots=True)
class Start:
    """A program starts; its device's limits hold from its first instruction."""

    program: str

    def do(self, running: Running) -> None:
        """Does not wait for what it does."""
        program = running.programs[self.program]
        own = running.folder / program.name
        own.mkdir(exist_ok=True)
        command = [
            word.format(host=running.lab.address(program.host), folder=own)
            for word in program.command
        ]
        join: Callable[[], None] | None = None
        if program.device is not None:
            # Groups are the machine's, not the lab's: another lab may run.
            group = f"covey-{program.name}-{secrets.token_hex(4)}"
            limit = memory_limit(group, program.device.memory_bytes)
            kind, join = running.stack.enter_context(limit)
            command += program.device.options
            print(f"      {program.name}: memory held by {kind}")
        process = running.lab.start(
            program.host, *command, log=running.cell.log(program.name), preexec_fn=join
        )
        running.stack.callback(end, process)  # before its group, which must be empty then
        running.processes[program.name] = process


@dataclass(frozen=True, slots=True)
class End:
    """A program is asked to end (`is_sudden`: is not asked), and has ended."""

    program: str
    is_sudden: bool = False

    def do(self, running: Running) -> None:
        """Insists after `STOP_S`."""
        process = running.processes.pop(self.program)
        process.send_signal(signal.SIGKILL if self.is_sudden else signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            Kill(process.pid).strike(running.lab)
            process.wait()


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault strikes; `name` is what `Heal` calls it. `End` and `Freeze` are for programs."""

    name: str
    fault: Fault

    def do(self, running: Running) -> None:
        """At once, but for a fault that takes its time."""
        running.undo[self.name] = self.fault.strike(running.lab)


@dataclass(frozen=True, slots=True)
class Heal:
    """A fault is over."""

    name: str

    def do(self, running: Running) -> None:
        """Undo what was struck under that name."""
        running.undo.pop(self.name)()


@dataclass(frozen=True, slots=True)
class Freeze:
    """A program stands still for a while."""

    program: str
    seconds: float

    def do(self, running: Running) -> None:
        """Goes on when it returns."""
        undo = Stop(running.pid(self.program)).strike(running.lab)
        time.sleep(self.seconds)
        undo()


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing is done, and everything goes on."""

    seconds: float

    def do(self, running: Running) -> None:
        """Wait."""
        time.sleep(self.seconds)


@dataclass(frozen=True, slots=True)
class Do:
    """Whatever else; a figure that it returns is noted under its name, for expectations."""

    name: str
    action: Callable[[Running], float | None] = field(repr=False)

    def do(self, running: Running) -> None:
        """Call it."""
        figure = self.action(running)
        if figure is not None:
            running.notes[self.name] = figure


@dataclass(frozen=True, slots=True)
class Expect:
    """A figure at the end, and what it must be; `target` is None for one that is only reported."""

    figure: str
    measure: Callable[[Running], float]
    target: float | None = None
    direction: Literal["at most", "at least"] = "at least"

    def row(self, running: Running) -> Row:
        """The figure, measured."""
        return Row(self.figure, self.measure(running), self.target, self.direction)


def noted(name: str) -> Callable[[Running], float]:
    """What `Do` noted under that name, for `Expect`."""
    return lambda running: running.notes[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """All of it. Raises ValueError if a step names a program that is not declared."""

    name: str
    topology: Topology
    programs: tuple[Program, ...] = ()
    steps: tuple[Step, ...] = ()
    expectations: tuple[Expect, ...] = ()

    def __post_init__(self) -> None:
        known = {program.name for program in self.programs}
        if len(known) < len(self.programs):
            raise ValueError("two programs have one name")
        for step in self.steps:
            if isinstance(step, Start | End | Freeze) and step.program not in known:
                raise ValueError(f"{step}: there is no such program")


def run(scenario: Scenario, folder: Path, *, has_captures: bool = False) -> Sequence[Row]:
    """Run it once.

    Args:
        scenario: what to run.
        folder: for the programs' own folders; gone with the lab.
        has_captures: record packets at every host.

    Returns:
        A row for each expectation. If one is missed, or a step raises, logs and captures stay in
        a folder that is named.

    Raises:
        LabBroken, LabUnavailable: the lab is not what it says, or cannot be.
    """
    with (
        Artefacts(scenario.name) as artefacts,
        artefacts.cell(scenario.name) as cell,
        ExitStack() as stack,
    ):
        lab = stack.enter_context(Lab(scenario.topology))
        if scenario.topology.routers:
            lab.prove()
        if has_captures:
            cell.capture(lab, [host.name for host in scenario.topology.hosts])
        programs = {program.name: program for program in scenario.programs}
        running = Running(lab, cell, folder, programs, stack)
        _do(scenario.steps, running)
        rows = [expectation.row(running) for expectation in scenario.expectations]
        cell.has_failed = any(row.met is False for row in rows)
    return rows


def _do(steps: Sequence[Step], running: Running) -> None:
    began_at = time.monotonic()
    for step in steps:
        print(f"{time.monotonic() - began_at:7.2f}  {step}", flush=True)
        step.do(running)
