"""What kind of NAT is in the way: the words, the facts, and how evidence becomes a fact.

Pure. The tests are those of RFC 5780: from one socket, how do several observers see it (mapping),
and who gets a packet through to it unasked (filtering). What could not be tested is never guessed
to the better: a filter is taken for the strictest, a mapping for unknown.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from covey.transport.addresses import parse_address
from covey.transport.messages import NatCard

MAX_HOSTS = 4
MAX_LAN_HOSTS = 16
MAX_OBSERVERS = 3

Endpoint = tuple[str, int]  # IP address, port

# Addresses that lead nowhere from outside. Python's `is_private` has documentation ranges too,
# which play the internet in our lab.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "224.0.0.0/3",
        "::/127",
        "fc00::/7",
        "fe80::/10",
        "ff00::/8",
    )
)


class NatKind(StrEnum):
    """How the outside reaches a socket here, easiest first."""

    OPEN = "open"  # its address is its own, and anyone may send
    FULL_CONE = "full_cone"  # one mapped port, and anyone may send to it
    ADDRESS_RESTRICTED = "address_restricted"  # only hosts it has sent to
    PORT_RESTRICTED = "port_restricted"  # only host and port it has sent to
    SYMMETRIC = "symmetric"  # another mapped port for each destination
    BLOCKED = "blocked"  # nothing gets out and back
    UNKNOWN = "unknown"  # there was nobody to ask

    @property
    def is_predictable(self) -> bool:
        """Whether one observer's sight of a socket's port holds for every other peer."""
        return self in _PREDICTABLE


_PREDICTABLE = frozenset(
    {NatKind.OPEN, NatKind.FULL_CONE, NatKind.ADDRESS_RESTRICTED, NatKind.PORT_RESTRICTED}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NatFacts:
    """What is known of one node at one time."""

    udp: NatKind = NatKind.UNKNOWN
    tcp: NatKind = NatKind.UNKNOWN
    port: int  # the data-plane's listening port
    is_reachable: bool = False  # the listening port answered a member from outside
    reachable_hosts: tuple[str, ...] = ()  # at these; it may be by IPv6 only
    public_hosts: tuple[str, ...] = ()  # as observers see us, IPv4 and IPv6
    mapped_addresses: tuple[str, ...] = ()  # "host:port" at the router, and it answered
    lan_hosts: tuple[str, ...] = ()
    n_observers: int = 0  # members that could judge; with one, kinds are the strictest that fit
    measured_at: float = field(compare=False)  # monotonic seconds

    def to_card(self, *, now: float) -> NatCard:
        """The form that crosses a link."""
        return NatCard(
            udp=self.udp.value,
            tcp=self.tcp.value,
            port=self.port,
            is_reachable=self.is_reachable,
            reachable_hosts=list(self.reachable_hosts[:MAX_HOSTS]),
            public_hosts=list(self.public_hosts[:MAX_HOSTS]),
            mapped_addresses=list(self.mapped_addresses[:MAX_HOSTS]),
            lan_hosts=list(self.lan_hosts[:MAX_LAN_HOSTS]),
            n_observers=self.n_observers,
            age_s=max(0.0, now - self.measured_at),
        )

    @classmethod
    def from_card(cls, card: NatCard, *, now: float) -> NatFacts:
        """What a peer claims of itself; addresses that are none are left out."""
        return cls(
            udp=NatKind(card.udp),
            tcp=NatKind(card.tcp),
            port=card.port,
            is_reachable=card.is_reachable,
            reachable_hosts=tuple(filter(is_public, card.reachable_hosts)),
            public_hosts=tuple(filter(is_public, card.public_hosts)),
            mapped_addresses=tuple(filter(_is_public_address, card.mapped_addresses)),
            lan_hosts=tuple(filter(_is_host, card.lan_hosts)),
            n_observers=card.n_observers,
            measured_at=now - card.age_s,
        )


class Mapping(StrEnum):
    """How a router chooses the outer port of one inner socket (RFC 5780, section 4.3)."""

    NONE = "none"  # there is no router, or it changes nothing
    INDEPENDENT = "independent"  # one port for all destinations
    DEPENDENT = "dependent"  # another for each address, or address and port
    UNKNOWN = "unknown"


class Filtering(StrEnum):
    """Whose packets get in to a mapped port (RFC 5780, section 4.4)."""

    NONE = "none"
    ADDRESS = "address"
    ADDRESS_AND_PORT = "address and port"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Sighting:
    """One observer's sight of a socket of ours."""

    observer: Endpoint
    mapped: Endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was seen of one socket of ours, in one protocol.

    `heard_*` is None where the test could not be made: there was no such observer, or none that
    could send to our mapped address.
    """

    local_port: int
    own_hosts: frozenset[str] = frozenset()
    sightings: tuple[Sighting, ...] = ()
    heard_other_port: bool | None = None  # of a host that we had sent to
    heard_other_host: bool | None = None  # that we had never sent to
    is_blocked: bool = False  # observers that should have answered did not


def mapping_of(evidence: Evidence) -> Mapping:
    """What the sightings say of the router's choice of ports."""
    mapped = {sighting.mapped for sighting in evidence.sightings}
    if len(mapped) > 1:
        return Mapping.DEPENDENT
    if not mapped:
        return Mapping.UNKNOWN
    host, port = next(iter(mapped))
    if host in evidence.own_hosts and port == evidence.local_port:
        return Mapping.NONE
    observers = {sighting.observer for sighting in evidence.sightings}
    return Mapping.INDEPENDENT if len(observers) > 1 else Mapping.UNKNOWN


