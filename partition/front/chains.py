"""Pipelines, many at once, by the numbers of their units: what they do, and the best so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .dominance import Bools, Cover, Objectives, front_of, thin
from .instance import Floats, Instance, Ints

_MAX_COVER = 1500  # points that bounds are compared with at once: an 18 MiB table


@dataclass(frozen=True, slots=True)
class Chains:
    """c pipelines of k units each, in order."""

    units: Ints  # [c, k]
    head: Ints  # [c] device
    n_blocks: Ints  # [c, k] of each span

    def take(self, rows: Ints | Bools) -> Chains:
        """Those of the rows."""
        return Chains(self.units[rows], self.head[rows], self.n_blocks[rows])

    def one(self, row: int) -> Chain:
        """That of one row."""
        return Chain(
            tuple(int(unit) for unit in self.units[row]),
            int(self.head[row]),
            tuple(int(n) for n in self.n_blocks[row]),
        )


@dataclass(frozen=True, slots=True, order=True)
class Chain:
    """One of them, as plain numbers."""

    units: tuple[int, ...]
    head: int
    n_blocks: tuple[int, ...]


def objectives(instance: Instance, chains: Chains) -> Floats:
    """[3, c]: TTFT, TPOT and seconds per token of all sessions, as `Terms` has them; infinite where
    a link is missing. Whether spans fit is not looked at."""
    units, head, n = chains.units, chains.head, chains.n_blocks
    hubs = instance.hub[units]
    senders = np.concatenate([head[:, None], hubs[:, :-1]], axis=1)
    cuts = np.cumsum(n, axis=1) - n
    latency_s, wire_s, chunk_wire_s = (
        table[senders, hubs, cuts]
        for table in (instance.latency_s, instance.wire_s, instance.chunk_wire_s)
    )
    back_s = instance.latency_s[hubs[:, -1], head, -1]
    back_wire_s = instance.wire_s[hubs[:, -1], head, -1]
    overhead_s = instance.overhead_s[units]
    is_first = np.arange(n.shape[1]) == 0
    read_s = instance.reads(units, cuts, n, is_first=is_first)
    chunks_s = np.maximum(overhead_s + n * instance.chunk_s[units], read_s)
    slowest_s = np.maximum(chunks_s.max(axis=1), chunk_wire_s.max(axis=1))
    ttft_s = (
        instance.round_trip_s[head[:, None], hubs].max(axis=1)
        + chunks_s.sum(axis=1)
        + (latency_s + chunk_wire_s).sum(axis=1)
        + (instance.n_chunks - 1) * slowest_s
        + back_s
        + back_wire_s
        + instance.head_s[head, 0]
    )
    is_head = (instance.mask[units] >> head[:, None] & 1).astype(np.bool_)
    busiest_wire_s = np.maximum(wire_s.max(axis=1), back_wire_s)
    tpot_s = full_s = np.full(len(head), np.inf)
    for j, batch in enumerate(instance.batches):
        steps_s = np.maximum(overhead_s + n * instance.decode_s[units, j], read_s)
        head_s = instance.head_s[head, j]
        hops_s = (latency_s + batch * wire_s).sum(axis=1) + (back_s + batch * back_wire_s)
        cycle_s = head_s + steps_s.sum(axis=1) + hops_s
        busy_s = (steps_s + head_s[:, None] * is_head).max(axis=1)
        busy_s = np.maximum(np.maximum(busy_s, head_s) / batch, busiest_wire_s)
        full_s = np.minimum(full_s, np.maximum(busy_s, cycle_s / instance.n_sessions))
        if j == 0:
            tpot_s = cycle_s
    return np.stack([ttft_s, tpot_s, full_s])


def fits(instance: Instance, chains: Chains) -> Bools:
    """[c]: whether each span fits where it is."""
    ends = np.cumsum(chains.n_blocks, axis=1)
    starts = ends - chains.n_blocks
    far = instance.ends[chains.units, starts]
    far[:, 0] = instance.head_ends[chains.units[:, 0], 0]
    held: Bools = (ends <= far).all(axis=1)
    return held


class Sink(Protocol):
    """What a search looks for: it keeps what is worth having, and says what is not."""

    def add(self, chains: Chains) -> None:
        """Take in chains that fit."""

    def dominates(self, bounds: Floats, units: Ints) -> Bools:
        """[c]: is there something no worse than any chain of the units [c, k], in whatever order,
        whose TTFT, TPOT and seconds per token are no less than `bounds` [3, c]."""


class Found:
    """The front of all that was found so far."""

    def __init__(self, instance: Instance) -> None:
        """Nothing is found yet."""
        self._instance = instance
        self._cover: Cover | None = None
        self.front: list[tuple[Objectives, Chain]] = []  # least TTFT first

    def add(self, chains: Chains) -> None:
        """Take in chains that fit; what is no better than what is known is forgotten."""
        points = objectives(self._instance, chains)
        is_new = ~self.dominates(points, chains.units)
        news = np.flatnonzero(np.isfinite(points).all(axis=0) & is_new)
        if not len(news):
            return
        news = news[thin(np.zeros(len(news), dtype=np.int64), points[:, news])]
        found = list(self.front)
        for row in news[np.argsort(news, kind="stable")]:
            first, second, third = (float(value) for value in points[:, row])
            found.append(((first, second, third), chains.one(int(row))))
        self.front = [found[i] for i in front_of([point for point, _ in found])]
        step = -(-len(self.front) // _MAX_COVER)
        self._cover = Cover(np.array([point for point, _ in self.front[::step]]))

    def dominates(self, bounds: Floats, units: Ints) -> Bools:
        """As `Sink` has it."""
        del units  # a front makes no difference between devices
        if self._cover is None:
            return np.zeros(bounds.shape[1], dtype=np.bool_)
        return self._cover.dominates(*bounds)
