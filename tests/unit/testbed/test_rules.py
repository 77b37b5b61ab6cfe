"""The rules of others: what they share out, against cases worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from testbed.rules import (
    NoShare,
    equal_split,
    fewest_machines,
    memory_proportional,
    water_filling,
)

speeds = st.lists(st.floats(0.05, 1.0), min_size=1, max_size=8)


def test_equal_shares_differ_by_one_block_at_most() -> None:
    assert equal_split(30, 4) == (8, 8, 7, 7)
    assert equal_split(30, 3) == (10, 10, 10)


def test_memory_goes_by_largest_remainder() -> None:
    # 30 blocks over 4:8:16 are 4.29, 8.57 and 17.14: the missing one goes to .57.
    assert memory_proportional(30, (4, 8, 16)) == (4, 9, 17)


def test_the_smallest_memory_gets_one_block_from_the_largest() -> None:
    assert memory_proportional(30, (1, 1000, 1000)) == (1, 14, 15)


def test_speed_goes_by_largest_remainder_where_nothing_is_full() -> None:
    # 30 blocks over 1.0:0.35:0.15 are exactly 20, 7 and 3.
    assert water_filling(30, (1.0, 0.35, 0.15), (30, 30, 30)) == (20, 7, 3)


def test_what_a_full_machine_cannot_take_goes_to_the_others_by_speed() -> None:
    assert water_filling(30, (1.0, 0.35, 0.15), (10, 30, 30)) == (10, 14, 6)


def test_a_machine_may_come_out_with_nothing() -> None:
    assert water_filling(4, (1.0, 0.05), (4, 4)) == (4, 0)


def test_fewest_machines_with_most_memory_are_taken() -> None:
    assert fewest_machines((4, 8, 16), 10) == (2,)
    assert fewest_machines((4, 8, 16), 20) == (1, 2)


def test_rules_say_when_they_have_no_answer() -> None:
    with pytest.raises(NoShare, match="3 blocks for 4 machines"):
        equal_split(3, 4)
    with pytest.raises(NoShare, match="3 blocks for 4 machines"):
        memory_proportional(3, (1, 1, 1, 1))
    with pytest.raises(NoShare, match="20 of 30 blocks"):
        water_filling(30, (1.0, 1.0), (10, 10))
    with pytest.raises(NoShare, match="28 of 29"):
        fewest_machines((4, 8, 16), 29)


@given(speeds, st.integers(8, 100), st.data())
def test_every_block_is_given_once_and_no_capacity_exceeded(
    speeds: list[float], n_blocks: int, data: st.DataObject
) -> None:
    caps = data.draw(
        st.lists(st.integers(1, n_blocks), min_size=len(speeds), max_size=len(speeds)).filter(
            lambda caps: sum(caps) >= n_blocks
        )
        if len(speeds) > 1
        else st.just([n_blocks])
    )
    filled = water_filling(n_blocks, speeds, caps)
    assert sum(filled) == n_blocks
    assert all(0 <= share <= cap for share, cap in zip(filled, caps, strict=True))
    assert sum(equal_split(n_blocks, len(speeds))) == n_blocks
    shared = memory_proportional(n_blocks, speeds)
    assert sum(shared) == n_blocks
    assert min(shared) >= 1
