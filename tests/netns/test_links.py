"""Cables do what they are told, and go on doing it after a fault is over."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed.faults import Cut, Flap, Move, Partition, RestartRouter, Slow
from testbed.lab import Lab
from testbed.links import both_ways
from testbed.nat import Nat, NatKind
from testbed.topology import Host, Router, Topology
from testbed.traffic import rate_mbit_per_s, rtts_ms

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(180)]

N_PINGS = 8


@pytest.fixture(scope="module")
def lab(inside: Path) -> Iterator[Lab]:
    """A host on a slow cable, two on plain ones, and two homes."""
    nat = Nat(NatKind.PORT_RESTRICTED)
    routers = (Router(name="home", nat=nat), Router(name="cafe", nat=nat))
    hosts = (
        Host(name="slow", link=both_ways(delay_ms=20)),
        Host(name="fast"),
        Host(name="third"),
        Host(name="laptop", at="home"),
    )
    with Lab(Topology(routers=routers, hosts=hosts)) as built:
        yield built


def none_comes(lab: Lab, a: str, b: str) -> bool:
    return not rtts_ms(lab, a, b, n=N_PINGS, timeout_s=0.15)


def all_come(lab: Lab, a: str, b: str) -> bool:
    return len(rtts_ms(lab, a, b, n=N_PINGS)) == N_PINGS


def least_ms(lab: Lab) -> float:
    """On a busy machine packets wait for a core besides; never all of them."""
    return min(rtts_ms(lab, "slow", "fast"))


def test_a_cable_delays_both_ways(lab: Lab) -> None:
    assert 40 <= least_ms(lab) < 43  # 1 ms + 5 %


def test_a_cable_changes_while_running(lab: Lab) -> None:
    mend = Slow("slow", both_ways(delay_ms=50)).strike(lab)
    assert 100 <= least_ms(lab) < 106
    mend()
    assert 40 <= least_ms(lab) < 43


def test_jitter_spreads_round_trips(lab: Lab) -> None:
    mend = Slow("slow", both_ways(delay_ms=20, jitter_ms=3)).strike(lab)
    found = rtts_ms(lab, "slow", "fast", n=60, spacing_s=0.015)
    mend()
    assert statistics.stdev(found) > 2  # 3 ms each way are 4.2 there and back
    assert min(found) < 39


def test_loss_loses_its_share(lab: Lab) -> None:
    mend = Slow("slow", both_ways(delay_ms=1, loss=0.2)).strike(lab)
    found = rtts_ms(lab, "slow", "fast", n=400, spacing_s=0.001, timeout_s=0.4)
    mend()
    assert 0.55 < len(found) / 400 < 0.73  # 0.8 there and 0.8 back


def test_a_rate_is_kept(lab: Lab) -> None:
    mend = Slow("slow", both_ways(mbit_per_s=10)).strike(lab)
    found = rate_mbit_per_s(lab, "slow", "fast", expected=10, seconds=0.7)
    mend()
    assert found == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("member", ["slow", "fast"])
def test_a_cut_cable_carries_nothing_until_it_is_mended(lab: Lab, member: str) -> None:
    mend = Cut(member).strike(lab)
    assert none_comes(lab, "fast", "slow")
    mend()
    assert all_come(lab, "fast", "slow")


def test_one_way_can_be_cut_alone(lab: Lab) -> None:
    mend = Cut("fast", "down").strike(lab)
    assert none_comes(lab, "third", "fast")
    assert all_come(lab, "third", "slow")
    mend()


def test_a_partition_keeps_groups_apart_and_nobody_else(lab: Lab) -> None:
    heal = Partition(("slow",), ("fast",)).strike(lab)
    assert none_comes(lab, "slow", "fast")
    assert all_come(lab, "third", "fast")
    heal()
    assert all_come(lab, "slow", "fast")


def test_a_flapping_cable_ends_mended(lab: Lab) -> None:
    Flap("fast", n_times=2, cut_s=0.02, mended_s=0.02).strike(lab)
    assert all_come(lab, "third", "fast")


def test_a_host_moves_to_another_network_and_back(lab: Lab) -> None:
    home = lab.address("laptop")
    go_back = Move("laptop", "cafe").strike(lab)
    assert lab.address("laptop").split(".")[2] != home.split(".")[2]
    assert all_come(lab, "laptop", "fast")
    go_back()
    assert lab.address("laptop") == home
    assert all_come(lab, "laptop", "fast")


def test_a_restarted_router_has_forgotten_its_connections(lab: Lab) -> None:
    assert all_come(lab, "laptop", "fast")
    assert "dport=9000" in lab.machines["home"].run("conntrack", "-L")
    RestartRouter("home").strike(lab)
    assert "dport=9000" not in lab.machines["home"].run("conntrack", "-L")
