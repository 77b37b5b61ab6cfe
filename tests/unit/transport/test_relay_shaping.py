"""Whose turn it is at a relay that may carry no faster."""

from __future__ import annotations

from collections import Counter

import pytest

from covey.transport.relay.shaping import Shaper


def carried(
    shaper: Shaper[str], payers: dict[str, str], appetite: dict[str, int], *, until: float
) -> Counter[str]:
    """What each flow moves when all have as much to move as `appetite` says, quantum by quantum."""
    moved: Counter[str] = Counter()
    now = 0.0

    def move(flow: str) -> None:
        nbytes = min(shaper.quantum, appetite[flow] - moved[flow])
        moved[flow] += nbytes
        shaper.moved(payers[flow], nbytes, now=now)
        if moved[flow] < appetite[flow]:
            hungry.append(flow)

    hungry = list(payers)
    while now < until:
        round_, hungry = hungry, []
        for flow in round_:
            if shaper.ask(flow, payers[flow], now=now):
                move(flow)
        while (first := shaper.pop(now=now)) is not None:
            move(first)
        if not hungry:
            wake_at = shaper.next_at(now=now)
            if wake_at is None:
                break
            assert wake_at > now
            now = wake_at
    return moved


def test_the_rate_is_kept_and_shared_evenly() -> None:
    shaper: Shaper[str] = Shaper(rate=1e6, rate_per_payer=1e6, now=0.0)
    flows = {name: name for name in "abcde"}
    moved = carried(shaper, flows, dict.fromkeys(flows, 1 << 40), until=10.0)
    assert sum(moved.values()) == pytest.approx(10e6, rel=0.02)
    assert max(moved.values()) - min(moved.values()) <= 2 * shaper.quantum


def test_a_modest_flow_gets_all_it_wants() -> None:
    shaper: Shaper[str] = Shaper(rate=1e6, rate_per_payer=1e6, now=0.0)
    flows = {name: name for name in "abcde"}
    moved = carried(shaper, flows, {**dict.fromkeys(flows, 1 << 40), "c": 500_000}, until=10.0)
    assert moved["c"] == 500_000


def test_a_payer_has_a_limit_of_its_own_that_others_do_not_feel() -> None:
    shaper: Shaper[str] = Shaper(rate=10e6, rate_per_payer=1e6, now=0.0)
    payers = {"a1": "a", "a2": "a", "a3": "a", "b": "b"}
    moved = carried(shaper, payers, dict.fromkeys(payers, 1 << 40), until=5.0)
    assert moved["b"] == pytest.approx(5e6, rel=0.05)
    assert moved["a1"] + moved["a2"] + moved["a3"] == pytest.approx(5e6, rel=0.05)


def test_nobody_overtakes_one_who_waits() -> None:
    shaper: Shaper[str] = Shaper(rate=1e6, rate_per_payer=1e6, now=0.0)
    assert shaper.ask("a", "p", now=0.0)
    shaper.moved("p", 100_000, now=0.0)
    assert not shaper.ask("b", "p", now=0.0)
    assert not shaper.ask("a", "q", now=1.0)  # there is room by now, and b was first
    assert shaper.pop(now=1.0) == "b"
    assert shaper.pop(now=1.0) == "a"
    assert shaper.pop(now=1.0) is None
    assert shaper.next_at(now=1.0) is None


def test_who_has_ended_does_not_wait() -> None:
    shaper: Shaper[str] = Shaper(rate=1e6, rate_per_payer=1e6, now=0.0)
    shaper.moved("p", 1_000_000, now=0.0)
    assert not shaper.ask("a", "p", now=0.0)
    shaper.forget_flow("a")
    assert shaper.next_at(now=0.0) is None


def test_a_debt_outlives_the_circuits_that_made_it() -> None:
    shaper: Shaper[str] = Shaper(rate=1e9, rate_per_payer=1e5, now=0.0)
    shaper.moved("p", 100_000, now=0.0)
    shaper.forget_payer("p", now=0.0)
    assert not shaper.ask("a", "p", now=0.1)
    shaper.forget_flow("a")
    shaper.forget_payer("p", now=10.0)
    assert shaper.ask("a", "p", now=10.0)
