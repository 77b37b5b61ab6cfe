"""What a person is told of the NAT, and to do about it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from covey.transport.nat.explain import explain
from covey.transport.nat.facts import NatFacts, NatKind

HOME = NatFacts(
    udp=NatKind.PORT_RESTRICTED,
    tcp=NatKind.PORT_RESTRICTED,
    port=4000,
    public_hosts=("11.0.9.9",),
    lan_hosts=("192.168.1.2", "2400:c0de::5"),
    n_observers=2,
    measured_at=0.0,
)
REFUSED = "NAT-PMP: the router does not answer; UPnP: no router answers"


def told(facts: NatFacts, *, claimed: str | None = None, reason: str = "") -> str:
    findings = explain(facts, claimed_address=claimed, mapping_reason=reason)
    return "\n".join(f"{finding.says} -> {finding.advice}" for finding in findings)


def test_a_closed_port_comes_with_what_to_forward_where() -> None:
    text = told(HOME, reason=REFUSED)
    assert "11.0.9.9" in text
    assert "Forward TCP port 4000 in the router to 192.168.1.2:4000" in text
    assert "Switch on UPnP" in text
    assert "no router answers" in text


def test_where_all_is_well_there_is_nothing_to_do() -> None:
    facts = replace(HOME, is_reachable=True, tcp=NatKind.OPEN, udp=NatKind.OPEN)
    findings = explain(facts, claimed_address=None, mapping_reason=REFUSED)
    assert [finding.advice for finding in findings] == ["", "", ""]


def test_a_mapped_port_is_named() -> None:
    text = told(replace(HOME, mapped_addresses=("11.0.9.9:4001",)), claimed="11.0.9.9:4001")
    assert "opened 11.0.9.9:4001" in text
    assert "Forward" not in text


def test_a_mapping_that_nobody_gets_through_hints_at_a_second_router() -> None:
    assert "second router" in told(HOME, claimed="11.0.9.9:4000")


def test_a_carriers_nat_is_said_to_be_the_providers() -> None:
    reason = "UPnP: the router has no public address itself"
    assert "Ask the provider" in told(HOME, reason=reason)


def test_a_firewall_on_a_public_machine_is_named() -> None:
    facts = replace(HOME, lan_hosts=("11.0.9.9",))
    assert "Allow TCP port 4000 in this machine's firewall" in told(facts)


def test_nobody_to_ask_is_said_so() -> None:
    facts = replace(HOME, n_observers=0, public_hosts=(), tcp=NatKind.UNKNOWN, udp=NatKind.UNKNOWN)
    assert "nobody can say" in told(facts)
    assert "nobody has tried it" in told(facts, claimed="11.0.9.9:4000")


def test_a_node_of_this_machine_only_is_told_so_and_nothing_else() -> None:
    facts = replace(HOME, lan_hosts=("127.0.0.1", "::1"), public_hosts=())
    (finding,) = explain(facts, claimed_address=None, mapping_reason="")
    assert "this machine only" in finding.says


@pytest.mark.parametrize("kind", [kind for kind in NatKind if kind is not NatKind.UNKNOWN])
def test_every_kind_of_udp_has_its_words(kind: NatKind) -> None:
    assert "UDP" in told(replace(HOME, udp=kind))
