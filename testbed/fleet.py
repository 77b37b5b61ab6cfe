"""Nodes on unlike devices that hang on a lab's links: started one by one, asked, and ended.

A device is a share of this machine's speed (`testbed.devices`), made smaller by `SCALE`, so that
all of a fleet may compute at once without slowing each other: together below 1.6 of two cores.
Each node starts alone, since it measures what it can do as it starts.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from covey.cli.child import NodeProcess, wait_for

from .asker import Asker
from .devices import DEVICES, Device
from .lab import Lab
from .links import PRESETS
from .machines import Machine
from .namespaces import LabBroken
from .topology import Host, Topology

SCALE = 0.5
MAX_LOAD = 1.6  # of two cores
PROFILED_S = 60.0
SESSIONS = 4  # at once, as plans reckon with
CONTEXT = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One node of a fleet: what it runs on, what it hangs on, and what its owner gives."""

    kind: str  # of DEVICES
    link: str  # of PRESETS
    memory: int | None = None  # bytes for weights and KV cache; what the device has if left out
    max_blocks: int | None = None

    @property
    def device(self) -> Device:
        """What it runs on."""
        return DEVICES[self.kind]

    @property
    def speed(self) -> float:
        """Share of this machine's speed."""
        return SCALE * self.device.speed

    @property
    def memory_bytes(self) -> int:
        """What it gives."""
        return self.device.memory_bytes if self.memory is None else self.memory


@dataclass(frozen=True, slots=True)
class Fleet:
    """A swarm that runs: everything by the names of its hosts, the founder's first."""

    model: str
    members: Mapping[str, Member]
    machines: dict[str, Machine] = field(default_factory=dict)
    nodes: dict[str, NodeProcess] = field(default_factory=dict)
    askers: dict[str, Asker] = field(default_factory=dict)

    @property
    def founder(self) -> str:
        """The host of the first node."""
        return next(iter(self.members))

    def check(self) -> None:
        """Raise LabBroken if a node has ended."""
        for name, node in self.nodes.items():
            if not node.is_running:
                said = node.log_tail(1)
                raise LabBroken(f"the node on {name} has ended: {said[0] if said else 'silently'}")


def named(members: Sequence[Member]) -> dict[str, Member]:
    """Members by the names of their hosts: the kind and a letter."""
    names: dict[str, Member] = {}
    for member in members:
        n_before = sum(other.kind == member.kind for other in names.values())
        names[f"{member.kind}-{chr(ord('a') + n_before)}"] = member
    return names


def topology(members: Mapping[str, Member]) -> Topology:
    """Every member with a cable of its own on one network."""
    hosts = [Host(name=name, link=PRESETS[member.link]) for name, member in members.items()]
    return Topology(hosts=tuple(hosts))


@contextmanager
def running_fleet(
    members: Mapping[str, Member],
    source: str,
    model: str,
    folder: Path,
    *,
    options: Sequence[str] = (),
    has_own_caches: bool = False,
) -> Iterator[Fleet]:
    """A lab and a node for each member, all of them measured.

    Args:
        members: by the names of their hosts; the first one founds.
        source: what all of them serve: a name, or a file.
        model: what they call it then.
        folder: for homes and logs, on disk.
        options: of every node, besides.
        has_own_caches: each packs the weights for itself, as memory limits need it.

    Raises:
        LabBroken, LabUnavailable, CoveyError: it does not come up.
    """
    load = sum(member.speed for member in members.values())
    if load > MAX_LOAD:
        raise LabBroken(f"the devices need {load:g} cores together, more than {MAX_LOAD:g}")
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(topology(members)))
        fleet = Fleet(model, members)
        invite = ""
        for name, member in members.items():
            machine = Machine(lab.machines[name], folder / name, has_own_caches)
            machine.folder.mkdir(parents=True)
            words = ("join", invite, "--model", source) if invite else ("up", source)
            node = machine.start(*words, *_options(member), *options, max_blocks=member.max_blocks)
            stack.enter_context(node)
            facts = node.facts
            invite = invite or facts["invite"]
            fleet.machines[name], fleet.nodes[name] = machine, node
            wait_for(
                lambda home=machine.home: (home / "profile.json").exists(),  # type: ignore[misc]
                PROFILED_S,
                f"{name} does not measure itself",
            )
        for name, machine in fleet.machines.items():
            asker = Asker(machine, model, n_threads=SESSIONS, seed=secrets.randbits(32))
            fleet.askers[name] = stack.enter_context(asker)
        yield fleet


def _options(member: Member) -> list[str]:
    return [
        *("--no-mdns", "--no-map-port", "--threads", "1", "--context", str(CONTEXT)),
        *("--speed", f"{member.speed:g}", "--memory", str(member.memory_bytes)),
    ]
