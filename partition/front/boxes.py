"""Branch and bound over how busy a pipeline may be, for many sets of units at once.

Where no cost depends on the order of spans (see `Instance.is_uniform`), one number decides how the
blocks of a set of units are best spread: the time that none of them may exceed. Within that limit
each unit has a cap, and the least sum is had by filling the cheapest units up to theirs. So a box
is a set of units and a range of that time; of what falls in it, the best imaginable is its lower
end with the sums that its upper end allows. A box that something known is no worse than goes;
another is cut in two, until it holds a single value. A prompt of several chunks adds a second such
time, that of its slowest chunk.

Mostly the spread that is best for one sum is best for all. A last box where it is not goes to
`BlockLabels`, with the caps that it has left.

Sets of units come first, at their most favourable: with the cheapest head and the cheapest way
through their hubs. What is left of them then goes with every head and way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from covey.partition.speed import GRID_S

from .chains import Chains, Sink, fits
from .filling import caps_within, filled
from .instance import Bools, Floats, Instance, Ints
from .labels import BlockLabels, Rows

_SLICE = 1 << 16  # boxes in one go
NEAR = 2.0  # upper over lower end of small boxes that are finished together
COARSE = 1.15  # upper over lower end of a box from which on heads and ways are told apart


@dataclass(frozen=True, slots=True)
class Cases:
    """r sets of k units, each with all that does not depend on how blocks are spread."""

    units: Ints  # [r, k] in order; of a coarse case in any
    head: Ints  # [r]; of a coarse case one that it may have
    is_head: Bools  # [r, k]: whose busy time has the head's work in it; of a coarse case nobody's
    head_s: Floats  # [r, B]
    caps: Ints  # [r, k]
    token_s: Floats  # [r, B] all borders
    chunk_s: Floats  # [r] all borders
    wire_s: Floats  # [r] the busiest
    chunk_wire_s: Floats  # [r] the busiest

    def take(self, rows: Ints | Bools) -> Cases:
        """Those of the rows."""
        return Cases(*(getattr(self, name)[rows] for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class Boxes:
    """x boxes: ranges of the busiest unit's time per token and of the slowest chunk's, ends too."""

    case: Ints  # [x]
    batch_idx: Ints  # [x]
    busy: Floats  # [2, x] seconds
    slow: Floats  # [2, x] seconds

    def take(self, rows: Ints | Bools) -> Boxes:
        """Those of the rows."""
        return Boxes(self.case[rows], self.batch_idx[rows], self.busy[:, rows], self.slow[:, rows])

    @property
    def n_boxes(self) -> int:
        """Boxes in all."""
        return len(self.case)

    def sliced(self) -> Iterator[Boxes]:
        """The same in parts that do not take much memory."""
        for start in range(0, self.n_boxes, _SLICE):
            yield self.take(np.arange(start, min(start + _SLICE, self.n_boxes)))


def joined(parts: list[Boxes]) -> Boxes:
    """All boxes of the parts."""
    return Boxes(
        np.concatenate([part.case for part in parts]),
        np.concatenate([part.batch_idx for part in parts]),
        np.concatenate([part.busy for part in parts], axis=1),
        np.concatenate([part.slow for part in parts], axis=1),
    )


def whole(n_cases: int, n_batches: int, *, least_busy_s: float, least_slow_s: float) -> Boxes:
    """One box for each case and batch, with everything in it; 0 for `least_slow_s` leaves the
    slowest chunk out of it."""
    case = np.repeat(np.arange(n_cases), n_batches)
    high = np.full(len(case), np.inf)
    return Boxes(
        case,
        np.tile(np.arange(n_batches), n_cases),
        np.stack([np.full(len(case), least_busy_s), high]),
        np.stack([np.full(len(case), least_slow_s), high if least_slow_s else np.zeros(len(case))]),
    )


@dataclass(frozen=True, slots=True)
class _Looked:
    """What there is to say about boxes."""

    boxes: Boxes  # those that may hold something, their ends drawn in
    bound: Floats  # [3, x]
    caps: Ints  # [x, k]


class BoxSearch:
    """Looks into boxes of one number of units."""

    def __init__(self, instance: Instance, found: Sink, cases: Cases, *, is_coarse: bool) -> None:
        """What is found goes into `found`."""
        self._instance, self._found, self._cases = instance, found, cases
        self._is_coarse = is_coarse
        self._batches = np.array(instance.batches)
        self._has_chunks = instance.n_chunks > 1

    def step(self, boxes: Boxes) -> tuple[Boxes, Boxes, int]:
        """Look at each box once.

        Returns:
            Boxes to look at again; those that are as small as they get here; and the labels that
            were made for others that this finishes.
        """
        again, small = [boxes.take(np.empty(0, dtype=np.int64))], []
        for part in boxes.sliced():
            looked = self._kept(self._look(part))
            if not looked.boxes.n_boxes:
                continue
            self._try(looked)
            looked = self._kept(looked)
            is_small = self._is_small(looked.boxes)
            small.append(looked.boxes.take(is_small))
            again += _halved(looked.boxes.take(~is_small))
        return joined(again), joined(small or again[:1]), sum(part.n_boxes for part in again)

    def finish(self, boxes: Boxes, *, max_labels: int) -> int:
        """Cut what falls in the boxes in all ways worth having; the labels made for it."""
        n_made = 0
        for part in _merged(boxes).sliced():
            looked = self._kept(self._look(part))
            if not looked.boxes.n_boxes:
                continue
            case = looked.boxes.case
            rows = Rows(
                self._cases.units[case],
                self._cases.head[case],
                looked.boxes.batch_idx,
                looked.caps,
                np.stack([looked.boxes.busy[0], looked.boxes.slow[0]]),
            )
            labels = BlockLabels(self._instance, self._found)
            n_made += labels.run(rows, max_labels=max_labels - n_made)
            if n_made > max_labels:
                break
        return n_made

    def bounds(self, boxes: Boxes) -> Floats:
        """[3, x]: the best imaginable of each box that may hold something."""
        parts = [self._look(part).bound for part in boxes.sliced()]
        return np.concatenate(parts, axis=1) if parts else np.empty((3, 0))

    def _kept(self, looked: _Looked) -> _Looked:
        units = self._cases.units[looked.boxes.case]
        rows = np.flatnonzero(~self._found.dominates(looked.bound, units))
        return _Looked(looked.boxes.take(rows), looked.bound[:, rows], looked.caps[rows])

    def _look(self, boxes: Boxes) -> _Looked:
        """Bound the boxes, and drop those that hold nothing."""
        instance, cases = self._instance, self._cases.take(boxes.case)
        j, units, n_blocks = boxes.batch_idx, cases.units, instance.n_blocks
        rows = np.arange(boxes.n_boxes)
        batch = self._batches[j][:, None]
        decode_s = instance.decode_s[units, j[:, None]]
        chunk_s, overhead_s = instance.chunk_s[units], instance.overhead_s[units]
        head_s = cases.head_s[rows, j]
        fixed_s = overhead_s + head_s[:, None] * cases.is_head
        caps = caps_within(boxes.busy[1][:, None] * batch, fixed_s, decode_s, cases.caps)
        if self._has_chunks:
            caps = caps_within(boxes.slow[1][:, None], overhead_s, chunk_s, caps)
        busy = _drawn_in(boxes.busy, fixed_s, decode_s, batch, caps)
        if self._is_coarse:  # the head's work may come on top of any unit's
            least_s = np.maximum(boxes.busy[0], ((fixed_s + decode_s) / batch).max(axis=1))
            most_s = busy[1] + (instance.head_s[:, j] / self._batches[j]).max(axis=0)
            busy = np.stack([least_s, np.minimum(boxes.busy[1], most_s)])
        slow = boxes.slow
        if self._has_chunks:
            slow = _drawn_in(boxes.slow, overhead_s, chunk_s, 1, caps)
        may = (caps.min(axis=1) > 0) & (caps.sum(axis=1) >= n_blocks)
        kept = np.flatnonzero(may & (busy[0] <= busy[1]) & (slow[0] <= slow[1]))
        boxes = Boxes(boxes.case[kept], j[kept], busy[:, kept], slow[:, kept])
        cases, caps, j = cases.take(kept), caps[kept], j[kept]
        return _Looked(boxes, self._bound(cases, boxes, caps), caps)

    def _bound(self, cases: Cases, boxes: Boxes, caps: Ints) -> Floats:
        instance, units = self._instance, cases.units
        rows, j = np.arange(boxes.n_boxes), boxes.batch_idx
        overhead_s = instance.overhead_s[units].sum(axis=1)
        reads_s = instance.least_reads_s(units, instance.n_blocks)

        def least_s(per_block_s: Floats) -> Floats:
            n = filled(per_block_s, caps, instance.n_blocks)
            total: Floats = np.maximum((n * per_block_s).sum(axis=1) + overhead_s, reads_s)
            return total

        decode_s = instance.decode_s[units]
        tpot_s = least_s(decode_s[:, :, 0]) + cases.token_s[:, 0] + cases.head_s[:, 0]
        cycle_s = least_s(np.take_along_axis(decode_s, j[:, None, None], axis=2)[:, :, 0])
        cycle_s += cases.token_s[rows, j] + cases.head_s[rows, j]
        ttft_s = least_s(instance.chunk_s[units]) + cases.chunk_s + cases.head_s[:, 0]
        if self._has_chunks:
            slowest_s = np.maximum(boxes.slow[0], cases.chunk_wire_s)
            ttft_s += (instance.n_chunks - 1) * slowest_s
        busy_s = np.maximum(boxes.busy[0], cases.head_s[rows, j] / self._batches[j])
        busy_s = np.maximum(busy_s, cases.wire_s)
        return np.stack([ttft_s, tpot_s, np.maximum(busy_s, cycle_s / instance.n_sessions)])

    def _try(self, looked: _Looked) -> None:
        """Find what each box's limits lead to, filled by one sum and by another."""
        instance, boxes = self._instance, looked.boxes
        units = self._cases.units[boxes.case]
        head = self._cases.head[boxes.case]
        sums = (
            instance.decode_s[units, 0],
            instance.chunk_s[units],
            instance.decode_s[units, boxes.batch_idx[:, None]],
        )
        by_token = filled(sums[0], looked.caps, instance.n_blocks)
        for idx, per_block_s in enumerate(sums):
            n = filled(per_block_s, looked.caps, instance.n_blocks) if idx else by_token
            new = (n != by_token).any(axis=1) if idx else np.ones(len(n), dtype=np.bool_)
            chains = Chains(units[new], head[new], n[new])
            if self._is_coarse:
                chains = chains.take(fits(instance, chains))
            self._found.add(chains)

    def _is_small(self, boxes: Boxes) -> Bools:
        if self._is_coarse:
            small: Bools = boxes.busy[1] <= COARSE * boxes.busy[0]
            return small
        single: Bools = (boxes.busy[0] == boxes.busy[1]) & (boxes.slow[0] == boxes.slow[1])
        return single


