"""Real routers in the lab: members name each kind of NAT right, and ports are opened."""

from __future__ import annotations

from pathlib import Path

import pytest
from testbed.lab import Lab

from support import nat_lab
from support.nat_lab import Said

pytestmark = [pytest.mark.netns, pytest.mark.lab, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def said(inside: Path) -> Said:
    """What every host found out."""
    with Lab(nat_lab.topology()) as lab:
        lab.prove()
        return nat_lab.run(lab)


@pytest.mark.parametrize(
    ("host", "udp", "tcp"),
    [
        ("open", "open", "open"),
        ("cone", "full_cone", "full_cone"),
        ("conu", "full_cone", "port_restricted"),
        ("addr", "address_restricted", "address_restricted"),
        ("port", "port_restricted", "port_restricted"),
        ("sym", "symmetric", "symmetric"),
        ("office", "blocked", "port_restricted"),
        ("mobile", "port_restricted", "port_restricted"),  # two routers in a row
        ("sym, one observer", "symmetric", "symmetric"),
        ("port, one observer", "port_restricted", "port_restricted"),
    ],
)
def test_two_members_name_the_nat(said: Said, host: str, udp: str, tcp: str) -> None:
    facts = said[host]["facts"]
    assert (facts["udp"], facts["tcp"]) == (udp, tcp), said[host]["steps"]
    assert facts["n_observers"] == (1 if "one observer" in host else 2)
    assert facts["is_reachable"] == (host == "open") == bool(facts["reachable_hosts"])
    assert len(facts["public_hosts"]) == 1


def test_a_public_member_that_dialled_us_can_judge_as_well(said: Said) -> None:
    facts = said["first, dialled by second"]["facts"]
    assert (facts["n_observers"], facts["is_reachable"]) == (1, True)
    assert facts["udp"] == facts["tcp"] == "address_restricted"  # what one alone can tell


@pytest.mark.parametrize("host", ["upnp", "upnp only"])
def test_a_router_opens_the_port_and_it_is_reached(said: Said, host: str) -> None:
    facts = said[host]["facts"]
    (public_host,) = facts["public_hosts"]
    assert facts["mapped_addresses"] == [f"{public_host}:4000"]


def test_two_machines_of_a_home_get_a_port_each(said: Said) -> None:
    facts = said["lodger"]["facts"]
    (address,) = facts["mapped_addresses"]
    assert address.startswith(facts["public_hosts"][0])
    assert address not in said["upnp"]["facts"]["mapped_addresses"]


@pytest.mark.parametrize("host", ["upnp again", "upnp only, again"])
def test_a_mapped_port_is_given_back_at_the_end(said: Said, host: str) -> None:
    facts = said[host]["facts"]
    assert not facts["is_reachable"]
    assert facts["mapped_addresses"] == []


def test_a_mapping_behind_a_carriers_router_is_not_announced(said: Said) -> None:
    assert said["mobile"]["facts"]["mapped_addresses"] == []
    assert "no public address" in said["mobile"]["mapping"]


def test_a_firewall_without_translation_is_seen_as_a_filter(said: Said) -> None:
    facts = said["six"]["facts"]
    assert (facts["udp"], facts["tcp"]) == ("port_restricted", "port_restricted")
    assert set(facts["public_hosts"]) <= set(facts["lan_hosts"])


def test_a_host_that_moves_notices_and_finds_out_anew(said: Said) -> None:
    kinds = [said[when]["facts"]["udp"] for when in ("before the walk", "after the walk")]
    assert kinds == ["port_restricted", "symmetric"]
    on_the_way = said["on the way"]["facts"]
    assert on_the_way["udp"] == "unknown"
    assert on_the_way["lan_hosts"] == said["after the walk"]["facts"]["lan_hosts"]
