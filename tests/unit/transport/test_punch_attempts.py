"""Which attempts two kinds of NAT call for: the table of 5 x 5, and what is beside it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.transport.link import LinkKind
from covey.transport.nat.facts import NatFacts, NatKind
from covey.transport.punch.attempts import Attempt, AttemptKind, attempts

OPEN, FULL, ADDRESS, PORT, SYMMETRIC = (
    NatKind.OPEN,
    NatKind.FULL_CONE,
    NatKind.ADDRESS_RESTRICTED,
    NatKind.PORT_RESTRICTED,
    NatKind.SYMMETRIC,
)
KINDS = (OPEN, FULL, ADDRESS, PORT, SYMMETRIC)
PAIRS = list(itertools.product(KINDS, KINDS))

# The best attempt of each pair where cones are cones for TCP too; D dial, R reverse, P punch,
# E and H the ends of a birthday, W WebRTC, - nothing but a relay.
TCP_CONES = """
    DRRRR
    DPPPP
    DPPPP
    DPPPE
    DPPH-
"""
# The same where a router is a cone for UDP only: TCP then sees a port-restricted one.
UDP_CONES = """
    DRRRR
    DPPPE
    DPPPE
    DPPPE
    DHHH-
"""
# What ICE can do over UDP.
ICE = """
    WWWWW
    WWWWW
    WWWWW
    WWWW-
    WWW--
"""
LETTERS = {
    "D": AttemptKind.DIAL,
    "R": AttemptKind.REVERSE,
    "P": AttemptKind.PUNCH,
    "E": AttemptKind.BIRTHDAY_EASY,
    "H": AttemptKind.BIRTHDAY_HARD,
    "W": AttemptKind.WEBRTC,
    "-": None,
}


def facts(udp: NatKind, n: int, *, has_tcp_cones: bool = True, **more: Any) -> NatFacts:
    """Of a host behind a router of that kind at 203.0.113.n."""
    tcp = udp if has_tcp_cones or udp in (OPEN, SYMMETRIC) else PORT
    known: dict[str, Any] = {"is_reachable": udp is OPEN, "public_hosts": (f"203.0.113.{n}",)}
    return NatFacts(udp=udp, tcp=tcp, port=4000, measured_at=0.0, **(known | more))


def best(ours: NatFacts, theirs: NatFacts) -> AttemptKind | None:
    return next((attempt.kind for attempt in attempts(ours, theirs)), None)


def cell(table: str, ours: NatKind, theirs: NatKind) -> AttemptKind | None:
    return LETTERS[table.split()[KINDS.index(ours)][KINDS.index(theirs)]]


@pytest.mark.parametrize(("has_tcp_cones", "table"), [(True, TCP_CONES), (False, UDP_CONES)])
def test_the_best_attempt_is_the_tables(has_tcp_cones: bool, table: str) -> None:
    n_direct = 0
    for ours, theirs in PAIRS:
        found = best(
            facts(ours, 1, has_tcp_cones=has_tcp_cones),
            facts(theirs, 2, has_tcp_cones=has_tcp_cones),
        )
        assert found is cell(table, ours, theirs), (ours, theirs)
        n_direct += found is not None
    assert n_direct == 24


def test_what_ice_can_do_gets_webrtc_last() -> None:
    n_ice = 0
    for (ours, theirs), has_tcp_cones in itertools.product(PAIRS, (True, False)):
        made = attempts(
            facts(ours, 1, has_tcp_cones=has_tcp_cones),
            facts(theirs, 2, has_tcp_cones=has_tcp_cones),
        )
        kinds = [attempt.kind for attempt in made]
        expected = cell(ICE, ours, theirs)
        assert (AttemptKind.WEBRTC in kinds) is (expected is AttemptKind.WEBRTC)
        assert AttemptKind.WEBRTC not in kinds[:-1]
        n_ice += AttemptKind.WEBRTC in kinds
    assert n_ice == 2 * 22


_MIRROR = {
    AttemptKind.DIAL: AttemptKind.REVERSE,
    AttemptKind.REVERSE: AttemptKind.DIAL,
    AttemptKind.BIRTHDAY_EASY: AttemptKind.BIRTHDAY_HARD,
    AttemptKind.BIRTHDAY_HARD: AttemptKind.BIRTHDAY_EASY,
}


@given(*(st.sampled_from(NatKind) for _ in range(4)), st.booleans(), st.booleans())
def test_both_ends_find_the_same_ways(
    a: NatKind, b: NatKind, c: NatKind, d: NatKind, e: bool, f: bool
) -> None:
    ours = NatFacts(udp=a, tcp=b, port=1, is_reachable=e, measured_at=0, public_hosts=("2.2.2.2",))
    theirs = NatFacts(udp=c, tcp=d, port=2, is_reachable=f, measured_at=0, lan_hosts=("10.0.0.1",))
    mirrored = {
        Attempt(_MIRROR.get(made.kind, made.kind), made.link_kind, made.addresses)
        for made in attempts(theirs, ours)
    }
    assert set(attempts(ours, theirs)) == mirrored


def test_a_mapped_port_is_dialled_after_a_direct_one() -> None:
    theirs = facts(PORT, 2, is_reachable=True, mapped_addresses=("203.0.113.2:5000",))
    assert attempts(facts(PORT, 1), theirs)[:2] == (
        Attempt(AttemptKind.DIAL, LinkKind.DIRECT, ("203.0.113.2:4000",)),
        Attempt(AttemptKind.DIAL, LinkKind.MAPPED, ("203.0.113.2:5000",)),
    )


def test_behind_one_router_the_way_is_the_local_network() -> None:
    ours = facts(SYMMETRIC, 1, lan_hosts=("192.168.1.2",))
    theirs = facts(SYMMETRIC, 1, lan_hosts=("192.168.1.3", "fd00::3"))
    assert attempts(ours, theirs) == (
        Attempt(AttemptKind.DIAL, LinkKind.DIRECT, ("192.168.1.3:4000", "[fd00::3]:4000")),
        Attempt(AttemptKind.REVERSE, LinkKind.DIRECT, ("192.168.1.2:4000",)),
    )


def test_another_networks_private_addresses_are_left_alone() -> None:
    theirs = facts(PORT, 2, lan_hosts=("192.168.1.3",))
    assert best(facts(PORT, 1), theirs) is AttemptKind.PUNCH


def test_blocked_tcp_leaves_webrtc_and_blocked_udp_leaves_tcp() -> None:
    def half(tcp: NatKind, udp: NatKind) -> NatFacts:
        return NatFacts(udp=udp, tcp=tcp, port=1, measured_at=0.0, public_hosts=("203.0.113.9",))

    other = facts(PORT, 2)
    kinds = [a.kind for a in attempts(half(NatKind.BLOCKED, PORT), other)]
    assert kinds == [AttemptKind.WEBRTC]
    kinds = [a.kind for a in attempts(half(PORT, NatKind.BLOCKED), other)]
    assert kinds == [AttemptKind.PUNCH]


def test_nothing_is_sprayed_at_what_is_not_known() -> None:
    unknown = NatFacts(port=1, measured_at=0.0, public_hosts=("203.0.113.9",))
    for kind in KINDS:
        kinds = {a.kind for a in attempts(facts(kind, 1), unknown)}
        assert {AttemptKind.PUNCH, AttemptKind.WEBRTC} <= kinds
        assert not {AttemptKind.BIRTHDAY_EASY, AttemptKind.BIRTHDAY_HARD} & kinds
