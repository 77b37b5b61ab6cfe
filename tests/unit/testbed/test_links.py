"""Links as data, the token bucket's size, and the way of a frame through the wire."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

import pytest
from testbed.cables import burst_bytes, netem_words
from testbed.links import PRESETS, Way, both_ways
from testbed.wire import LIMIT
from testbed.wire import Way as WireWay

MS = 1_000_000


@pytest.fixture
def way() -> Iterator[WireWay]:
    left, right = socket.socketpair()
    with left, right:
        yield WireWay(left, right, random.Random(0))


def test_the_published_settings_add_up_between_two_hosts() -> None:
    # A host's packet crosses two cables one way.
    assert 2 * PRESETS["tpi-llm"].up.delay_ms == 4 * 1.0
    assert PRESETS["tpi-llm"].up.mbit_per_s == 300
    assert 2 * PRESETS["paretopipe"].up.delay_ms == 200
    assert PRESETS["paretopipe"].up.mbit_per_s == 5


def test_every_preset_the_issue_names_is_there() -> None:
    named = "ethernet good-wifi bad-wifi uplink 4g satellite tpi-llm paretopipe"
    assert set(PRESETS) == set(named.split())


def test_bundles_of_packets_are_kept_only_where_they_do_not_show() -> None:
    assert Way(loss=0.01).needs_small_packets
    assert Way(mbit_per_s=50).needs_small_packets
    assert not Way(delay_ms=50, mbit_per_s=300).needs_small_packets


def test_a_slower_link_keeps_all_else() -> None:
    link = both_ways(delay_ms=10, mbit_per_s=5).slower(delay_ms=40, loss=0.1)
    assert link == both_ways(delay_ms=50, mbit_per_s=5, loss=0.1)
    assert link.rtt_ms == 100


@pytest.mark.parametrize(
    "figures", [{"delay_ms": -1}, {"jitter_ms": -1}, {"loss": 1.1}, {"mbit_per_s": 0}]
)
def test_impossible_figures_are_refused(figures: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Way"):
        Way(**figures)


def test_a_token_bucket_holds_two_milliseconds_but_two_packets_at_least() -> None:
    assert burst_bytes(1000) == 250_000
    assert burst_bytes(5) == 4096


def test_a_frame_waits_as_long_as_told(way: WireWay) -> None:
    way.change({"delay_ms": 5})
    assert way.due(0) == 5 * MS
    way.change({"delay_ms": 50})
    assert way.due(0) == 50 * MS


def test_a_shorter_delay_does_not_let_a_frame_overtake(way: WireWay) -> None:
    way.change({"delay_ms": 50})
    way.due(0)
    way.change({"delay_ms": 1})
    assert way.due(10 * MS) == 50 * MS
    assert way.due(60 * MS) == 61 * MS


def test_a_way_that_loses_all_lets_nothing_pass(way: WireWay) -> None:
    way.change({"loss": 1.0})
    assert [way.due(0) for _ in range(100)] == [None] * 100


def test_a_full_way_drops_what_comes(way: WireWay) -> None:
    way.n_held = LIMIT
    assert way.due(0) is None


def test_netem_is_told_all_of_a_way() -> None:
    way = Way(delay_ms=20, jitter_ms=2, loss=0.01, mbit_per_s=50)
    assert netem_words(way) == "netem delay 20ms 2ms loss 1% rate 50mbit limit 10000"
    assert "rate" not in netem_words(Way(delay_ms=20))
