"""Liveness: when to ask, when to give up, when to close."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.transport.liveness import RTT_WINDOW, Action, Liveness, LivenessRules

RULES = LivenessRules()


def busy_link(now: float = 0.0) -> Liveness:
    liveness = Liveness(now=now)
    liveness.set_busy(is_busy=True, now=now)
    return liveness


def test_a_link_that_becomes_busy_is_asked_at_once_and_then_each_second() -> None:
    liveness = busy_link(now=10.0)
    assert liveness.next_deadline() == 10.0
    assert liveness.next_action(now=10.0) is Action.PING
    liveness.pinged(now=10.0)
    assert liveness.next_deadline() == 11.0
    assert liveness.next_action(now=10.9) is Action.WAIT
    assert liveness.next_action(now=11.0) is Action.PING


def test_a_busy_link_is_suspected_after_two_and_a_half_silent_seconds() -> None:
    liveness = busy_link()
    liveness.heard(now=1.0)
    liveness.pinged(now=3.4)
    assert liveness.next_action(now=3.49) is Action.WAIT
    assert liveness.next_action(now=3.5) is Action.SUSPECT


def test_silence_before_the_link_was_busy_does_not_count() -> None:
    liveness = Liveness(now=0.0)
    liveness.set_busy(is_busy=True, now=19.0)
    liveness.pinged(now=19.0)
    assert liveness.next_action(now=19.5) is Action.WAIT


def test_time_in_which_we_stood_still_does_not_count() -> None:
    liveness = busy_link()
    liveness.excuse(60.0)
    liveness.pinged(now=60.0)
    assert liveness.next_action(now=60.5) is Action.WAIT


def test_a_slow_link_is_given_the_time_its_answers_take() -> None:
    liveness = busy_link()
    for _ in range(20):
        liveness.measured(3.0)
    liveness.pinged(now=3.9)
    assert liveness.next_action(now=3.9) is Action.WAIT
    assert liveness.next_action(now=4.5) is Action.SUSPECT


def test_an_idle_link_is_asked_every_twenty_seconds_and_given_up_unanswered() -> None:
    liveness = Liveness(now=0.0)
    assert liveness.next_deadline() == 20.0
    liveness.pinged(now=20.0)
    assert liveness.next_action(now=29.9) is Action.WAIT
    assert liveness.next_action(now=30.0) is Action.SUSPECT
    liveness.heard(now=29.95)
    assert liveness.next_action(now=30.0) is Action.WAIT


def idle_until(liveness: Liveness, end: float, *, peer_pings_every_s: float) -> Action:
    """Live through an idle time with a healthy peer; the last action that was not a Ping."""
    now = 0.0
    while now < end:
        now += 1.0
        liveness.heard(now=now)
        if now % peer_pings_every_s == 0:
            liveness.peer_pinged(now=now)
        match liveness.next_action(now=now):
            case Action.PING:
                liveness.pinged(now=now)
            case Action.WAIT:
                pass
            case other:
                return other
    return Action.WAIT


def test_a_link_nobody_uses_is_closed_after_a_minute() -> None:
    liveness = Liveness(now=0.0)
    assert idle_until(liveness, 59.0, peer_pings_every_s=20.0) is Action.WAIT
    assert idle_until(Liveness(now=0.0), 62.0, peer_pings_every_s=20.0) is Action.CLOSE


def test_a_link_the_peer_needs_is_not_closed() -> None:
    assert idle_until(Liveness(now=0.0), 300.0, peer_pings_every_s=1.0) is Action.WAIT


def test_a_link_is_needed_while_a_session_or_the_peers_pings_say_so() -> None:
    assert not Liveness(now=0.0).is_needed(now=0.0)
    assert busy_link().is_needed(now=0.0)
    liveness = Liveness(now=0.0)
    liveness.peer_pinged(now=20.0)
    assert not liveness.is_needed(now=20.0)  # an idle link's ordinary heartbeat
    liveness.peer_pinged(now=21.0)
    assert liveness.is_needed(now=25.0)
    assert not liveness.is_needed(now=60.0)


def test_a_used_or_busy_link_is_not_closed() -> None:
    liveness = Liveness(now=0.0)
    liveness.used(now=30.0)
    liveness.pinged(now=60.0)
    liveness.heard(now=60.0)
    assert liveness.next_action(now=60.0) is Action.WAIT
    liveness = busy_link()
    liveness.heard(now=100.0)
    liveness.pinged(now=100.0)
    assert liveness.next_action(now=100.0) is Action.WAIT
    liveness.set_busy(is_busy=False, now=100.0)
    liveness.pinged(now=159.0)
    liveness.heard(now=159.5)
    assert liveness.next_action(now=159.9) is Action.WAIT
    assert liveness.next_action(now=160.0) is Action.CLOSE


def test_the_estimate_follows_jacobson() -> None:
    liveness = Liveness(now=0.0)
    liveness.measured(0.1)
    assert liveness.srtt_s == 0.1
    liveness.measured(0.2)
    assert liveness.srtt_s == pytest.approx(0.1125)


@given(st.lists(st.tuples(st.sampled_from("hupb rm"), st.floats(0.0, 30.0)), max_size=40))
def test_nothing_is_due_before_the_deadline(events: list[tuple[str, float]]) -> None:
    liveness, now, is_busy = Liveness(now=0.0), 0.0, False
    for event, step_s in events:
        now += step_s
        match event:
            case "h":
                liveness.heard(now=now)
            case "u":
                liveness.used(now=now)
            case "p":
                liveness.pinged(now=now)
            case "b":
                is_busy = not is_busy
                liveness.set_busy(is_busy=is_busy, now=now)
            case "r":
                liveness.peer_pinged(now=now)
            case "m":
                liveness.measured(step_s)
        is_due = liveness.next_action(now=now) is not Action.WAIT
        assert is_due == (liveness.next_deadline() <= now)


def test_an_idle_link_on_which_something_is_said_is_not_asked() -> None:
    liveness = Liveness(now=0.0)
    liveness.heard(now=15.0)
    assert liveness.next_action(now=20.0) is Action.WAIT
    assert liveness.next_action(now=35.0) is Action.PING


def test_the_least_round_trip_is_of_the_last_answers_and_of_this_way() -> None:
    liveness = Liveness(now=0.0)
    for rtt_s in (0.3, 0.1, 0.5):
        liveness.measured(rtt_s)
    assert liveness.least_rtt_s == 0.1
    for _ in range(RTT_WINDOW):
        liveness.measured(0.4)
    assert liveness.least_rtt_s == 0.4
    liveness.moved(now=1.0)
    assert liveness.least_rtt_s is None
