"""What others' words make of a profile: slower only, by the median, never by one of several."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.partition.errors import InvalidPlan
from covey.partition.observed import (
    GROSS,
    MAX_SLOWNESS,
    MIN_SESSIONS,
    TOLERATED,
    Observation,
    corrected,
    slowed,
    slowness,
)
from covey.partition.profile import DeviceProfile
from support.plans import device

CLAIMED = device("liar", decode_s=0.01)


def found(ratio: float, observer: str = "a", n_sessions: int = MIN_SESSIONS) -> Observation:
    return Observation(
        observer=observer,
        peer_id="liar",
        decode_s_per_block=0.01 * ratio,
        n_sessions=n_sessions,
    )


def test_a_member_that_is_as_fast_as_it_says_or_faster_stays_what_it_says() -> None:
    for ratio in (0.01, 1.0, TOLERATED):
        assert corrected(CLAIMED, [found(ratio)]) == CLAIMED
    assert corrected(CLAIMED, []) == CLAIMED


def test_a_liar_is_as_slow_in_everything_as_it_was_found_to_be() -> None:
    claimed = replace(
        CLAIMED,
        batch_decode_s_per_block=(0.01, 0.02, 0.03),
        batch_head_s=(0.001, 0.002, 0.003),
        depth_s_per_block=1e-6,
        prefill_s_per_block=((16, 0.1), (128, 0.2)),
        step_s=1e-4,
        split_s_per_block=1e-5,
    )
    honest = corrected(claimed, [found(10.0)])
    assert honest.decode_s_per_block == pytest.approx(0.1)
    assert [n_tokens for n_tokens, _ in honest.prefill_s_per_block] == [16, 128]
    assert [s for _, s in honest.prefill_s_per_block] == pytest.approx([1.0, 2.0])
    timed = [name for name in DeviceProfile.__slots__ if "_s" in name and "bytes" not in name]
    for name in timed:
        before, after = getattr(claimed, name), getattr(honest, name)
        if isinstance(before, float):
            assert after == pytest.approx(10 * before), name
        elif name.startswith("batch"):
            assert after == pytest.approx([10 * seconds for seconds in before]), name
    assert (honest.memory_bytes, honest.disk_bytes_per_s) == (
        claimed.memory_bytes,
        claimed.disk_bytes_per_s,
    )


def test_one_session_is_an_accident_and_nobody_bears_witness_of_itself() -> None:
    assert slowness(CLAIMED, [found(10.0, n_sessions=MIN_SESSIONS - 1)]) == 1.0
    assert slowness(CLAIMED, [found(10.0, observer="liar")]) == 1.0
    assert slowness(device("other"), [found(10.0)]) == 1.0


def test_a_lone_observer_counts_and_of_several_none_alone_expels_or_shields() -> None:
    assert slowness(CLAIMED, [found(10.0)]) == pytest.approx(10.0)
    assert slowness(CLAIMED, [found(10.0), found(1.0, "b")]) == 1.0
    assert slowness(CLAIMED, [found(1000.0), found(1.0, "b"), found(1.1, "c")]) == 1.0
    shielded = [found(10.0), found(11.0, "b"), found(0.1, "c")]
    assert slowness(CLAIMED, shielded) == pytest.approx(10.0)


def test_a_small_change_in_what_was_found_makes_none_that_is_large() -> None:
    n = 1000
    ratios = [TOLERATED / 2 + 2 * GROSS * i / n for i in range(n)]
    values = [slowness(CLAIMED, [found(ratio)]) for ratio in ratios]
    steps = [after - before for before, after in pairwise(values)]
    assert all(0 <= step <= 4 * GROSS / n for step in steps)


ANYTHING = st.builds(
    Observation,
    observer=st.sampled_from("abcd"),
    peer_id=st.just("liar"),
    decode_s_per_block=st.floats(1e-12, 1e4),
    n_sessions=st.integers(1, 1 << 31),
)


@given(st.permutations("abcd"), st.lists(ANYTHING, max_size=4, unique_by=lambda o: o.observer))
def test_everybody_comes_to_the_same_whatever_they_read(
    order: list[str], observations: list[Observation]
) -> None:
    shuffled = sorted(observations, key=lambda seen: order.index(seen.observer))
    factor = slowness(CLAIMED, observations)
    assert 1.0 <= factor <= MAX_SLOWNESS
    assert corrected(CLAIMED, shuffled) == corrected(CLAIMED, observations)


def test_what_would_be_slower_than_any_device_is_as_slow_as_one_can_be() -> None:
    assert slowed(device("a", decode_s=9e3), 1000.0).decode_s_per_block == 1e4


@pytest.mark.parametrize(
    "change",
    [
        {"decode_s_per_block": math.nan},
        {"decode_s_per_block": math.inf},
        {"decode_s_per_block": -1.0},
        {"decode_s_per_block": 0.0},
        {"n_sessions": 0},
        {"observer": ""},
        {"peer_id": "a b"},
    ],
)
def test_an_observation_out_of_bounds_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidPlan):
        replace(found(1.0), **change)
