"""Seconds of one device's steps, from rich profiles and from plain ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from covey.partition.profile import STEP_BATCHES, Workload
from covey.partition.speed import (
    GRID_S,
    PREFILL_DEPTH_SHARE,
    block_step_s,
    block_steps_s,
    chunk_s_per_block,
    head_steps_s,
    on_grid,
    prefill_s,
)
from support.plans import device

PLAIN = device("a", decode_s=0.010, prefill_s=0.001, head_s=0.004)
RICH = replace(
    PLAIN,
    batch_decode_s_per_block=(0.012, 0.016, 0.024),
    batch_head_s=(0.005, 0.007, 0.011),
    depth_s_per_block=1e-5,
    prefill_s_per_block=((16, 0.040), (128, 0.152)),
)


def test_without_more_figures_a_batch_takes_its_sessions_one_by_one() -> None:
    assert block_steps_s(PLAIN, Workload()) == pytest.approx((0.010, 0.020, 0.040, 0.080))
    assert head_steps_s(PLAIN) == pytest.approx((0.004, 0.008, 0.016, 0.032))
    assert prefill_s(PLAIN, 100) == pytest.approx(0.1)


def test_measured_batches_count_as_measured() -> None:
    steps = [block_step_s(RICH, batch) for batch in STEP_BATCHES]
    assert steps == pytest.approx([0.010, 0.012, 0.016, 0.024])
    assert head_steps_s(RICH) == pytest.approx((0.004, 0.005, 0.007, 0.011))


def test_batches_between_and_beyond_lie_on_the_lines() -> None:
    assert block_step_s(RICH, 3) == pytest.approx(0.014)
    assert block_step_s(RICH, 6) == pytest.approx(0.020)
    assert block_step_s(RICH, 16) == pytest.approx(0.040)


def test_each_session_pays_for_its_own_depth() -> None:
    assert block_step_s(RICH, 4, depth=100) == pytest.approx(0.016 + 4 * 100 * 1e-5)
    request = Workload(prompt_tokens=36)  # and half a reply of 128 tokens behind it
    assert block_steps_s(RICH, request)[0] == pytest.approx(0.010 + 100 * 1e-5)


@pytest.mark.parametrize(
    ("n_tokens", "seconds"),
    [(1, 0.010), (6, 0.020), (16, 0.040), (72, 0.096), (128, 0.152), (256, 0.304)],
)
def test_chunks_lie_on_the_line_from_a_decode_step_to_the_longest(
    n_tokens: int, seconds: float
) -> None:
    assert prefill_s(RICH, n_tokens) == pytest.approx(seconds)


def test_later_chunks_look_back_on_earlier_ones() -> None:
    first = chunk_s_per_block(RICH, Workload(prompt_tokens=128))
    mean_of_three = chunk_s_per_block(RICH, Workload(prompt_tokens=384))
    behind = 128 * 128 * 1e-5 * PREFILL_DEPTH_SHARE  # none, 128 and 256 positions
    assert mean_of_three == pytest.approx(first + behind)


def test_a_line_that_noise_has_bent_down_never_leads_below_zero() -> None:
    bent = replace(PLAIN, batch_decode_s_per_block=(0.010, 0.008, 0.002))
    assert block_step_s(bent, 64) > 0.0


def test_what_others_use_is_in_the_seconds_already() -> None:
    busy = replace(RICH, busy_share=0.9)
    assert block_steps_s(busy, Workload()) == block_steps_s(RICH, Workload())


def test_seconds_are_on_the_grid() -> None:
    for seconds in (*block_steps_s(RICH, Workload()), *head_steps_s(RICH), prefill_s(RICH, 77)):
        assert (seconds / GRID_S).is_integer()
        assert on_grid(seconds) == seconds
