"""Which points of a long front are measured."""

from __future__ import annotations

from typing import Any

import pytest
from testbed.labs.front import spread


def points(n_points: int, chosen: int) -> list[dict[str, Any]]:
    return [{"n": idx, "is_chosen": idx == chosen} for idx in range(n_points)]


@pytest.mark.parametrize("n_points", [1, 4, 5, 6, 40])
def test_of_a_long_front_both_ends_and_the_chosen_point_are_kept(n_points: int) -> None:
    for chosen in range(n_points):
        front = points(n_points, chosen)
        kept = spread(front, 5)
        assert len(kept) == min(n_points, 5)
        assert (kept[0], kept[-1]) == (front[0], front[-1])
        assert front[chosen] in kept
        assert [point["n"] for point in kept] == sorted({point["n"] for point in kept})
