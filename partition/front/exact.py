"""The whole front of one question, or an honest no: see `boxes` for how."""

from __future__ import annotations

from itertools import permutations

import numpy as np

from .boxes import Boxes, BoxSearch, Cases, joined, whole
from .chains import Sink
from .instance import Floats, Instance, Ints
from .labels import BlockLabels, Rows
from .tours import Tours, tours_of
from .unit_sets import UnitSets, unit_sets

MAX_SETS = 400_000  # of units
# Where a part streams no box tells which spreads are worth having:
MAX_STREAMING_SETS = 4_000
MAX_STREAMING_LABELS = 2_000_000
_SLIVER = 1 - 1e-9  # of a bound that is worked out in floats and not on the grid


def search_exact(instance: Instance, found: Sink, *, max_effort: int) -> bool:
    """Put the front into `found`; whether all of it is there.

    Args:
        instance: the question.
        found: may know something already.
        max_effort: boxes and labels to make before giving up.
    """
    streams = instance.read_s is not None
    sets = unit_sets(instance, max_sets=MAX_STREAMING_SETS if streams else MAX_SETS)
    if sets is None:
        return False
    if not instance.is_uniform:
        return _by_orders(instance, found, sets, max_effort)
    left = max_effort
    tours = tours_of(
        instance,
        least_busy_s=least_busy_s(instance),
        least_chunk_s=least_chunk_s(instance),
        max_hubs=len(sets),
    )
    for of_size, ways in zip(sets, tours, strict=False):
        left -= _Sized(instance, found, of_size, ways).run(left)
        if left < 0:
            return False
    return True


class _Sized:
    """The sets with one number of units, and the ways through as many hubs."""

    def __init__(self, instance: Instance, found: Sink, sets: UnitSets, tours: Tours) -> None:
        self._instance, self._found, self._tours = instance, found, tours
        # Ways by their hubs: those of set i are order[first[i] : first[i] + n[i]].
        self._order = np.argsort(tours.mask, kind="stable")
        masks = tours.mask[self._order]
        first = np.searchsorted(masks, sets.hubs, side="left")
        n_ways = np.searchsorted(masks, sets.hubs, side="right") - first
        kept = np.flatnonzero(n_ways)
        self._units = sets.units[kept]
        self._first, self._n_ways = first[kept], n_ways[kept]

    def run(self, max_effort: int) -> int:
        """Boxes and labels made; if more than `max_effort`, not all was looked at."""
        instance, effort = self._instance, 0
        if not len(self._units):
            return 0
        coarse = BoxSearch(instance, self._found, self._coarse_cases(), is_coarse=True)
        boxes = whole(
            len(self._units),
            len(instance.batches),
            least_busy_s=least_busy_s(instance),
            least_slow_s=least_chunk_s(instance) if instance.n_chunks > 1 else 0.0,
        )
        if instance.read_s is not None:  # reading leaps, so filling the cheapest is not best
            cases, boxes = self._fine_cases(boxes)
            fine = BoxSearch(instance, self._found, cases, is_coarse=False)
            return fine.finish(boxes, max_labels=min(max_effort, MAX_STREAMING_LABELS))
        small = [boxes.take(np.empty(0, dtype=np.int64))]
        while boxes.n_boxes and effort <= max_effort:
            boxes, done, n_new = coarse.step(boxes)
            small.append(done)
            effort += n_new
        boxes = joined(small)
        if not boxes.n_boxes or effort > max_effort:
            return effort
        cases, boxes = self._fine_cases(boxes)
        fine = BoxSearch(instance, self._found, cases, is_coarse=False)
        small = [boxes.take(np.empty(0, dtype=np.int64))]
        while boxes.n_boxes and effort <= max_effort:
            boxes, done, n_new = fine.step(boxes)
            small.append(done)
            effort += n_new
        if effort <= max_effort:
            effort += fine.finish(joined(small), max_labels=max_effort - effort)
        return effort

    def _coarse_cases(self) -> Cases:
        """A case for each set, with the least of all its heads and ways."""
        instance, tours = self._instance, self._tours
        least = np.minimum.reduceat
        starts = self._first
        by_hubs = self._order
        masks = tours.mask[by_hubs]
        groups = np.flatnonzero(np.concatenate([[True], masks[1:] != masks[:-1]]))
        of = np.searchsorted(groups, starts, side="right") - 1
        token_s = least(tours.token_s[by_hubs], groups, axis=0)[of]
        head_s = least(instance.head_s[tours.head[by_hubs]], groups, axis=0)[of]
        # One of the ways, to try what its set can do: the soonest.
        rank = np.lexsort((tours.token_s[by_hubs, 0], masks))
        way = by_hubs[rank[groups]][of]
        units = _in_order(instance, self._units, tours.order[way])
        return Cases(
            units=units,
            head=tours.head[way],
            is_head=np.zeros(units.shape, dtype=np.bool_),
            head_s=head_s,
            caps=instance.caps[0][units],
            token_s=token_s,
            chunk_s=least(tours.chunk_s[by_hubs], groups)[of],
            wire_s=least(tours.wire_s[by_hubs], groups)[of],
            chunk_wire_s=least(tours.chunk_wire_s[by_hubs], groups)[of],
        )

    def _fine_cases(self, boxes: Boxes) -> tuple[Cases, Boxes]:
        """A case for each set that has boxes left and each of its ways, and those boxes."""
        instance, tours = self._instance, self._tours
        alive, row = np.unique(boxes.case, return_inverse=True)
        n_ways = self._n_ways[alive]
        first_case = np.cumsum(n_ways) - n_ways
        which = np.repeat(np.arange(len(alive)), n_ways)
        nth = np.arange(len(which)) - first_case[which]
        way = self._order[self._first[alive][which] + nth]
        units = _in_order(instance, self._units[alive][which], tours.order[way])
        head = tours.head[way]
        caps = instance.caps[0][units]
        caps[:, 0] = instance.caps[1][units[:, 0]]
        cases = Cases(
            units=units,
            head=head,
            is_head=(instance.mask[units] >> head[:, None] & 1).astype(np.bool_),
            head_s=instance.head_s[head],
            caps=caps,
            token_s=tours.token_s[way],
            chunk_s=tours.chunk_s[way],
            wire_s=tours.wire_s[way],
            chunk_wire_s=tours.chunk_wire_s[way],
        )
        copies = np.repeat(np.arange(boxes.n_boxes), n_ways[row])
        nth = np.arange(len(copies)) - np.repeat(np.cumsum(n_ways[row]) - n_ways[row], n_ways[row])
        spread = boxes.take(copies)
        return cases, Boxes(
            first_case[row[copies]] + nth, spread.batch_idx, spread.busy, spread.slow
        )


