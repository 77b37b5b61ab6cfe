"""What a node tells others about where it can be dialled."""

from __future__ import annotations

import ipaddress

import pytest

from covey.transport.control_listen import dialable


@pytest.mark.parametrize("address", ["/ip4/192.168.1.7/tcp/7071", "/ip6/fd00::7/tcp/7071"])
def test_an_address_of_its_own_is_told_as_it_is(address: str) -> None:
    assert dialable(address) == [address]


def test_any_address_becomes_those_of_the_interfaces() -> None:
    told = dialable("/ip4/0.0.0.0/tcp/7071")
    assert told
    for address in told:
        _, protocol, host, rest = address.split("/", 3)
        assert (protocol, rest) == ("ip4", "tcp/7071")
        assert not ipaddress.ip_address(host).is_unspecified
