"""Kinds of NAT: how they add up, what they are called, and that rules exist for each."""

from __future__ import annotations

import pytest
from testbed.nat import Nat, NatKind, Scope, kind_of, rules, seen_through

CONE = Nat(NatKind.FULL_CONE)
UDP_CONE = Nat(NatKind.FULL_CONE, cone_for_tcp=False)
PORT = Nat(NatKind.PORT_RESTRICTED)


def test_a_cone_for_udp_only_is_port_restricted_for_tcp() -> None:
    assert (UDP_CONE.udp_kind, UDP_CONE.tcp_kind) == (NatKind.FULL_CONE, NatKind.PORT_RESTRICTED)
    assert "cone for UDP only" in str(UDP_CONE)


def test_a_symmetric_router_has_but_one_flavour() -> None:
    nat = Nat(NatKind.SYMMETRIC, cone_for_tcp=False)
    assert nat.tcp_kind is NatKind.SYMMETRIC
    assert str(nat) == "symmetric"


def test_a_host_without_router_is_open() -> None:
    assert seen_through([]) == (NatKind.OPEN, NatKind.OPEN)


def test_of_two_routers_in_a_row_the_stricter_one_shows() -> None:
    assert seen_through([CONE, PORT]) == (NatKind.PORT_RESTRICTED, NatKind.PORT_RESTRICTED)


def test_one_firewall_in_a_row_blocks_udp() -> None:
    blocks = Nat(NatKind.FULL_CONE, blocks_udp=True)
    assert seen_through([CONE, blocks]) == (None, NatKind.FULL_CONE)


@pytest.mark.parametrize(
    ("mapping", "filtering", "is_translated", "kind"),
    [
        (Scope.INDEPENDENT, Scope.INDEPENDENT, False, NatKind.OPEN),
        (Scope.INDEPENDENT, Scope.INDEPENDENT, True, NatKind.FULL_CONE),
        (Scope.INDEPENDENT, Scope.ADDRESS, True, NatKind.ADDRESS_RESTRICTED),
        (Scope.INDEPENDENT, Scope.ADDRESS_AND_PORT, True, NatKind.PORT_RESTRICTED),
        (Scope.ADDRESS_AND_PORT, Scope.ADDRESS_AND_PORT, True, NatKind.SYMMETRIC),
        (Scope.INDEPENDENT, Scope.ADDRESS_AND_PORT, False, None),  # a firewall
        (Scope.ADDRESS, Scope.INDEPENDENT, True, None),
    ],
)
def test_two_answers_name_a_kind(
    mapping: Scope, filtering: Scope, is_translated: bool, kind: NatKind | None
) -> None:
    assert kind_of(mapping, filtering, is_translated=is_translated) is kind


@pytest.mark.parametrize("kind", [kind for kind in NatKind if kind is not NatKind.OPEN])
@pytest.mark.parametrize("cone_for_tcp", [True, False])
def test_every_router_drops_what_nobody_asked_for(kind: NatKind, cone_for_tcp: bool) -> None:
    text = rules(Nat(kind, cone_for_tcp=cone_for_tcp))
    assert 'iifname "wan0" ct state new drop' in text  # towards itself
    assert text.rindex('iifname "wan0" drop') > text.rindex("accept")  # towards those inside
    assert text.count("{") == text.count("}")


def test_only_an_address_restricted_router_remembers_whom_it_contacted() -> None:
    assert "set contacted" in rules(Nat(NatKind.ADDRESS_RESTRICTED))
    assert "set contacted" not in rules(CONE)


def test_a_cone_for_udp_only_leaves_tcp_alone() -> None:
    assert "{ tcp, udp }" in rules(CONE)
    assert "tcp" not in rules(UDP_CONE)


def test_there_is_no_router_without_nat() -> None:
    with pytest.raises(ValueError, match="internet itself"):
        rules(Nat(NatKind.OPEN))
