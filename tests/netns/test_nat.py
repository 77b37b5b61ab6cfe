"""Every router of the lab is what it says, before any other test may rely on one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed.lab import Lab
from testbed.labs.nat import gallery
from testbed.links import both_ways
from testbed.namespaces import LabBroken
from testbed.nat import WAN, Nat, NatKind, rules
from testbed.probe import ANSWER_S
from testbed.topology import Host, Router, Topology

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(180)]

PORT_RESTRICTED = Nat(NatKind.PORT_RESTRICTED)


@pytest.fixture(scope="module")
def pair(inside: Path) -> Iterator[Lab]:
    """Two hosts behind one router."""
    hosts = (Host(name="left", at="home"), Host(name="right", at="home"), Host(name="public"))
    with Lab(Topology(routers=(Router(name="home", nat=PORT_RESTRICTED),), hosts=hosts)) as lab:
        yield lab


def test_every_kind_of_nat_is_proved(inside: Path) -> None:
    with Lab(gallery()) as lab:
        found = lab.prove()
    assert found["h0"] == (NatKind.FULL_CONE, NatKind.FULL_CONE)
    assert found["h1"] == (NatKind.FULL_CONE, NatKind.PORT_RESTRICTED)
    assert found["h2"] == (NatKind.ADDRESS_RESTRICTED, NatKind.ADDRESS_RESTRICTED)
    assert found["h3"] == (NatKind.ADDRESS_RESTRICTED, NatKind.PORT_RESTRICTED)
    assert found["h4"] == (NatKind.PORT_RESTRICTED, NatKind.PORT_RESTRICTED)
    assert found["h5"] == (NatKind.SYMMETRIC, NatKind.SYMMETRIC)
    assert found["open"] == (NatKind.OPEN, NatKind.OPEN)
    assert found["mobile"] == (NatKind.PORT_RESTRICTED, NatKind.PORT_RESTRICTED)  # two routers
    assert found["clerk"] == (None, NatKind.PORT_RESTRICTED)  # its firewall lets no UDP out


def test_a_nat_is_proved_at_the_end_of_a_long_cable(inside: Path) -> None:
    link = both_ways(delay_ms=ANSWER_S * 1e3 / 2 + 10)  # longer than a probe would wait elsewhere
    router = Router(name="home", nat=Nat(NatKind.FULL_CONE), link=link)
    with Lab(Topology(routers=(router,), hosts=(Host(name="hut", at="home"),))) as lab:
        assert lab.prove() == {"hut": (NatKind.FULL_CONE, NatKind.FULL_CONE)}


def test_two_hosts_behind_one_router_are_told_apart(pair: Lab) -> None:
    found = pair.prove(["left", "right"])
    assert set(found.values()) == {(NatKind.PORT_RESTRICTED, NatKind.PORT_RESTRICTED)}


@pytest.mark.parametrize("kind", [NatKind.FULL_CONE, NatKind.SYMMETRIC])
def test_a_router_may_change_its_kind(pair: Lab, kind: NatKind) -> None:
    pair.set_nat("home", Nat(kind))
    assert pair.prove(["left"]) == {"left": (kind, kind)}
    pair.set_nat("home", PORT_RESTRICTED)


def test_a_router_that_does_something_else_breaks_the_lab(pair: Lab) -> None:
    pair.machines["home"].run("nft", "-f", "-", stdin=rules(Nat(NatKind.SYMMETRIC)))
    with pytest.raises(LabBroken, match="left should be port-restricted"):
        pair.prove(["left"])
    assert pair.prove(["left"])  # a failed proof leaves the router as it was declared


def test_a_router_s_outer_interface_is_not_in_the_lan(pair: Lab) -> None:
    assert f"{WAN}:" not in pair.machines["left"].links()
