"""Addresses, and the budget a stranger has."""

from __future__ import annotations

import ipaddress

import pytest

from covey.transport.addresses import format_address, parse_address, reachable_hosts
from covey.transport.listener import BUDGET, BUDGET_PER_S, MAX_TRACKED, AddressBudget


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("192.0.2.1:4000", ("192.0.2.1", 4000)),
        ("[2001:db8::1]:65535", ("2001:db8::1", 65535)),
        ("pi.example.org:1", ("pi.example.org", 1)),
    ],
)
def test_an_address_survives(text: str, parsed: tuple[str, int]) -> None:
    assert parse_address(text) == parsed
    assert format_address(*parsed) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "192.0.2.1",
        "192.0.2.1:",
        "192.0.2.1:0",
        "192.0.2.1:65536",
        "192.0.2.1:4000000000000000",
        "192.0.2.1:-1",
        "192.0.2.1:²",
        ":4000",
        "[::1:4000",
        "[nonsense]:4000",
        "2001:db8::1:4000",
        "a b:4000",
        "-:4000",
        "x" * 300 + ":4000",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_address(text)


def test_a_wildcard_stands_for_addresses_that_mean_this_machine_elsewhere() -> None:
    assert reachable_hosts("10.1.2.3") == ["10.1.2.3"]
    assert reachable_hosts("127.0.0.1") == ["127.0.0.1"]
    for host in (*reachable_hosts("0.0.0.0"), *reachable_hosts("::")):  # noqa: S104
        address = ipaddress.ip_address(host)
        assert not address.is_loopback
        assert not address.is_link_local
        assert not address.is_unspecified


def test_failures_run_out_and_are_forgiven_with_time() -> None:
    budget = AddressBudget()
    assert all(budget.take("a", now=0.0) for _ in range(BUDGET))
    assert not budget.take("a", now=0.0)
    assert budget.take("b", now=0.0)
    assert budget.take("a", now=1 / BUDGET_PER_S)
    assert not budget.take("a", now=1 / BUDGET_PER_S)


def test_members_never_run_out() -> None:
    budget = AddressBudget()
    for _ in range(10 * BUDGET):
        assert budget.take("a", now=0.0)
        budget.give_back("a", now=0.0)


def test_the_budget_forgets_addresses_rather_than_grow() -> None:
    budget = AddressBudget()
    for n in range(2 * MAX_TRACKED):
        budget.take(str(n), now=0.0)
    assert len(budget._buckets) == MAX_TRACKED


def test_all_addresses_of_an_ipv6_network_are_one_source() -> None:
    budget = AddressBudget()
    for n in range(BUDGET):
        assert budget.take(f"2001:db8::{n:x}", now=0.0)
    assert not budget.take("2001:db8::ffff:1", now=0.0)
    assert budget.take("2001:db8:0:1::1", now=0.0)
    budget.give_back("2001:db8::7", now=0.0)
    assert budget.take("2001:db8::8", now=0.0)
    assert budget.take("fe80::1%eth0", now=0.0)
