"""What routers do to packets: the kinds of NAT, and the nftables rules that make each of them.

Words of RFC 4787: a *mapping* is the outer port that an inner one gets, *filtering* decides who
may send to it. A kind is two answers: on what the mapping depends, and on what the filtering does.
Pure text: loading it is `testbed.lab`'s business, proving it `testbed.probe`'s.

All rules stand in one table, `inet router`. Whatever kind, packets that nobody asked for are
dropped on arrival. Were they accepted, a stranger's packet to the router itself would become a
tracked connection and take the very outer port that our own packet to that stranger needs.
Routers do not hairpin: a packet from inside to their outer address gets nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum

TABLE = "router"
WAN, LAN = "wan0", "lan0"  # a router's interfaces
MAPPING_S = 300  # how long an unused mapping of a cone lives


class Scope(IntEnum):
    """On how much of the other end's address a mapping or a filter depends."""

    INDEPENDENT = 0
    ADDRESS = 1
    ADDRESS_AND_PORT = 2


class NatKind(StrEnum):
    """The classic kinds (RFC 3489, section 5), the easiest to get through first."""

    OPEN = "open"  # no translation and no filter
    FULL_CONE = "full cone"
    ADDRESS_RESTRICTED = "address-restricted"
    PORT_RESTRICTED = "port-restricted"
    SYMMETRIC = "symmetric"

    @property
    def strictness(self) -> int:
        """A number that grows with how little gets through."""
        return list(NatKind).index(self)

    @property
    def is_cone(self) -> bool:
        """Whether one outer port serves more than the one who was sent to."""
        return self in (NatKind.FULL_CONE, NatKind.ADDRESS_RESTRICTED)


@dataclass(frozen=True, slots=True)
class Nat:
    """One router's NAT.

    `cone_for_tcp`: cones treat TCP as they treat UDP; many real routers are cones for UDP only,
    and port-restricted for TCP. `blocks_udp`: a firewall that lets no UDP out, as some offices do.
    """

    kind: NatKind
    cone_for_tcp: bool = True
    blocks_udp: bool = False

    @property
    def tcp_kind(self) -> NatKind:
        """What it is for TCP."""
        if self.kind.is_cone and not self.cone_for_tcp:
            return NatKind.PORT_RESTRICTED
        return self.kind

    @property
    def udp_kind(self) -> NatKind | None:
        """What it is for UDP; None if none gets through."""
        return None if self.blocks_udp else self.kind

    def __str__(self) -> str:
        """As it stands in tables."""
        flavour = ", cone for UDP only" if self.tcp_kind is not self.kind else ""
        return f"{self.kind}{flavour}{', no UDP' if self.blocks_udp else ''}"


def seen_through(nats: Sequence[Nat]) -> tuple[NatKind | None, NatKind]:
    """What a host behind several routers in a row is, for UDP and for TCP: the strictest of them.

    UDP is None where one of them blocks it; with no router at all the host is open.
    """
    udp_kinds = [nat.udp_kind for nat in nats]
    udp = None if None in udp_kinds else _strictest([kind for kind in udp_kinds if kind])
    return udp, _strictest([nat.tcp_kind for nat in nats])


def kind_of(mapping: Scope, filtering: Scope, *, is_translated: bool) -> NatKind | None:
    """The kind with these two answers; None for a combination that has no name here."""
    if mapping is not Scope.INDEPENDENT:
        return NatKind.SYMMETRIC if filtering is Scope.ADDRESS_AND_PORT else None
    if not is_translated:
        return NatKind.OPEN if filtering is Scope.INDEPENDENT else None
    return (NatKind.FULL_CONE, NatKind.ADDRESS_RESTRICTED, NatKind.PORT_RESTRICTED)[filtering]


def rules(nat: Nat, *, has_upnp: bool = False) -> str:
    """What to feed to `nft -f -` in a router; replaces all it had, mappings of cones included.

    Args:
        nat: any but an open one.
        has_upnp: leave room for the chains that miniupnpd fills.
    """
    if nat.kind is NatKind.OPEN:
        raise ValueError("a host without NAT has no router: put it on the internet itself")
    cone = _cone(nat) if nat.kind.is_cone else ""
    random = " fully-random" if nat.kind is NatKind.SYMMETRIC else ""
    return f"""flush ruleset
table inet {TABLE} {{
{cone}{_UPNP_CHAINS if has_upnp else ""}
  chain translating {{ type nat hook postrouting priority srcnat; policy accept;
    {"jump postrouting_miniupnpd" if has_upnp else ""}
    oifname "{WAN}" meta nfproto ipv4 masquerade{random}
  }}
  chain delivering {{ type filter hook input priority filter; policy accept;
    iifname "{WAN}" ct state new drop
  }}
  chain forwarding {{ type filter hook forward priority filter; policy accept;
    {"meta l4proto udp drop" if nat.blocks_udp else ""}
    iifname "{WAN}" ct state established,related accept
    iifname "{WAN}" ct status dnat accept
    {"jump miniupnpd" if has_upnp else ""}
    iifname "{WAN}" drop
  }}
}}
"""


def _strictest(kinds: Sequence[NatKind]) -> NatKind:
    return max(kinds, key=lambda kind: kind.strictness, default=NatKind.OPEN)


def _cone(nat: Nat) -> str:
    """Remember who inside has which outer port, and send there what may come in.

    Both are kept by outer port, after translation, so that two hosts which use one inner port do
    not get each other's packets. `th` is the port of either protocol.
    """
    protocols = "{ tcp, udp }" if nat.cone_for_tcp else "udp"
    out = f'oifname "{WAN}" meta nfproto ipv4 meta l4proto {protocols}'
    into = f'iifname "{WAN}" meta nfproto ipv4 meta l4proto {protocols}'
    life = f"timeout {MAPPING_S}s"
    kept = f"flags dynamic,timeout; {life}; size 65536;"
    contacted = remember = allowed = ""
    if nat.kind is NatKind.ADDRESS_RESTRICTED:
        contacted = f"  set contacted {{ type inet_proto . inet_service . ipv4_addr; {kept} }}\n"
        remember = f"{out} update @contacted {{ meta l4proto . th sport . ip daddr {life} }}"
        allowed = "meta l4proto . th dport . ip saddr @contacted "
    return f"""{contacted}
  map inside {{ type inet_proto . inet_service : ipv4_addr . inet_service; {kept} }}
  chain arriving {{ type nat hook prerouting priority dstnat; policy accept;
    {into} {allowed}dnat ip to meta l4proto . th dport map @inside
  }}
  chain leaving {{ type filter hook postrouting priority srcnat + 10; policy accept;
    {remember}
    {out} ct direction original update @inside {{ \
meta l4proto . th sport {life} : ct original ip saddr . ct original proto-src }}
    {out} ct direction reply update @inside {{ \
meta l4proto . th sport {life} : ct reply ip saddr . ct reply proto-src }}
  }}
"""


_UPNP_CHAINS = """
  chain miniupnpd { }
  chain prerouting_miniupnpd { }
  chain postrouting_miniupnpd { }
  chain redirecting { type nat hook prerouting priority dstnat - 10; policy accept;
    jump prerouting_miniupnpd
  }
"""