def filtering_of(evidence: Evidence) -> Filtering:
    """What the packets that came unasked say of the router's filter."""
    if evidence.heard_other_host:
        return Filtering.NONE
    if evidence.heard_other_port:
        return Filtering.ADDRESS
    if evidence.heard_other_port is None:
        return Filtering.UNKNOWN
    return Filtering.ADDRESS_AND_PORT


def classify(evidence: Evidence) -> NatKind:
    """The kind of NAT that one socket's evidence shows; the stricter one in doubt."""
    if evidence.is_blocked:
        return NatKind.BLOCKED
    mapping, filtering = mapping_of(evidence), filtering_of(evidence)
    if mapping is Mapping.UNKNOWN:
        return NatKind.UNKNOWN
    if mapping is Mapping.DEPENDENT:
        return NatKind.SYMMETRIC
    match filtering:
        case Filtering.NONE:
            return NatKind.OPEN if mapping is Mapping.NONE else NatKind.FULL_CONE
        case Filtering.ADDRESS:
            return NatKind.ADDRESS_RESTRICTED
        case _:
            return NatKind.PORT_RESTRICTED


def is_public(host: str) -> bool:
    """Whether an IP address can lead somewhere from outside; False for what is none."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if address.version == 6 and address.ipv4_mapped is not None:
        return False  # written so, it is a way around these checks
    return not any(address in network for network in _NOT_PUBLIC)


def is_near(host: str, own_hosts: Iterable[str]) -> bool:
    """Whether an IPv6 address is in one of our own networks (of 64 bits, RFC 4291).

    IPv6 addresses of a home are all public, yet behind one firewall: a member there gets in where
    nobody else does, and can say nothing of how we look from outside.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if address.version == 4:
        return False
    network = ipaddress.ip_network(f"{host}/64", strict=False)
    return any(":" in own and ipaddress.ip_address(own) in network for own in own_hosts)


def same_family(host: str, others: Sequence[str]) -> tuple[str, ...]:
    """Those of `others` that are IPv6 if `host` is, else those that are IPv4."""
    return tuple(other for other in others if (":" in other) == (":" in host))


def _is_public_address(text: str) -> bool:
    try:
        host, _ = parse_address(text)
    except ValueError:
        return False
    return is_public(host)


def _is_host(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
