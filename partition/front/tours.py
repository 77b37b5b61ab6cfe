"""Ways from the head through a set of hubs and back: a travelling salesman's, by label setting.

Where a cut costs the same at every block, what a plan takes is what its units take, in whatever
order they come, and what the way through their hubs takes, however the blocks are spread. So the
ways worth having are found once for each set of hubs: those that no other with the same head beats
in every cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .dominance import thin
from .instance import Floats, Instance, Ints


@dataclass(frozen=True, slots=True)
class Tours:
    """The ways with one number of hubs, column by column; t ways, k hubs, B batches."""

    mask: Ints  # [t]: the hubs, a bit for each
    head: Ints  # [t]
    order: Ints  # [t, k]
    token_s: Floats  # [t, B]: all borders, of a whole batch
    chunk_s: Floats  # [t]: opening, a first chunk there, and the prompt's last token back
    wire_s: Floats  # [t]: of the busiest link, per token
    chunk_wire_s: Floats  # [t]: of the busiest link there, per chunk

    @property
    def n_tours(self) -> int:
        """Ways in all."""
        return len(self.mask)


@dataclass(frozen=True, slots=True)
class _Ways:
    """Labels: ways from a head that end at some hub."""

    state: Ints  # [3, w]: hubs passed, last, head
    cost: Floats  # [5, w]: latency, wire, chunk wire; busiest wire, busiest chunk wire
    order: Ints  # [w, k]


def tours_of(
    instance: Instance, *, least_busy_s: float, least_chunk_s: float, max_hubs: int
) -> list[Tours]:
    """The ways through 1, 2, ... hubs.

    Args:
        instance: only the places of cuts that cost most are looked at, see `is_uniform`.
        least_busy_s: what the busiest device or link takes per token in any plan; a link below
            that is as good as any.
        least_chunk_s: the same of a chunk.
        max_hubs: of one way.
    """
    ways = _seeds(instance)
    found = []
    for _ in range(min(instance.n_devices, max_hubs, instance.n_blocks)):
        ways = _grown(instance, ways, least_busy_s, least_chunk_s)
        if not ways.state.size:
            break
        found.append(_closed(instance, ways, least_busy_s))
    return found


def _seeds(instance: Instance) -> _Ways:
    fixed = instance.head_idx
    heads = np.arange(instance.n_devices) if fixed is None else np.array([fixed])
    state = np.stack([np.zeros_like(heads), heads, heads])
    return _Ways(state, np.zeros((5, len(heads))), np.zeros((len(heads), 0), dtype=np.int64))


def _grown(instance: Instance, ways: _Ways, least_busy_s: float, least_chunk_s: float) -> _Ways:
    hubs = np.unique(instance.hub)
    states, costs, orders = [], [], []
    for e in hubs:
        mask, last, head = ways.state
        able = (mask >> e & 1 == 0) & np.isfinite(instance.latency_s[last, e, -1])
        if instance.head_idx is None:
            able &= (mask != 0) | (head == e)  # the head is the first hub
        rows = np.flatnonzero(able)
        mask, last, head = ways.state[:, rows]
        latency_s, wire_s, chunk_wire_s, busy_s, chunk_busy_s = ways.cost[:, rows]
        hop_s = instance.wire_s[last, e, -1]
        chunk_hop_s = instance.chunk_wire_s[last, e, -1]
        states.append(np.stack([mask | 1 << int(e), np.full_like(last, e), head]))
        costs.append(
            np.stack(
                [
                    latency_s + instance.latency_s[last, e, -1],
                    wire_s + hop_s,
                    chunk_wire_s + chunk_hop_s,
                    np.maximum(np.maximum(busy_s, hop_s), least_busy_s),
                    np.maximum(np.maximum(chunk_busy_s, chunk_hop_s), least_chunk_s),
                ]
            )
        )
        orders.append(np.column_stack([ways.order[rows], np.full(len(rows), e)]))
    state, cost = np.concatenate(states, axis=1), np.concatenate(costs, axis=1)
    order = np.concatenate(orders)
    most = instance.batches[-1]
    # Latency and wire count as one batch or another sees them, nothing between is better.
    seen = np.stack([cost[0] + cost[1], cost[0] + most * cost[1], cost[0] + cost[2], *cost[3:]])
    key = (state[0] * instance.n_devices + state[1]) * instance.n_devices + state[2]
    kept = thin(key, seen)
    return _Ways(state[:, kept], cost[:, kept], order[kept])


def _closed(instance: Instance, ways: _Ways, least_busy_s: float) -> Tours:
    mask, last, head = ways.state
    latency_s, wire_s, chunk_wire_s, busy_s, chunk_busy_s = ways.cost
    back_s, back_wire_s = (table[last, head, -1] for table in (instance.latency_s, instance.wire_s))
    open_s = instance.round_trip_s[head[:, None], ways.order].max(axis=1)
    batches = np.array(instance.batches)
    token_s = (latency_s + back_s)[:, None] + batches * (wire_s + back_wire_s)[:, None]
    chunk_s = open_s + latency_s + chunk_wire_s + back_s + back_wire_s
    busy_s = np.maximum(np.maximum(busy_s, back_wire_s), least_busy_s)
    able = np.flatnonzero(np.isfinite(back_s))
    key = mask[able] * instance.n_devices + head[able]
    seen = np.stack([token_s[:, 0], token_s[:, -1], chunk_s, busy_s, chunk_busy_s])[:, able]
    kept = able[thin(key, seen)]
    return Tours(
        mask=mask[kept],
        head=head[kept],
        order=ways.order[kept],
        token_s=token_s[kept],
        chunk_s=chunk_s[kept],
        wire_s=busy_s[kept],
        chunk_wire_s=chunk_busy_s[kept],
    )
