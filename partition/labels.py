"""Label setting: chains of stages grown one device at a time, only promising ones kept.

A label is a chain that covers blocks `[0, b)`. Its state is (b, set of devices used, last device,
head); its cost is (token sum, first-chunk sum, slowest chunk, busiest resource), which only ever
grows by sums and maxima. So of two labels of one state the dominated one can go, and any label
whose most favourable completion is dominated by a finished chain can go: both are exact.

The favourable completion takes, for each cost on its own, the best the unused devices could do
with the blocks that are left, and the cheapest way on and back. Raising the two maxima of a label
to what its completion must reach anyway changes no finished chain and makes more labels equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .dominance import Cover, Floats, Objectives, front_of, thin
from .instance import Instance, Ints

Chain = tuple[tuple[int, int], ...]  # (device, end of its span), in order

_MAX_NEW = 1 << 19  # labels made in one go: about 100 MiB of temporary arrays
_MAX_COVER = 1024  # finished chains that labels are compared with at once: an 8 MiB table


@dataclass(frozen=True, slots=True)
class _Labels:
    """The labels with one number of stages, column by column."""

    state: Ints  # [5, k]: devices used (a bit each), last device, head, b, row of the parent
    cost: Floats  # [4, k]: token sum, first-chunk sum, slowest chunk, busiest resource
    bound: Floats  # [3, k]: TTFT, TPOT and busy time of the most favourable completion

    def take(self, rows: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> _Labels:
        return _Labels(self.state[:, rows], self.cost[:, rows], self.bound[:, rows])

    @property
    def n_labels(self) -> int:
        return len(self.state[0])


def _joined(parts: list[_Labels]) -> _Labels:
    return _Labels(
        np.concatenate([part.state for part in parts], axis=1),
        np.concatenate([part.cost for part in parts], axis=1),
        np.concatenate([part.bound for part in parts], axis=1),
    )


def _least_sum(per_block_s: Floats, caps: Ints, devices: list[int], n_blocks: int) -> Floats:
    """[R]: the fastest devices filled first; infinite where all together have too little room."""
    fastest = sorted(devices, key=lambda e: per_block_s[e])
    blocks = np.repeat(per_block_s[fastest], caps[fastest])[:n_blocks]
    return _padded(np.cumsum(blocks), n_blocks)


def _least_max(per_block_s: Floats, caps: Ints, devices: list[int], n_blocks: int) -> Floats:
    """[R]: device e ends its j-th block at j * per_block_s[e]; the R-th such end of all."""
    ends = [per_block_s[e] * np.arange(1, caps[e] + 1) for e in devices]
    return _padded(np.sort(np.concatenate([*ends, np.empty(0)]))[:n_blocks], n_blocks)


def _padded(values: Floats, n_blocks: int) -> Floats:
    row = np.full(n_blocks + 1, np.inf)
    row[0] = 0.0
    row[1 : len(values) + 1] = values
    return row


class LabelSearch:
    """One search over one instance."""

    def __init__(self, instance: Instance) -> None:
        """Nothing is searched yet."""
        self._instance = instance
        self._caps = instance.caps()
        self._left = 0  # labels that may still be made
        self._cheapest_hop_s = instance.hop_s.min(axis=2)  # [d, e] over all cuts
        self._cheapest_chunk_hop_s = instance.chunk_hop_s.min(axis=2)
        self._front: list[tuple[Objectives, Chain]] = []
        self._cover: Cover | None = None

    def run(self, *, width: int, max_labels: int) -> bool:
        """Grow chains until none is left, at most `width` labels of each length.

        Returns:
            Whether no label was left out, for `width` or because `max_labels` were made, so that
            `front` is the whole front. Chains found stay, so that a narrow run makes a wide one
            after it faster.
        """
        self._left = max_labels
        complete, levels = True, [self._seeds()]
        while levels[-1].n_labels:
            grown, finished = self._grow(levels[-1])
            self._record(finished, levels)
            if self._left < 0:
                return False
            if self._cover is not None:
                grown = grown.take(~self._cover.dominates(*grown.bound))
            if grown.n_labels > width:
                complete, grown = False, grown.take(_most_promising(grown.bound, width))
            levels.append(grown)
        return complete

    @property
    def front(self) -> list[tuple[Objectives, Chain]]:
        """Chains that no other found chain dominates, least TTFT first."""
        return list(self._front)

    def _seeds(self) -> _Labels:
        """For each possible head, the label that covers nothing yet."""
        instance = self._instance
        fixed = instance.head_idx
        heads = np.arange(instance.n_devices) if fixed is None else np.array([fixed])
        zero = np.zeros_like(heads)
        cost = np.zeros((4, len(heads)))
        # The head works on every token; where it is a stage as well, both add up.
        cost[0] = cost[3] = instance.head_s[heads]
        return _Labels(np.stack([zero, heads, heads, zero, zero]), cost, np.zeros((3, len(heads))))

    def _grow(self, labels: _Labels) -> tuple[_Labels, list[_Labels]]:
        """Put each unused device with each possible span behind each label."""
        partial: list[_Labels] = [labels.take(np.empty(0, dtype=np.intp))]
        finished: list[_Labels] = []
        for e in range(self._instance.n_devices):
            rows, counts = self._reachable(labels, e)
            # Cut into batches by the number of labels they make.
            batch = np.cumsum(counts) // _MAX_NEW
            for which in np.unique(batch):
                part = self._extended(labels, rows[batch == which], counts[batch == which], e)
                self._left -= part.n_labels
                done = part.state[3] == self._instance.n_blocks
                finished.append(self._closed(part.take(done)))
                partial.append(self._promising(part.take(~done)))
            if self._left < 0:
                return partial[0], finished
        merged = _joined(partial)
        return merged.take(thin(_state_key(merged.state), merged.cost)), finished

    def _reachable(self, labels: _Labels, e: int) -> tuple[npt.NDArray[np.intp], Ints]:
        """Rows that `e` can follow, and how many spans it can run there."""
        mask, last, head, block, _ = labels.state
        instance = self._instance
        able = (mask >> e & 1 == 0) & np.isfinite(instance.hop_s[last, e, block])
        if instance.head_idx is None:
            able &= (mask != 0) | (head == e)  # the head is the first stage
        rows = np.flatnonzero(able)
        counts = instance.ends_of(e, block[rows], head[rows] == e) - block[rows]
        return rows[counts > 0], counts[counts > 0]

    def _extended(
        self, labels: _Labels, rows: npt.NDArray[np.intp], counts: Ints, e: int
    ) -> _Labels:
        instance = self._instance
        parent = np.repeat(rows, counts)
        # 1..count for each row in turn.
        n = np.arange(1, len(parent) + 1) - np.repeat(np.cumsum(counts) - counts, counts)
        mask, last, head, block, _ = labels.state[:, parent]
        token_s, first_s, slowest_s, busiest_s = labels.cost[:, parent]
        head_s = np.where(head == e, instance.head_s[e], 0.0)
        decode_s, chunk_s = n * instance.decode_s[e], n * instance.chunk_s[e]
        wire_s = instance.wire_s[last, e, block]
        chunk_wire_s = instance.chunk_wire_s[last, e, block]
        cost = np.stack(
            [
                token_s + instance.hop_s[last, e, block] + decode_s,
                first_s + instance.chunk_hop_s[last, e, block] + chunk_s,
                np.maximum(slowest_s, np.maximum(chunk_wire_s, chunk_s)),
                np.maximum(busiest_s, np.maximum(wire_s, decode_s + head_s)),
            ]
        )
        state = np.stack([mask | 1 << e, np.full_like(head, e), head, block + n, parent])
        return _Labels(state, cost, np.zeros((3, len(parent))))

    def _closed(self, labels: _Labels) -> _Labels:
        """Finished chains with the way back to the head; `bound` is what they really cost."""
        instance = self._instance
        _, last, head, block, _ = labels.state
        back_s = instance.hop_s[last, head, block]
        wire_s = instance.wire_s[last, head, block]
        able = np.isfinite(back_s)
        labels, back_s, wire_s = labels.take(able), back_s[able], wire_s[able]
        objectives = self._objectives(labels.state[2], labels.cost, back_s, wire_s)
        return _Labels(labels.state, labels.cost, objectives)

    def _objectives(self, head: Ints, cost: Floats, back_s: Floats, wire_s: Floats) -> Floats:
        """[3, k]: TTFT, TPOT and busy time, given the way back."""
        token_s, first_s, slowest_s, busiest_s = cost
        tpot_s = token_s + back_s
        chunks_s = first_s + (self._instance.n_chunks - 1) * slowest_s
        ttft_s = chunks_s + back_s + self._instance.head_s[head]
        session_s = tpot_s / self._instance.n_sessions
        return np.stack([ttft_s, tpot_s, np.maximum(np.maximum(busiest_s, wire_s), session_s)])

    def _promising(self, labels: _Labels) -> _Labels:
        """Bound the labels, raise their maxima, and drop those a finished chain dominates."""
        instance = self._instance
        masks, row = np.unique(labels.state[0], return_inverse=True)
        rest = self._remainder(masks)
        _, last, head, block, _ = labels.state
        left = instance.n_blocks - block
        on_s = self._cheapest(self._cheapest_hop_s, masks)[row, last]
        chunk_on_s = self._cheapest(self._cheapest_chunk_hop_s, masks)[row, last]
        back_s = self._cheapest(self._cheapest_hop_s.T, masks)[row, head]
        token_s, first_s, slowest_s, busiest_s = labels.cost
        raised = np.stack(
            [
                token_s + rest[0, row, left] + on_s,
                first_s + rest[1, row, left] + chunk_on_s,
                np.maximum(slowest_s, rest[3, row, left]),
                np.maximum(busiest_s, rest[2, row, left]),
            ]
        )
        able = np.isfinite(raised[0] + back_s)  # the others have nowhere to go
        labels, raised, back_s = labels.take(able), raised[:, able], back_s[able]
        bound = self._objectives(labels.state[2], raised, back_s, np.zeros_like(back_s))
        cost = np.stack([labels.cost[0], labels.cost[1], raised[2], bound[2]])
        bounded = _Labels(labels.state, cost, bound)
        if self._cover is None:
            return bounded
        return bounded.take(~self._cover.dominates(*bound))

    def _remainder(self, masks: Ints) -> Floats:
        """[4, m, R]: the least that devices outside each mask can do with R blocks.

        Token sum, chunk sum, largest token time of a device, largest chunk time of a device.
        """
        n_blocks, caps = self._instance.n_blocks, self._caps
        table = np.full((4, len(masks), n_blocks + 1), np.inf)
        for i, mask in enumerate(masks):
            unused = [e for e in range(self._instance.n_devices) if not mask >> e & 1]
            for j, per_block_s in enumerate((self._instance.decode_s, self._instance.chunk_s)):
                table[j, i] = _least_sum(per_block_s, caps, unused, n_blocks)
                table[j + 2, i] = _least_max(per_block_s, caps, unused, n_blocks)
        return table

    def _cheapest(self, hop_s: Floats, masks: Ints) -> Floats:
        """[m, d]: least of hop_s[d, e] over the devices e that each mask leaves unused."""
        n_devices = self._instance.n_devices
        unused = masks[:, None] >> np.arange(n_devices) & 1 == 0  # [m, e]
        return np.stack(
            [np.where(unused, hop_s[d], np.inf).min(axis=1) for d in range(n_devices)], axis=1
        )

    def _record(self, finished: list[_Labels], levels: list[_Labels]) -> None:
        """Merge finished chains into the front and rebuild the cover from it."""
        found = list(self._front)
        for labels in finished:
            rows = np.arange(labels.n_labels)
            if self._cover is not None:
                rows = rows[~self._cover.dominates(*labels.bound)]
            points = [(float(a), float(b), float(c)) for a, b, c in labels.bound[:, rows].T]
            found += [
                (points[i], _chain(labels.state[:, rows[i]], levels)) for i in front_of(points)
            ]
        found.sort(key=lambda item: (item[0], len(item[1]), item[1]))
        self._front = [found[i] for i in front_of([objectives for objectives, _ in found])]
        if self._front:
            step = -(-len(self._front) // _MAX_COVER)
            self._cover = Cover(np.array([point for point, _ in self._front[::step]]))


def _chain(state: Ints, levels: list[_Labels]) -> Chain:
    """Follow the parents of a label back to its seed."""
    chain: list[tuple[int, int]] = []
    for level in reversed(levels):
        _, last, _, block, parent = (int(value) for value in state)
        chain.append((last, block))
        state = level.state[:, parent]
    return tuple(reversed(chain))


def _state_key(state: Ints) -> Ints:
    """A number per label, equal where (mask, last, head, b) are."""
    _, mask = np.unique(state[0], return_inverse=True)
    key: Ints = mask.astype(np.int64)
    for column in state[1:4]:
        key = key * (column.max(initial=0) + 1) + column
    return key


def _most_promising(bound: Floats, width: int) -> npt.NDArray[np.intp]:
    """Rows that are best in one objective or in their product, about a quarter of `width` each."""
    rankings = [*bound, bound[0] * bound[1] * bound[2]]
    best = [np.argsort(ranking, kind="stable")[: width // len(rankings)] for ranking in rankings]
    return np.unique(np.concatenate(best))
