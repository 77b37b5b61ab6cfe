"""Which links to relays a node makes, measures and lets go."""

from __future__ import annotations

import pytest

from covey.transport.relay.keeper import (
    FIRST_BACKOFF_S,
    MAX_BACKOFF_S,
    MAX_PROBED,
    MAX_PROBES,
    MEASURE_AGAIN_S,
    RelayKeeper,
    Steps,
)


def keeper_of(*peer_ids: str) -> RelayKeeper:
    keeper = RelayKeeper("me")
    keeper.is_needed = True
    keeper.see(dict.fromkeys(peer_ids))
    return keeper


def settle(keeper: RelayKeeper, rtts_s: dict[str, float], *, now: float) -> None:
    """Answer for all that is asked, until nothing is."""
    while (steps := keeper.next_steps(now=now)) != Steps():
        for peer_id in (*steps.hold, *steps.probe):
            keeper.measured(peer_id, rtts_s[peer_id], now=now)


def test_nothing_is_done_until_it_is_needed() -> None:
    keeper = keeper_of("a", "b")
    keeper.is_needed = False
    assert keeper.next_steps(now=0.0) == Steps()


def test_a_node_does_not_relay_for_itself() -> None:
    assert keeper_of("me").next_steps(now=0.0) == Steps()


def test_two_are_up_at_once_and_better_ones_take_their_place() -> None:
    keeper = keeper_of("a", "b", "c", "d")
    first = keeper.next_steps(now=0.0)
    assert len(first.hold) == 2
    assert set(first.hold) | set(first.probe) == {"a", "b", "c", "d"}
    for peer_id in first.hold:
        keeper.measured(peer_id, 0.2, now=0.1)
    assert set(keeper.relays) == set(first.hold)
    for peer_id in first.probe:
        keeper.measured(peer_id, 0.02, now=0.2)
    better = keeper.next_steps(now=0.3)
    assert set(better.hold) == set(first.probe)
    assert better.release == ()  # not before the new ones are up
    for peer_id in better.hold:
        keeper.measured(peer_id, 0.02, now=0.4)
    assert set(keeper.next_steps(now=0.5).release) == set(first.hold)
    assert keeper.relays == dict.fromkeys(better.hold, 0.02)
    assert keeper.next_steps(now=0.6) == Steps()


def test_one_that_dies_is_replaced_at_once_and_tried_again_later() -> None:
    keeper = keeper_of("a", "b", "c")
    settle(keeper, {"a": 0.01, "b": 0.02, "c": 0.03}, now=0.0)
    assert set(keeper.relays) == {"a", "b"}
    keeper.failed("a", now=1.0)
    assert set(keeper.relays) == {"b"}
    assert keeper.next_steps(now=1.0).hold == ("c",)
    keeper.measured("c", 0.03, now=1.1)
    assert keeper.next_steps(now=1.2) == Steps()
    assert keeper.next_at(now=1.2) == 1.0 + FIRST_BACKOFF_S
    assert keeper.next_steps(now=1.0 + FIRST_BACKOFF_S).probe == ("a",)


def test_failures_in_a_row_are_tried_less_and_less() -> None:
    keeper = keeper_of("a")
    now, pauses = 0.0, []
    steps = keeper.next_steps(now=now)
    for _ in range(10):
        assert steps.hold == ("a",)
        keeper.failed("a", now=now)
        failed_at = now
        while not (steps := keeper.next_steps(now=now)).hold:
            now = keeper.next_at(now=now)
        pauses.append(now - failed_at)
    assert pauses[0] == pytest.approx(FIRST_BACKOFF_S)
    assert pauses == sorted(pauses)
    assert max(pauses) <= MAX_BACKOFF_S


def test_of_many_candidates_few_are_measured_and_few_at_once() -> None:
    names = [f"peer{n}" for n in range(100)]
    keeper = keeper_of(*names)
    asked: list[str] = []
    while (steps := keeper.next_steps(now=0.0)) != Steps():
        assert len(steps.probe) <= MAX_PROBES
        asked += steps.probe
        for peer_id in (*steps.hold, *steps.probe):
            keeper.measured(peer_id, 0.1, now=0.0)
    assert len(asked) <= MAX_PROBED
    again = keeper.next_steps(now=MEASURE_AGAIN_S)
    assert len(again.probe) == MAX_PROBES


def test_different_nodes_measure_different_candidates() -> None:
    names = dict.fromkeys(f"peer{n}" for n in range(100))
    first: set[str] = set()
    for n in range(10):
        keeper = RelayKeeper(f"node{n}")
        keeper.is_needed = True
        keeper.see(names)
        first.update(keeper.next_steps(now=0.0).probe)
    assert len(first) > 10


def test_all_are_let_go_when_none_is_needed_any_more() -> None:
    keeper = keeper_of("a", "b")
    settle(keeper, {"a": 0.01, "b": 0.02}, now=0.0)
    keeper.is_needed = False
    assert set(keeper.next_steps(now=1.0).release) == {"a", "b"}
    assert keeper.relays == {}


def test_one_that_is_willing_no_longer_is_let_go_once_another_is_up() -> None:
    keeper = keeper_of("a", "b", "c")
    settle(keeper, {"a": 0.01, "b": 0.02, "c": 0.03}, now=0.0)
    keeper.see({"b": None, "c": None})
    assert keeper.next_steps(now=1.0) == Steps(hold=("c",))
    keeper.measured("c", 0.03, now=1.1)
    assert keeper.next_steps(now=1.2) == Steps(release=("a",))


def test_reports_of_peers_that_nobody_asked_about_change_nothing() -> None:
    keeper = keeper_of("a")
    keeper.failed("stranger", now=0.0)
    assert keeper.next_steps(now=0.0) == Steps(hold=("a",))
