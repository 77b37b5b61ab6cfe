"""Label setting over blocks: where to cut between units whose order is given.

A label covers blocks `[0, b)` with the first units of its row. Its cost is (token sum, chunk sum,
sum of a batch, slowest chunk, busiest resource), which only ever grows by sums and maxima. So of
two labels of one row and block the dominated one can go, and so can any label whose most favourable
completion is no better than a pipeline that is known: both are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .chains import Chains, Sink
from .dominance import thin
from .filling import filled
from .instance import Floats, Instance, Ints

_MAX_NEW = 1 << 18  # labels made in one go: about 60 MiB of temporary arrays


@dataclass(frozen=True, slots=True)
class Rows:
    """Questions of one number of units, r in all: which spans may be worth having."""

    units: Ints  # [r, k] in order
    head: Ints  # [r]
    batch_idx: Ints  # [r]: in which batches the sessions go round
    caps: Ints  # [r, k]: no span may be longer
    least_s: Floats  # [2, r]: how busy the busiest is, and how slow the slowest chunk, at least

    def take(self, rows: Ints) -> Rows:
        """Those of the rows."""
        return Rows(
            self.units[rows],
            self.head[rows],
            self.batch_idx[rows],
            self.caps[rows],
            self.least_s[:, rows],
        )


@dataclass(frozen=True, slots=True)
class _Labels:
    row: Ints  # [l]
    block: Ints  # [l]: covered so far
    cost: Floats  # [5, l]
    spans: Ints  # [l, i]: their numbers of blocks


class BlockLabels:
    """Cuts the rows' pipelines in all ways worth having."""

    def __init__(self, instance: Instance, found: Sink) -> None:
        """What is found goes into `found`."""
        self._instance, self._found = instance, found
        self._least_latency_s = instance.latency_s.min(axis=2)
        self._least_wire_s = instance.wire_s.min(axis=2)
        self._least_chunk_wire_s = instance.chunk_wire_s.min(axis=2)

    def run(self, rows: Rows, *, max_labels: int) -> int:
        """Labels made; if more than `max_labels`, not all were looked at."""
        n_made, k = 0, rows.units.shape[1]
        labels = self._seeds(rows)
        rest = self._rest_s(rows)
        for i in range(k):
            parts = [
                self._promising(rows, part, i, rest[i + 1])
                for part in self._extended(rows, labels, i)
            ]
            n_made += sum(n_new for n_new, _ in parts)
            kept = [part for _, part in parts]
            if not kept or n_made > max_labels:
                return n_made
            labels = _Labels(
                np.concatenate([part.row for part in kept]),
                np.concatenate([part.block for part in kept]),
                np.concatenate([part.cost for part in kept], axis=1),
                np.concatenate([part.spans for part in kept]),
            )
            order = thin(labels.row * (self._instance.n_blocks + 1) + labels.block, labels.cost)
            labels = _taken(labels, order)
        self._found.add(Chains(rows.units[labels.row], rows.head[labels.row], labels.spans))
        return n_made

    def _seeds(self, rows: Rows) -> _Labels:
        n_rows = len(rows.head)
        cost = np.zeros((5, n_rows))
        cost[0] = cost[1] = self._instance.head_s[rows.head, 0]
        hubs = self._instance.hub[rows.units]
        cost[1] += self._instance.round_trip_s[rows.head[:, None], hubs].max(axis=1)
        cost[2] = self._instance.head_s[rows.head, rows.batch_idx]
        cost[3] = rows.least_s[1]
        cost[4] = np.maximum(rows.least_s[0], cost[2] / self._batch(rows))
        spans = np.zeros((n_rows, 0), dtype=np.int64)
        return _Labels(np.arange(n_rows), np.zeros(n_rows, dtype=np.int64), cost, spans)

    def _batch(self, rows: Rows) -> Ints:
        return np.array(self._instance.batches)[rows.batch_idx]

    def _extended(self, rows: Rows, labels: _Labels, i: int) -> list[_Labels]:
        """Each label with each span that unit `i` of its row could run next."""
        instance, k = self._instance, rows.units.shape[1]
        unit = rows.units[labels.row, i]
        ends = instance.head_ends if i == 0 else instance.ends
        left = instance.n_blocks - labels.block
        later = rows.caps[labels.row, i + 1 :].sum(axis=1)
        most = np.minimum(ends[unit, labels.block] - labels.block, left - (k - 1 - i))
        most = np.minimum(most, rows.caps[labels.row, i])
        least = np.maximum(left - later, 1)
        counts = np.maximum(most - least + 1, 0)
        batches = np.cumsum(counts) // _MAX_NEW
        parts = []
        for which in np.unique(batches[counts > 0]):
            here = np.flatnonzero((batches == which) & (counts > 0))
            parent = np.repeat(here, counts[here])
            nth = np.arange(len(parent)) - np.repeat(
                np.cumsum(counts[here]) - counts[here], counts[here]
            )
            parts.append(self._with_span(rows, _taken(labels, parent), i, least[parent] + nth))
        return parts

    def _with_span(self, rows: Rows, labels: _Labels, i: int, n: Ints) -> _Labels:
        """The labels with `n` blocks more."""
        instance, row, block = self._instance, labels.row, labels.block
        unit, head, j = rows.units[row, i], rows.head[row], rows.batch_idx[row]
        hub = instance.hub[unit]
        sender = head if i == 0 else instance.hub[rows.units[row, i - 1]]
        batch = self._batch(rows)[row]
        latency_s = instance.latency_s[sender, hub, block]
        wire_s = instance.wire_s[sender, hub, block]
        chunk_wire_s = instance.chunk_wire_s[sender, hub, block]
        overhead_s = instance.overhead_s[unit]
        read_s = instance.reads(unit, block, n, is_first=i == 0)
        chunk_s = np.maximum(overhead_s + n * instance.chunk_s[unit], read_s)
        step_s = np.maximum(overhead_s + n * instance.decode_s[unit, j], read_s)
        token_s = np.maximum(overhead_s + n * instance.decode_s[unit, 0], read_s)
        is_head = instance.mask[unit] >> head & 1
        busy_s = np.maximum(wire_s, (step_s + is_head * instance.head_s[head, j]) / batch)
        cost = np.stack(
            [
                labels.cost[0] + (latency_s + wire_s) + token_s,
                labels.cost[1] + (latency_s + chunk_wire_s) + chunk_s,
                labels.cost[2] + (latency_s + batch * wire_s) + step_s,
                np.maximum(labels.cost[3], np.maximum(chunk_wire_s, chunk_s)),
                np.maximum(labels.cost[4], busy_s),
            ]
        )
        return _Labels(row, block + n, cost, np.column_stack([labels.spans, n]))

    def _promising(
        self, rows: Rows, labels: _Labels, i: int, rest_s: Floats
    ) -> tuple[int, _Labels]:
        """How many there are, and those that nothing found dominates, at their most favourable."""
        instance, row = self._instance, labels.row
        later = rows.units[row, i + 1 :]
        left = instance.n_blocks - labels.block
        sums_s = labels.cost[:3] + rest_s[:, row]
        if later.shape[1]:
            hops_s = sums_s - instance.overhead_s[later].sum(axis=1)
            caps = rows.caps[row, i + 1 :]
            for entry, per_block_s in enumerate(
                (
                    instance.decode_s[later, 0],
                    instance.chunk_s[later],
                    instance.decode_s[later, rows.batch_idx[row][:, None]],
                )
            ):
                n = filled(per_block_s, caps, left)
                sums_s[entry] += (n * per_block_s).sum(axis=1)
            if instance.read_s is not None:  # a step takes no less than its disk does
                sums_s = np.maximum(sums_s, hops_s + instance.least_reads_s(later, left))
        ttft_s = sums_s[1] + (instance.n_chunks - 1) * labels.cost[3]
        full_s = np.maximum(labels.cost[4], sums_s[2] / instance.n_sessions)
        bounds = np.stack([ttft_s, sums_s[0], full_s])
        kept = np.flatnonzero(~self._found.dominates(bounds, rows.units[row]))
        return len(row), _taken(labels, kept)

    def _rest_s(self, rows: Rows) -> Floats:
        """[k + 1, 3, r]: of the sums, what is sure to come after the first i units, blocks apart:
        the units' overhead, the ways between them and back."""
        instance, (n_rows, k) = self._instance, rows.units.shape
        hubs = np.column_stack([rows.head, instance.hub[rows.units], rows.head])
        latency_s = self._least_latency_s[hubs[:, :-1], hubs[:, 1:]]
        wire_s = self._least_wire_s[hubs[:, :-1], hubs[:, 1:]]
        chunk_wire_s = self._least_chunk_wire_s[hubs[:, :-1], hubs[:, 1:]].copy()
        chunk_wire_s[:, -1] = wire_s[:, -1]  # one position of a prompt goes back
        hops_s = np.stack(
            [
                latency_s + wire_s,
                latency_s + chunk_wire_s,
                latency_s + self._batch(rows)[:, None] * wire_s,
            ]
        )
        rest_s = np.zeros((k + 1, 3, n_rows))
        rest_s[k] = hops_s[:, :, k]
        for i in reversed(range(k)):
            rest_s[i] = rest_s[i + 1] + hops_s[:, :, i] + instance.overhead_s[rows.units[:, i]]
        return rest_s


def _taken(labels: _Labels, rows: Ints) -> _Labels:
    return _Labels(labels.row[rows], labels.block[rows], labels.cost[:, rows], labels.spans[rows])
