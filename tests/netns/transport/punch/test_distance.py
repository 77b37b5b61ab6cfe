"""Real routers a round trip of 60 ms apart: a link of their own stands in time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed.links import both_ways
from testbed.nat import Nat, NatKind

from support.punch_pair import MIRROR, MOST_S, Pair, kinds_of, two_hosts

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def pair(inside: Path) -> Iterator[Pair]:
    with two_hosts(link=both_ways(delay_ms=15.0)) as pair:
        yield pair


@pytest.mark.parametrize("theirs", [NatKind.PORT_RESTRICTED, NatKind.SYMMETRIC])
def test_a_direct_link_stands_in_time_at_a_distance(pair: Pair, theirs: NatKind) -> None:
    ours = Nat(NatKind.PORT_RESTRICTED)
    pair.lab.set_nat("ra", ours)
    pair.lab.set_nat("rb", Nat(theirs))
    first = kinds_of(ours, Nat(theirs))[0]
    for end in pair.meet(first, MIRROR.get(first, first)):
        assert end.get("kind") == "punched", end
        assert end["took_s"] < MOST_S


def test_webrtc_stands_in_time_at_a_distance(pair: Pair) -> None:
    for router in ("ra", "rb"):
        pair.lab.set_nat(router, Nat(NatKind.PORT_RESTRICTED))
    for end in pair.webrtc(deadline_s=8.0):
        assert end.get("kind") == "webrtc", end
        assert end["took_s"] < MOST_S
