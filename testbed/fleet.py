"""Nodes on unlike devices that hang on a lab's links: started one by one, asked, and ended.

A device is a share of this machine's speed (`testbed.devices`), made smaller by `SCALE`, so that
all of a fleet may compute at once without slowing each other: together below 1.6 of two cores.
Each node starts alone, since it measures what it can do as it starts.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from covey.cli.child import NodeProcess, wait_for
from covey.node.links import SETTLE_S

from . import namespaces
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
ONCE_PROFILED_S = 300.0  # of a model that is large for the device
# A new link is probed at once and after each of these pauses, for so many round trips each time.
N_PROBES = 1 + len(SETTLE_S)
PROBE_S, PROBE_ROUND_TRIPS = 0.5, 20
SESSIONS = 4  # at once, as plans reckon with
CONTEXT = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One node of a fleet: what it runs on, what it hangs on, and what its owner gives."""

    kind: str  # of DEVICES
    link: str  # of PRESETS
    memory: int | None = None  # bytes for weights and KV cache; what the device has if left out
    max_blocks: int | None = None
    scale: float = SCALE

    @property
    def device(self) -> Device:
        """What it runs on."""
        return DEVICES[self.kind]

    @property
    def speed(self) -> float:
        """Share of this machine's speed."""
        return self.scale * self.device.speed

    @property
    def memory_bytes(self) -> int:
        """What it gives."""
        return self.device.memory_bytes if self.memory is None else self.memory


@dataclass(slots=True)
class Fleet:
    """A swarm that runs: everything by the names of its nodes, the founder's first."""

    model: str
    members: Mapping[str, Member]
    machines: dict[str, Machine] = field(default_factory=dict)
    nodes: dict[str, NodeProcess] = field(default_factory=dict)
    askers: dict[str, Asker] = field(default_factory=dict)
    began_at: float = field(default_factory=time.monotonic)  # when all of it was up

    @property
    def founder(self) -> str:
        """The name of the first node."""
        return next(iter(self.nodes))

    def settle(self) -> None:
        """Wait until nodes no longer probe each other's links because these are new."""
        time.sleep(max(0.0, self.began_at + settling_s(self.members) - time.monotonic()))

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


def settling_s(members: Mapping[str, Member]) -> float:
    """How long after the last member has joined links are still probed because they are new."""
    cables_s = sorted(PRESETS[member.link].rtt_ms / 1e3 for member in members.values())
    probe_s = PROBE_S + PROBE_ROUND_TRIPS * sum(cables_s[-2:])
    return sum(SETTLE_S) + N_PROBES * probe_s


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
    n_sessions: int = SESSIONS,
    are_alike: bool = False,
) -> Iterator[Fleet]:
    """A lab and a node for each member, all of them measured.

    Args:
        members: by the names of their hosts; the first one founds.
        source: what all of them serve: a name, or a file.
        model: what they call it then.
        folder: for homes and logs, on disk.
        options: of every node, besides.
        n_sessions: texts that may be asked for at once, at each of them.
        are_alike: the first alone measures itself, in minutes if need be; the others have its
            figures from before.

    Raises:
        LabBroken, LabUnavailable, CoveyError: it does not come up.
    """
    load = sum(member.speed for member in members.values())
    if load > MAX_LOAD:
        raise LabBroken(f"the devices need {load:g} cores together, more than {MAX_LOAD:g}")
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(topology(members)))
        fleet = Fleet(model, members)
        for name, member in members.items():
            machine = Machine(lab.machines[name], folder / name, has_own_caches=False)
            words = [*_options(member), *options]
            if are_alike and fleet.machines:
                _hand_on_profile(fleet.machines[fleet.founder], machine)
            profiled_s = ONCE_PROFILED_S if are_alike else PROFILED_S
            _start(
                fleet,
                stack,
                machine,
                source,
                words,
                max_blocks=member.max_blocks,
                profiled_s=profiled_s,
            )
        _go_and_ask(fleet, stack, n_sessions)
        yield fleet


@contextmanager
def running_on_one_host(
    names: Sequence[str],
    source: str,
    model: str,
    folder: Path,
    *,
    options: Sequence[str] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Fleet]:
    """Nodes of one machine, at its full speed, that reach each other over its loopback.

    Args:
        names: of the nodes; the first one founds.
        source: what all of them serve: a name, or a file.
        model: what they call it then.
        folder: for homes and logs, on disk.
        options: of every node, besides.
        environment: of every node, besides.

    Raises:
        LabUnavailable, CoveyError: it does not come up.
    """
    with ExitStack() as stack:
        hosts = namespaces.create(["local"])
        stack.callback(namespaces.remove, hosts)
        fleet = Fleet(model, {})
        for name in names:
            machine = Machine(
                hosts["local"],
                folder / name,
                has_own_caches=False,
                own_name=name,
                own_environment=environment,
            )
            words = ("--host", "127.0.0.1", "--api-port", "0", *_QUIET, *options)
            _start(fleet, stack, machine, source, words)
        _go_and_ask(fleet, stack, n_sessions=1)
        yield fleet


_QUIET = ("--no-mdns", "--no-map-port")


def _start(
    fleet: Fleet,
    stack: ExitStack,
    machine: Machine,
    source: str,
    options: Sequence[str],
    *,
    max_blocks: int | None = None,
    profiled_s: float = PROFILED_S,
) -> None:
    """Start a node and wait until it has measured itself, so that nobody disturbs it."""
    machine.folder.mkdir(parents=True, exist_ok=True)
    if fleet.nodes:
        invite = fleet.nodes[fleet.founder].facts["invite"]
        words = ["join", invite, "--model", source]
    else:
        words = ["up", source]
    node = machine.start(*words, *options, max_blocks=max_blocks)
    stack.enter_context(node)
    fleet.machines[machine.name], fleet.nodes[machine.name] = machine, node
    node.wait_until_up()
    profile = machine.home / "profile.json"
    wait_for(profile.exists, profiled_s, f"{machine.name} does not measure itself")


def _hand_on_profile(measured: Machine, machine: Machine) -> None:
    """A machine finds in its home what another of its kind has measured."""
    machine.folder.mkdir(parents=True)
    machine.home.mkdir(mode=0o700)
    shutil.copyfile(measured.home / "profile.json", machine.home / "profile.json")


def _go_and_ask(fleet: Fleet, stack: ExitStack, n_sessions: int) -> None:
    for name, machine in fleet.machines.items():
        asker = Asker(machine, fleet.model, n_threads=n_sessions, seed=secrets.randbits(32))
        fleet.askers[name] = stack.enter_context(asker)
    founder = fleet.askers[fleet.founder]
    for name in fleet.machines:
        wait_for(
            lambda name=name: founder.is_planned_with(name),  # type: ignore[misc]
            PROFILED_S,
            f"the founder hears nothing of what {name} can do",
        )
    fleet.began_at = time.monotonic()


def _options(member: Member) -> list[str]:
    return [
        *(*_QUIET, "--threads", "1", "--context", str(CONTEXT)),
        *("--speed", f"{member.speed:g}", "--memory", str(member.memory_bytes)),
    ]
