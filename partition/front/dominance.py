"""Weak dominance: which of many cost vectors are worth keeping.

One vector dominates another when it is no worse in any entry; of equal ones the first is kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Objectives = tuple[float, float, float]


def front_of(points: Sequence[Objectives]) -> list[int]:
    """Indices of the points that no other dominates, in lexicographic order of the points."""
    order = sorted(range(len(points)), key=lambda i: (points[i], i))
    # In that order only an earlier point can dominate. `seconds` rises while `thirds` falls: for
    # each second coordinate the best third so far.
    seconds: list[float] = []
    thirds: list[float] = []
    kept: list[int] = []
    for i in order:
        _, second, third = points[i]
        at = bisect_right(seconds, second)
        if at and thirds[at - 1] <= third:
            continue
        kept.append(i)
        beaten = at
        while beaten < len(seconds) and thirds[beaten] >= third:
            beaten += 1
        seconds[at:beaten] = [second]
        thirds[at:beaten] = [third]
    return kept


class Cover:
    """Answers, for many vectors at once, whether a fixed set of points dominates them."""

    def __init__(self, points: Floats) -> None:
        """`points` is [n, 3]; few enough for an n by n table."""
        self._seconds = np.unique(points[:, 1])
        self._thirds = np.unique(points[:, 2])
        # table[i, j]: least first coordinate of the points within seconds[:i], thirds[:j].
        table = np.full((len(self._seconds) + 1, len(self._thirds) + 1), np.inf)
        rows = np.searchsorted(self._seconds, points[:, 1]) + 1
        columns = np.searchsorted(self._thirds, points[:, 2]) + 1
        np.minimum.at(table, (rows, columns), points[:, 0])
        np.minimum.accumulate(table, axis=0, out=table)
        self._table = np.minimum.accumulate(table, axis=1)

    def dominates(self, first: Floats, second: Floats, third: Floats) -> Bools:
        """[k]: is there a point no worse than (first, second, third) in any entry."""
        rows = np.searchsorted(self._seconds, second, side="right")
        columns = np.searchsorted(self._thirds, third, side="right")
        covered: Bools = self._table[rows, columns] <= first
        return covered


# Neighbours that each vector is compared with after sorting. Fibonacci steps reach far enough to
# remove nearly all dominated labels; those that slip through cost time, never exactness.
_NEIGHBOURS = (1, 2, 3, 5, 8, 13, 21, 34)


def thin(group: npt.NDArray[np.int64], vectors: Floats) -> npt.NDArray[np.intp]:
    """Indices of the vectors left when most dominated ones are dropped, sorted by group.

    Args:
        group: [k]; only vectors of one group are compared.
        vectors: [dim, k].

    A vector that is not dominated within its group is always kept (of equal ones, the first).
    """
    kept = np.lexsort((*vectors[::-1], group))
    for step in _NEIGHBOURS:
        if len(kept) <= step:
            break
        before, after = kept[:-step], kept[step:]
        beaten = group[before] == group[after]
        for row in vectors:
            beaten &= row[before] <= row[after]
        kept = kept[np.concatenate((np.ones(step, dtype=np.bool_), ~beaten))]
    return kept
