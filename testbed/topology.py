"""What a lab consists of, as data: hosts, their routers, and the cables between them.

Every host and router hangs by one cable on a network: the internet, or what a router has inside.
The internet is one bridge where everybody hears everybody, but no multicast. Two routers in a row
are a carrier's NAT. Addresses follow from the order in which things are named, so a topology always
gets the same; `Lab` builds it. Pure: nothing here touches the machine.

The lab's internet has addresses that look as real as any: those kept for documentation are refused
by miniupnpd and called private by Python's `ipaddress`, so code under test would take other turns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from .links import Link
from .nat import Nat, NatKind, seen_through

INTERNET = "internet"
INTERNET_V4 = IPv4Network("11.22.0.0/16")
INTERNET_V6 = IPv6Network("2400:c0de::/64")
GATEWAY_V4, GATEWAY_V6 = INTERNET_V4[1], INTERNET_V6[1]
OBSERVERS_V4 = (INTERNET_V4[10], INTERNET_V4[11])  # the two addresses that `probe` asks
MAX_MEMBERS = 250  # in all: the last byte of an address tells them apart

_NAME = re.compile(r"[a-z][a-z0-9-]{0,9}")  # the kernel's names of interfaces are this short


class Family(StrEnum):
    """Which versions of IP somebody has."""

    V4 = "v4"
    V6 = "v6"
    DUAL = "dual"

    @property
    def has_v4(self) -> bool:
        """Whether IPv4 is among them."""
        return self is not Family.V6

    @property
    def has_v6(self) -> bool:
        """Whether IPv6 is among them."""
        return self is not Family.V4


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A machine at somebody's home, or with `at` left out one with a public address.

    `link` is what its cable does to packets; None for a plain one, the fastest there is.
    """

    name: str
    at: str = INTERNET
    link: Link | None = None
    family: Family = Family.V4


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """A home router, or with others `at` it a carrier's. For IPv6 a firewall without translation.

    `has_upnp`: answers UPnP IGD and NAT-PMP inside. `lan`: what to number its network with instead
    of one of its own; two homes may have the same, as real ones do.
    """

    name: str
    nat: Nat
    at: str = INTERNET
    link: Link | None = None
    family: Family = Family.V4
    has_upnp: bool = False
    lan: IPv4Network | None = None


@dataclass(frozen=True, slots=True)
class Network:
    """The addresses of one network, and the one that leads out of it."""

    v4: IPv4Network
    v6: IPv6Network

    @property
    def gateways(self) -> tuple[IPv4Address, IPv6Address]:
        """Where its members send what is for elsewhere."""
        return self.v4[1], self.v6[1]


@dataclass(frozen=True, slots=True)
class Addresses:
    """What one member has on one network; None for a version of IP that it does not speak."""

    v4: IPv4Address | None
    v6: IPv6Address | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """All of a lab. Raises ValueError if it cannot be: the text says what is wrong with it."""

    routers: tuple[Router, ...] = ()
    hosts: tuple[Host, ...] = ()

    def __post_init__(self) -> None:
        names = [member.name for member in self.members]
        for name in names:
            if not _NAME.fullmatch(name) or name == INTERNET or names.count(name) > 1:
                raise ValueError(f"name {name!r}: up to ten of a-z, 0-9 and -, used once")
        if len(names) > MAX_MEMBERS:
            raise ValueError(f"more than {MAX_MEMBERS} hosts and routers")
        known: dict[str, Family] = {INTERNET: Family.DUAL}
        for member in self.members:
            family = known.get(member.at)
            if family is None:
                raise ValueError(f"{member.name} is at {member.at!r}, which is no router before it")
            if family is not Family.DUAL and family is not member.family:
                raise ValueError(f"{member.name} speaks {member.family}, {member.at} only {family}")
            if isinstance(member, Router):
                known[member.name] = member.family
                if member.nat.kind is NatKind.OPEN:
                    raise ValueError(f"{member.name}: an open host has no router")

    @property
    def members(self) -> tuple[Host | Router, ...]:
        """Routers, then hosts."""
        return (*self.routers, *self.hosts)

    def host(self, name: str) -> Host:
        """The host of that name. Raises KeyError if there is none."""
        return {host.name: host for host in self.hosts}[name]

    def routers_above(self, at: str) -> tuple[Router, ...]:
        """The routers between a network and the internet, innermost first."""
        by_name = {router.name: router for router in self.routers}
        above: list[Router] = []
        while at != INTERNET:
            above.append(by_name[at])
            at = by_name[at].at
        return tuple(above)

    def expected(self, at: str) -> tuple[NatKind | None, NatKind]:
        """What a probe on a network must find for UDP, None where that is blocked, and for TCP."""
        return seen_through([router.nat for router in self.routers_above(at)])

    def network(self, at: str) -> Network:
        """How a network is numbered."""
        if at == INTERNET:
            return Network(INTERNET_V4, INTERNET_V6)
        number = self._number(at)
        router = self.routers[number - 1]
        has_routers = any(other.at == at for other in self.routers)
        # RFC 6598: what a carrier numbers its customers with.
        own = f"100.64.{number}.0/24" if has_routers else f"192.168.{number}.0/24"
        v6 = IPv6Network((int(INTERNET_V6[0]) + (number << 64), 64))
        return Network(router.lan or IPv4Network(own), v6)

    def addresses(self, name: str, at: str) -> Addresses:
        """What a member has, or would have, on a network. Raises KeyError if there is none."""
        member = {member.name: member for member in self.members}[name]
        network = self.network(at)
        offset = self._number(name)
        if at == INTERNET:  # 11.22.1.x are routers, 11.22.2.x hosts
            offset += 0x100 if isinstance(member, Router) else 0x200
        elif isinstance(member, Host):
            offset += len(self.routers)
        return Addresses(
            network.v4[1 + offset] if member.family.has_v4 else None,
            network.v6[1 + offset] if member.family.has_v6 else None,
        )

    def _number(self, name: str) -> int:
        """The place of a router among routers or of a host among hosts, from 1."""
        names: list[list[str]] = [
            [router.name for router in self.routers],
            [host.name for host in self.hosts],
        ]
        sort = names[0] if name in names[0] else names[1]
        return sort.index(name) + 1
