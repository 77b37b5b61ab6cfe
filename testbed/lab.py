"""A topology built: its machines, and what may be done to it while it stands.

`Lab` owns all that it starts and makes, and ends it. Whoever uses a NAT in it calls `prove` first.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from . import namespaces, upnp
from .cables import GAP, Cable, Cables, End, Netem, Wired, kernel_has_netem, plain_line
from .links import Link
from .namespaces import LabBroken, LabUnavailable, Namespace
from .nat import LAN, WAN, Nat, NatKind, rules
from .observer import Observer
from .probe import ANSWER_S, probe_tcp, probe_udp
from .topology import (
    INTERNET,
    OBSERVERS_V4,
    Host,
    Router,
    Topology,
)

TOOLS = ("ip", "tc", "nft", "conntrack", "ethtool")  # iproute2, nftables, conntrack, ethtool
_BRIDGE = "br0"  # of the internet
_N_PROBES_AT_ONCE = 8
_UP_S = 5.0

Kinds = tuple[NatKind | None, NatKind | None]  # for UDP and for TCP; None where nothing passes


class Lab:
    """Machines and cables of a topology, from `with` until its end; one lab at a time."""

    def __init__(self, topology: Topology, *, seed: int = 0) -> None:
        """Does nothing yet.

        Args:
            topology: what to build.
            seed: decides which packets are lost.
        """
        self.topology = topology
        self.machines: Mapping[str, Namespace] = {}
        self.observer: Observer
        self._nats: dict[str, Nat] = {}
        self._at: dict[str, str] = {}
        self._cables: dict[str, Cable] = {}
        self._shaped: Cables
        self._seed = seed
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Build it. Raises LabUnavailable."""
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End every process of it, then its machines."""
        self._stack.close()

    def at(self, name: str) -> str:
        """The network that a member hangs on now."""
        return self._at[name]

    def address(self, name: str, *, v6: bool = False) -> str:
        """What a member has on the network where it is now. Raises ValueError if it has none."""
        addresses = self.topology.addresses(name, self._at[name])
        address = addresses.v6 if v6 else addresses.v4
        if address is None:
            raise ValueError(f"{name} does not speak IPv{6 if v6 else 4}")
        return str(address)

    def start(
        self, name: str, *command: str, log: Path | None = None, **options: object
    ) -> subprocess.Popen[bytes]:
        """Run a program on a machine; the lab kills it at its end, if it still runs.

        Args:
            name: of the machine.
            command: what to run.
            log: where what it says on stderr goes, and on stdout unless `options` redirect that.
            options: of `subprocess.Popen`.
        """
        with ExitStack() as opened:  # the process has the log for itself
            if log is not None:
                output = opened.enter_context(log.open("ab"))
                options = {"stdout": output, "stderr": output, **options}
            argv = [*self.machines[name].prefix, *command]
            process: subprocess.Popen[bytes] = subprocess.Popen(argv, **options)  # type: ignore[call-overload]
        self._stack.callback(end, process)
        return process

    # --- what is true of it -----------------------------------------------------------------------

    def prove(self, names: Iterable[str] | None = None) -> dict[str, Kinds]:
        """Find out what NAT hosts are behind, and compare with what the topology says.

        Args:
            names: of hosts with IPv4; all of them if left out.

        Returns:
            What was found, for UDP and TCP. The probe leaves no mapping behind in any router.

        Raises:
            LabBroken: a router does not do what it says; the text names each such host.
        """
        if names is None:
            names = [host.name for host in self.topology.hosts if host.family.has_v4]
        chosen = list(names)
        with ThreadPoolExecutor(_N_PROBES_AT_ONCE) as pool:
            found = dict(zip(chosen, pool.map(self._kinds, chosen), strict=True))
        for router in self.topology.routers:
            self.forget_mappings(router.name)
        wrong = [
            f"{name} should be {_words(expected)} and is {_words(found[name])}"
            for name in chosen
            if found[name] != (expected := self._expected(name))
        ]
        if wrong:
            raise LabBroken("; ".join(wrong))
        return found

    def _expected(self, name: str) -> Kinds:
        current = [replace(router, nat=self._nats[router.name]) for router in self.topology.routers]
        return replace(self.topology, routers=tuple(current)).expected(self._at[name])

    def _kinds(self, name: str) -> Kinds:
        machine, places = self.machines[name], self.observer.places
        way_out = [name, *(router.name for router in self.topology.routers_above(self._at[name]))]
        links = [link for link in map(self.link, way_out) if link is not None]
        # Twice, since packets wait for each other at a slow link.
        answer_s = ANSWER_S + 2e-3 * sum(link.rtt_ms for link in links)
        udp = probe_udp(machine, places, answer_s=answer_s)
        tcp = probe_tcp(machine, places, answer_s=answer_s)
        return udp.kind if udp else None, tcp.kind if tcp else None

    # --- what may be done to it -------------------------------------------------------------------

    def set_nat(self, router: str, nat: Nat) -> None:
        """Give a router other rules; all its mappings and connections are forgotten."""
        self._nats[router] = nat
        self.forget_mappings(router)

    def forget_mappings(self, router: str) -> None:
        """Restart a router's NAT: hosts inside are seen at other ports from now on, if it likes."""
        declared = {it.name: it for it in self.topology.routers}[router]
        machine = self.machines[router]
        machine.run("nft", "-f", "-", stdin=rules(self._nats[router], has_upnp=declared.has_upnp))
        machine.run("conntrack", "-F")

    def set_link(self, name: str, link: Link) -> None:
        """From the next packet on a member's cable does what `link` says.

        Raises:
            ValueError: the cable is a plain one.
        """
        cable = self._cables[name]
        if cable.link is None:
            raise ValueError(f"{name} hangs on a plain cable; give it a link in the topology")
        self._cables[name] = replace(cable, link=link)
        self._shaped.change(self._cables[name], link)

    def link(self, name: str) -> Link | None:
        """What a member's cable does now; None for a plain one."""
        return self._cables[name].link

    def interface(self, name: str) -> str:
        """What a member's own end of its cable is called."""
        return self._cables[name].near.interface

    def port(self, name: str) -> End:
        """Where a member's cable is plugged into its network's bridge."""
        return self._cables[name].far

    def move(self, host: str, to: str) -> None:
        """Plug a host into another network: it gets that one's addresses, as after a walk home."""
        cable = self._cables[host]
        machine, bridge = self._network(to)
        here = self.machines[cable.far.namespace]
        here.ip(f"link set {cable.far.interface} netns {machine.name}")
        self._cables[host] = moved = replace(cable, far=replace(cable.far, namespace=machine.name))
        self._at[host] = to
        machine.ip(f"link set {moved.far.interface} master {bridge} up")
        self.machines[host].ip(f"addr flush dev {cable.near.interface} scope global")
        self.machines[host].ip(*self._address_lines(host, cable.near.interface))
        if moved.link is not None:  # a queue does not survive the move
            self._shaped.change(moved, moved.link)
        for it in (machine, self.machines[host]):
            _wait_until_up(it)

    # --- building ---------------------------------------------------------------------------------

    def _build(self) -> None:
        members = self.topology.members
        names = [INTERNET, GAP, *(member.name for member in members)]
        self.machines = namespaces.create(names)
        self._stack.callback(namespaces.remove, names)
        self._at = {member.name: member.at for member in members}
        self._nats = {router.name: router.nat for router in self.topology.routers}
        if kernel_has_netem(self.machines[GAP]):
            self._shaped = Netem()
        else:
            self._shaped = Wired(self._seed)
        self._stack.callback(self._shaped.close)
        self._lay_cables(members)
        self._plug_in()
        self._number()
        self._set_up_internet()
        for router in self.topology.routers:
            self._set_up(router)
        for machine in self.machines.values():
            _wait_until_up(machine)
        observers = [str(address) for address in OBSERVERS_V4]
        self.observer = self._stack.enter_context(Observer(self.machines[INTERNET], observers))

    def _lay_cables(self, members: Sequence[Host | Router]) -> None:
        lines: list[str] = []
        for member in members:
            near = End(member.name, WAN if isinstance(member, Router) else "eth0")
            far = End(member.at, f"p-{member.name}")
            cable = self._cables[member.name] = Cable(member.name, near, far, member.link)
            lines += [plain_line(cable)] if cable.link is None else self._shaped.lines(cable)
        namespaces.run("ip", "-batch", "-", stdin="\n".join(lines))

    def _plug_in(self) -> None:
        """Join every cable to its network's bridge and bring its ends up.

        Bridges stay down: one that comes up with no cable in it takes a second to notice the first.
        """
        for at, (machine, bridge) in self._bridges().items():
            ports = [it.far.interface for it in self._cables.values() if it.far.namespace == at]
            plugs = (f"link set {port} addrgenmode none master {bridge} up" for port in ports)
            machine.ip(f"link add {bridge} type bridge", *plugs)
        self._shaped.start([cable for cable in self._cables.values() if cable.link is not None])
        for name, cable in self._cables.items():
            self.machines[name].ip(f"link set {cable.near.interface} up")

    def _number(self) -> None:
        """Give everybody addresses and ways out, networks first."""
        for at, (machine, bridge) in self._bridges().items():
            machine.ip(f"link set {bridge} up", *self._gateway_lines(at, bridge))
        for name, cable in self._cables.items():
            self.machines[name].ip(*self._address_lines(name, cable.near.interface))
        for router in self.topology.routers:
            if router.family.has_v6:
                self._network(router.at)[0].ip(self._route_line(router))

    def _bridges(self) -> dict[str, tuple[Namespace, str]]:
        """For each network the machine with its bridge, and what that is called."""
        return {at: self._network(at) for at in (INTERNET, *self._nats)}

    def _network(self, at: str) -> tuple[Namespace, str]:
        return self.machines[at], _BRIDGE if at == INTERNET else LAN

    def _gateway_lines(self, at: str, bridge: str) -> list[str]:
        network = self.topology.network(at)
        v4, v6 = network.gateways
        lines = [
            f"addr add {v4}/{network.v4.prefixlen} dev {bridge}",
            f"addr add {v6}/{network.v6.prefixlen} dev {bridge} nodad",
        ]
        if at == INTERNET:
            return lines + [f"addr add {it}/{network.v4.prefixlen} dev br0" for it in OBSERVERS_V4]
        family = {router.name: router.family for router in self.topology.routers}[at]
        return [
            line
            for line, is_spoken in zip(lines, (family.has_v4, family.has_v6), strict=True)
            if is_spoken
        ]

    def _route_line(self, router: Router) -> str:
        """How the network outside a router finds the one inside; IPv6 needs no translation."""
        via = self.topology.addresses(router.name, router.at).v6
        device = self._network(router.at)[1]
        return f"route add {self.topology.network(router.name).v6} via {via} dev {device}"

    def _set_up_internet(self) -> None:
        """For IPv4 it swallows what is for private addresses, as real networks do.

        IPv6 has networks of its own behind each router, so there it routes.
        """
        self.machines[INTERNET].set("net.ipv6.conf.all.forwarding", 1)
        self.machines[INTERNET].run("nft", "-f", "-", stdin=_NO_MULTICAST)

    def _set_up(self, router: Router) -> None:
        """Let it forward, translate and perhaps open ports."""
        machine = self.machines[router.name]
        for family in ("ipv4", "ipv6"):
            machine.set(f"net.{family}.conf.all.forwarding", 1)
        machine.run("nft", "-f", "-", stdin=rules(router.nat, has_upnp=router.has_upnp))
        if router.has_upnp:
            inside = self.topology.network(router.name).v4
            self._stack.enter_context(upnp.serving(machine, inside))

    def _address_lines(self, name: str, interface: str) -> list[str]:
        """A member's addresses on the network where it is, and the way out of it."""
        network = self.topology.network(self._at[name])
        addresses = self.topology.addresses(name, self._at[name])
        lines = []
        if addresses.v4:
            lines.append(f"addr add {addresses.v4}/{network.v4.prefixlen} dev {interface}")
            lines.append(f"route replace default via {network.gateways[0]}")
        if addresses.v6:
            lines.append(f"addr add {addresses.v6}/{network.v6.prefixlen} dev {interface} nodad")
            lines.append(f"route replace ::/0 via {network.gateways[1]}")
        return lines


def _wait_until_up(machine: Namespace) -> None:
    """Until then it drops what it should send, without a word."""
    deadline = time.monotonic() + _UP_S
    while "state DOWN" in (said := machine.links()) or "qdisc noop " in said:
        if time.monotonic() > deadline:
            raise LabUnavailable(f"the interfaces of {machine.name} do not come up")
        time.sleep(0.01)


def _words(kinds: Kinds) -> str:
    udp, tcp = kinds
    return f"{udp or 'nothing known'} for UDP and {tcp or 'nothing known'} for TCP"


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, if it still runs."""
    process.kill()
    process.wait()


# Multicast reaches the whole street, but not the internet; neighbour discovery must pass.
_NO_MULTICAST = """
table bridge internet {
  chain forwarding { type filter hook forward priority 0; policy accept;
    ether type ip meta pkttype multicast drop
    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
    ether type ip6 meta pkttype multicast drop
  }
}
"""
