"""What goes wrong in a lab: each fault a value that strikes, and returns how to undo it.

Cables are cut at their network's bridge: addresses and routes stay, as when a real one is pulled
out of a switch, and one way can be cut alone. Processes are stopped and killed by their own pid.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal, Protocol

from .lab import Lab
from .links import Link

Undo = Callable[[], None]
Direction = Literal["up", "down", "both"]

_tables = count(1)


class Fault(Protocol):
    """Something that goes wrong."""

    def strike(self, lab: Lab) -> Undo:
        """Let it happen; what is returned makes it good again, as far as that is possible."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A member's cable carries nothing: both ways, or only what it sends or is sent."""

    member: str
    direction: Direction = "both"

    def strike(self, lab: Lab) -> Undo:
        """Drop at the bridge; undone, it carries again at once."""
        port = lab.port(self.member)
        rules = cut_rules(port.interface, self.direction)
        return _add_table(lab, port.namespace, rules)


@dataclass(frozen=True, slots=True)
class Partition:
    """Two groups of members of one network that do not hear each other; all else goes on."""

    one: tuple[str, ...]
    other: tuple[str, ...]

    def strike(self, lab: Lab) -> Undo:
        """Drop at the bridge what is from one group to the other. Raises ValueError if they hang
        on more than one network.
        """
        ports = {name: lab.port(name) for name in (*self.one, *self.other)}
        networks = {port.namespace for port in ports.values()}
        if len(networks) != 1:
            raise ValueError(f"{sorted(ports)} are not all on one network")
        groups = [[ports[name].interface for name in group] for group in (self.one, self.other)]
        return _add_table(lab, networks.pop(), partition_rules(*groups))


@dataclass(frozen=True, slots=True)
class Flap:
    """A cable that is cut and mended, again and again, before this returns."""

    member: str
    n_times: int
    cut_s: float
    mended_s: float

    def strike(self, lab: Lab) -> Undo:
        """Cut and mend; mended at the end, so there is nothing to undo."""
        for _ in range(self.n_times):
            mend = Cut(self.member).strike(lab)
            time.sleep(self.cut_s)
            mend()
            time.sleep(self.mended_s)
        return _nothing


@dataclass(frozen=True, slots=True)
class Slow:
    """A cable becomes another, usually a worse one."""

    member: str
    link: Link

    def strike(self, lab: Lab) -> Undo:
        """From the next packet on. Raises ValueError for a plain cable."""
        before = lab.link(self.member)
        lab.set_link(self.member, self.link)
        if before is None:
            raise ValueError(f"{self.member} hangs on a plain cable")
        return lambda: lab.set_link(self.member, before)


@dataclass(frozen=True, slots=True)
class Move:
    """A host goes to another network, and has that one's address."""

    host: str
    to: str

    def strike(self, lab: Lab) -> Undo:
        """Undone, it goes back to where it was."""
        before = lab.at(self.host)
        lab.move(self.host, self.to)
        return lambda: lab.move(self.host, before)


@dataclass(frozen=True, slots=True)
class RestartRouter:
    """A router forgets all its mappings and connections, and is away for a while."""

    router: str
    away_s: float = 0.0

    def strike(self, lab: Lab) -> Undo:
        """What it forgot is gone for good, so there is nothing to undo."""
        mend = Cut(self.router).strike(lab) if self.away_s else _nothing
        time.sleep(self.away_s)
        lab.forget_mappings(self.router)
        mend()
        return _nothing


@dataclass(frozen=True, slots=True)
class Kill:
    """A process ends without a word, as in a power cut."""

    pid: int

    def strike(self, lab: Lab) -> Undo:
        """There is no way back."""
        os.kill(self.pid, signal.SIGKILL)
        return _nothing


@dataclass(frozen=True, slots=True)
class Stop:
    """A process stands still, with all its sockets open, as on a machine that sleeps."""

    pid: int

    def strike(self, lab: Lab) -> Undo:
        """Undone, it goes on where it was."""
        os.kill(self.pid, signal.SIGSTOP)
        return lambda: os.kill(self.pid, signal.SIGCONT)


def cut_rules(port: str, direction: Direction) -> Sequence[str]:
    """The chains that keep a bridge's port from carrying what its owner sends, is sent, or both."""
    up = f'chain up {{ type filter hook prerouting priority -300; iifname "{port}" drop; }}'
    down = f'chain down {{ type filter hook postrouting priority 0; oifname "{port}" drop; }}'
    return {"up": [up], "down": [down], "both": [up, down]}[direction]


def partition_rules(one: Sequence[str], other: Sequence[str]) -> Sequence[str]:
    """The chain that keeps two groups of a bridge's ports apart."""
    left, right = _set_of(one), _set_of(other)
    return [
        "chain apart { type filter hook forward priority 0;"
        f" iifname {left} oifname {right} drop; iifname {right} oifname {left} drop; }}"
    ]


def _set_of(ports: Sequence[str]) -> str:
    quoted = ", ".join(f'"{port}"' for port in ports)
    return f"{{ {quoted} }}"


def _add_table(lab: Lab, at: str, chains: Sequence[str]) -> Undo:
    machine, table = lab.machines[at], f"fault{next(_tables)}"
    body = "\n".join(chains)
    machine.run("nft", "-f", "-", stdin=f"table bridge {table} {{\n{body}\n}}\n")

    def undo() -> None:
        machine.run("nft", "delete", "table", "bridge", table)

    return undo


def _nothing() -> None:
    """Nothing is to be undone."""
