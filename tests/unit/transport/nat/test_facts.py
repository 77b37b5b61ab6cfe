"""From evidence to a kind of NAT, and what crosses a link of it."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import msgspec
import pytest

from covey.transport.messages import NatCard, NatKindName
from covey.transport.nat.facts import (
    Evidence,
    Filtering,
    Mapping,
    NatFacts,
    NatKind,
    Sighting,
    classify,
    filtering_of,
    is_near,
    is_public,
    mapping_of,
)

FIRST, FIRST_OTHER, SECOND = ("11.0.0.1", 4000), ("11.0.0.1", 4001), ("11.0.0.2", 4000)
ROUTER = "11.0.9.9"


def evidence(
    *ports: int, host: str = ROUTER, port_heard: bool | None, host_heard: bool | None
) -> Evidence:
    """Seen by the first observer, its other port and the second one, in this order."""
    observers = (FIRST, FIRST_OTHER, SECOND)
    return Evidence(
        local_port=5000,
        own_hosts=frozenset({"192.168.1.2", "11.0.5.5"}),
        sightings=tuple(Sighting(o, (host, p)) for o, p in zip(observers, ports, strict=False)),
        heard_other_port=port_heard,
        heard_other_host=host_heard,
    )


@pytest.mark.parametrize(
    ("seen", "kind"),
    [
        (evidence(5000, 5000, 5000, host="11.0.5.5", port_heard=True, host_heard=True), "open"),
        (evidence(7000, 7000, 7000, port_heard=True, host_heard=True), "full_cone"),
        (evidence(7000, 7000, 7000, port_heard=True, host_heard=False), "address_restricted"),
        (evidence(7000, 7000, 7000, port_heard=False, host_heard=False), "port_restricted"),
        (evidence(7000, 7001, 7002, port_heard=False, host_heard=False), "symmetric"),
        (evidence(7000, 7000, 7002, port_heard=True, host_heard=False), "symmetric"),
        # A firewall without translation, as most homes have for IPv6.
        (
            evidence(5000, 5000, 5000, host="11.0.5.5", port_heard=False, host_heard=False),
            "port_restricted",
        ),
        # One observer: what cannot be tested is taken for the stricter.
        (evidence(7000, 7000, port_heard=True, host_heard=None), "address_restricted"),
        (evidence(7000, 7000, port_heard=False, host_heard=None), "port_restricted"),
        (evidence(7000, 7000, 7000, port_heard=None, host_heard=None), "port_restricted"),
        (evidence(7000, 7001, port_heard=False, host_heard=None), "symmetric"),
        # One sighting says nothing of the mapping, even if the port is kept.
        (evidence(5000, port_heard=True, host_heard=True), "unknown"),
        (evidence(port_heard=None, host_heard=None), "unknown"),
        (replace(evidence(port_heard=None, host_heard=None), is_blocked=True), "blocked"),
    ],
)
def test_evidence_names_the_kind(seen: Evidence, kind: str) -> None:
    assert classify(seen) is NatKind(kind)


def test_mapping_and_filtering_are_judged_apart() -> None:
    seen = evidence(7000, 7000, port_heard=False, host_heard=True)
    assert mapping_of(seen) is Mapping.INDEPENDENT
    assert filtering_of(seen) is Filtering.NONE
    own = evidence(5000, host="11.0.5.5", port_heard=None, host_heard=None)
    assert (mapping_of(own), filtering_of(own)) == (Mapping.NONE, Filtering.UNKNOWN)


def test_two_answers_of_one_observer_are_one_sighting() -> None:
    seen = Evidence(local_port=1, sightings=(Sighting(FIRST, (ROUTER, 7)),) * 2)
    assert mapping_of(seen) is Mapping.UNKNOWN


@pytest.mark.parametrize("kind", NatKind)
def test_only_one_port_for_all_is_predictable(kind: NatKind) -> None:
    expected = kind not in (NatKind.SYMMETRIC, NatKind.BLOCKED, NatKind.UNKNOWN)
    assert kind.is_predictable is expected


def test_every_kind_has_a_name_on_the_wire() -> None:
    assert {kind.value for kind in NatKind} == set(get_args(NatKindName))


FACTS = NatFacts(
    udp=NatKind.FULL_CONE,
    tcp=NatKind.PORT_RESTRICTED,
    port=4000,
    is_reachable=True,
    reachable_hosts=("11.0.9.9",),
    public_hosts=("11.0.9.9", "2400:c0de::9"),
    mapped_addresses=("11.0.9.9:4000",),
    lan_hosts=("192.168.1.2",),
    n_observers=2,
    measured_at=100.0,
)


def test_facts_survive_the_wire_with_their_age() -> None:
    data = msgspec.msgpack.encode(FACTS.to_card(now=130.0))
    card = msgspec.msgpack.decode(data, type=NatCard)
    back = NatFacts.from_card(card, now=1000.0)
    assert back == FACTS
    assert back.measured_at == 970.0


def test_what_a_peer_claims_to_be_public_must_be_able_to_be() -> None:
    card = replace_card(
        public_hosts=["10.1.2.3", ":::", "::ffff:11.0.0.1", "11.0.0.1"],
        mapped_addresses=["192.168.0.1:80", "example.org:80", "nonsense", "11.0.0.1:80"],
        lan_hosts=["192.168.1.2", "..."],
    )
    facts = NatFacts.from_card(card, now=0.0)
    assert facts.public_hosts == ("11.0.0.1",)
    assert facts.mapped_addresses == ("11.0.0.1:80",)
    assert facts.lan_hosts == ("192.168.1.2",)


@pytest.mark.parametrize(
    "change",
    [
        {"public_hosts": ["11.0.0.1"] * 5},
        {"lan_hosts": ["x" * 45]},
        {"lan_hosts": ["1" * 46]},
        {"mapped_addresses": ["1" * 300]},
        {"port": 0},
        {"udp": "friendly"},
        {"age_s": -1.0},
        {"n_observers": 17},
    ],
)
def test_a_card_beyond_its_bounds_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        replace_card(**change)


def replace_card(**change: object) -> NatCard:
    built = msgspec.to_builtins(FACTS.to_card(now=130.0))
    return msgspec.convert({**built, **change}, NatCard)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("11.22.0.1", True),
        ("203.0.113.5", True),  # plays the internet in labs
        ("2400:c0de::1", True),
        ("10.0.0.1", False),
        ("100.64.0.1", False),
        ("192.168.1.1", False),
        ("127.0.0.1", False),
        ("169.254.1.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("0.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:11.22.0.1", False),
        ("example.org", False),
        ("", False),
    ],
)
def test_what_can_be_reached_from_outside(host: str, expected: bool) -> None:
    assert is_public(host) is expected


def test_a_member_in_our_own_ipv6_network_is_near() -> None:
    own = ("192.168.1.2", "2400:c0de:1:2::5")
    assert is_near("2400:c0de:1:2:3::9", own)
    assert not is_near("2400:c0de:1:3::9", own)
    assert not is_near("11.0.0.1", own)
    assert not is_near("", own)