def _drawn_in(
    ends_s: Floats, fixed_s: Floats, per_block_s: Floats, batch: Ints | int, caps: Ints
) -> Floats:
    """[2, x]: the least value from the lower end on, and the greatest within the caps."""
    below_s = np.nextafter(ends_s[0], 0.0)[:, None] * batch
    below = caps_within(below_s, fixed_s, per_block_s, caps)
    next_s = np.where(below < caps, (fixed_s + (below + 1) * per_block_s) / batch, np.inf)
    # Nobody has less than a block.
    least_s = np.maximum(next_s.min(axis=1), ((fixed_s + per_block_s) / batch).max(axis=1))
    most_s = ((fixed_s + caps * per_block_s) / batch).max(axis=1)
    return np.stack([least_s, most_s])


def _merged(boxes: Boxes) -> Boxes:
    """Boxes of one case and batch as one where they are near each other, so that labels are made
    once for them."""
    near = [
        np.floor(np.log(np.clip(ends_s[1], GRID_S, 1 / GRID_S)) / np.log(NEAR)).astype(np.int64)
        for ends_s in (boxes.busy, boxes.slow)
    ]
    keys, which = np.unique(
        np.stack([boxes.case, boxes.batch_idx, *near]), axis=1, return_inverse=True
    )
    ends_s = np.zeros((2, 2, keys.shape[1]))
    ends_s[:, 0] = np.inf
    for merged_s, each_s in zip(ends_s, (boxes.busy, boxes.slow), strict=True):
        np.minimum.at(merged_s[0], which, each_s[0])
        np.maximum.at(merged_s[1], which, each_s[1])
    return Boxes(keys[0], keys[1], ends_s[0], ends_s[1])


def _halved(boxes: Boxes) -> list[Boxes]:
    """Each box in two, along its longer side."""
    (busy_lo, busy_hi), (slow_lo, slow_hi) = boxes.busy, boxes.slow
    along_slow = slow_hi * busy_lo > busy_hi * slow_lo
    busy_mid = np.clip(np.sqrt(busy_lo * busy_hi), busy_lo, np.nextafter(busy_hi, 0.0))
    slow_mid = np.sqrt(slow_lo) * np.sqrt(slow_hi)
    slow_mid = np.clip(slow_mid, slow_lo, np.nextafter(slow_hi, 0.0))
    busy_next, slow_next = np.nextafter(busy_mid, np.inf), np.nextafter(slow_mid, np.inf)
    lower = Boxes(
        boxes.case,
        boxes.batch_idx,
        np.stack([busy_lo, np.where(along_slow, busy_hi, busy_mid)]),
        np.stack([slow_lo, np.where(along_slow, slow_mid, slow_hi)]),
    )
    upper = Boxes(
        boxes.case,
        boxes.batch_idx,
        np.stack([np.where(along_slow, busy_lo, busy_next), busy_hi]),
        np.stack([np.where(along_slow, slow_next, slow_lo), slow_hi]),
    )
    return [lower, upper]