def _in_order(instance: Instance, units: Ints, order: Ints) -> Ints:
    """[r, k]: units, which are by hub, in the order of their hubs on a way."""
    place = np.argsort(np.argsort(order, axis=1), axis=1)
    found: Ints = np.take_along_axis(units, place, axis=1)
    return found


def _by_orders(instance: Instance, found: Sink, sets: list[UnitSets], max_effort: int) -> bool:
    """Every order of every set, cut in all ways worth having."""
    n_batches, left = len(instance.batches), max_effort
    heads = instance.head_idx
    for of_size in sets:
        k = of_size.units.shape[1]
        for order in permutations(range(k)):
            units = of_size.units[:, list(order)]
            units = units[instance.head_ends[units[:, 0], 0] > 0]
            if not len(units):
                continue
            head = instance.hub[units[:, 0]] if heads is None else np.full(len(units), heads)
            rows = Rows(
                np.repeat(units, n_batches, axis=0),
                np.repeat(head, n_batches),
                np.tile(np.arange(n_batches), len(units)),
                np.repeat(instance.caps[0][units], n_batches, axis=0),
                np.zeros((2, n_batches * len(units))),
            )
            left -= BlockLabels(instance, found).run(rows, max_labels=left)
            if left < 0:
                return False
    return True


def least_busy_s(instance: Instance) -> float:
    """What the busiest device takes per token in any plan, at least.

    As if blocks could be divided at will: a unit keeps its devices busy for what a block takes it,
    and for what they do meanwhile none of them does better than on its own, but for the factor by
    which the best group beats its members.
    """
    bounds = [
        _least_s(instance, instance.decode_s[:, j] / batch, instance.alone_s[:, j] / batch)
        for j, batch in enumerate(instance.batches)
    ]
    return min(bounds)


def least_chunk_s(instance: Instance) -> float:
    """What the slowest chunk takes in any plan, at least; in the same way."""
    return _least_s(instance, instance.chunk_s, instance.alone_chunk_s)


def _least_s(instance: Instance, unit_s: Floats, alone_s: Floats) -> float:
    is_in = instance.mask[:, None] >> np.arange(instance.n_devices) & 1  # [u, d]
    speed = np.where(is_in.any(axis=0), 1.0 / alone_s, 0.0)
    best = (unit_s * (is_in @ speed)).min()
    return float(instance.n_blocks * best / speed.sum()) * _SLIVER
