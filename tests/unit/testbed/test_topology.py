"""Topologies: what can be, how it is numbered, and what a probe must find in it."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest
from testbed.nat import Nat, NatKind
from testbed.topology import INTERNET, Family, Host, Router, Topology

PORT = Nat(NatKind.PORT_RESTRICTED)
CARRIER = Topology(
    routers=(
        Router(name="carrier", nat=PORT),
        Router(name="home", at="carrier", nat=Nat(NatKind.FULL_CONE)),
    ),
    hosts=(Host(name="pc", at="home"), Host(name="public")),
)


def test_a_carrier_numbers_its_customers_from_the_shared_range() -> None:
    assert CARRIER.network("carrier").v4.subnet_of(IPv4Network("100.64.0.0/10"))  # RFC 6598
    assert CARRIER.network("home").v4.subnet_of(IPv4Network("192.168.0.0/16"))
    assert CARRIER.addresses("home", "carrier").v4 in CARRIER.network("carrier").v4


def test_the_internet_s_addresses_look_public() -> None:
    for name in ("carrier", "public"):
        address = CARRIER.addresses(name, INTERNET).v4
        assert isinstance(address, IPv4Address)
        assert address.is_global


def test_a_probe_must_find_the_strictest_router_on_the_way() -> None:
    kind = NatKind.PORT_RESTRICTED
    assert CARRIER.expected("home") == (kind, kind)
    assert CARRIER.expected(INTERNET) == (NatKind.OPEN, NatKind.OPEN)
    assert [router.name for router in CARRIER.routers_above("home")] == ["home", "carrier"]


def test_two_homes_may_be_numbered_alike() -> None:
    lan = IPv4Network("192.168.1.0/24")
    routers = tuple(Router(name=name, nat=PORT, lan=lan) for name in ("left", "right"))
    topology = Topology(routers=routers)
    assert topology.network("left").v4 == topology.network("right").v4
    assert topology.network("left").v6 != topology.network("right").v6


def test_a_host_has_addresses_of_its_families_only() -> None:
    router = Router(name="r", nat=PORT, family=Family.DUAL)
    hosts = tuple(Host(name=family.value, at="r", family=family) for family in Family)
    topology = Topology(routers=(router,), hosts=hosts)
    has = {host.name: topology.addresses(host.name, "r") for host in hosts}
    assert has["v4"].v6 is None
    assert has["v6"].v4 is None
    assert None not in (has["dual"].v4, has["dual"].v6)


@pytest.mark.parametrize(
    ("hosts", "routers", "why"),
    [
        ((Host(name="a"), Host(name="a")), (), "used once"),
        ((Host(name="much-too-long"),), (), "up to ten"),
        ((Host(name="internet"),), (), "used once"),
        ((Host(name="a", at="nowhere"),), (), "no router before it"),
        ((Host(name="a", at="r", family=Family.V6),), (Router(name="r", nat=PORT),), "speaks v6"),
        ((), (Router(name="r", nat=Nat(NatKind.OPEN)),), "has no router"),
        ((), (Router(name="r", nat=PORT, at="s"), Router(name="s", nat=PORT)), "no router before"),
        (tuple(Host(name=f"h{idx}") for idx in range(251)), (), "more than 250"),
    ],
)
def test_what_cannot_be_is_refused(
    hosts: tuple[Host, ...], routers: tuple[Router, ...], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        Topology(hosts=hosts, routers=routers)
