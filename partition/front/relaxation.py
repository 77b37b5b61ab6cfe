"""How good a plan could be at best: a bound on the balanced cost that no plan is below.

Within a limit on how busy a unit may be, in a relaxation in which units are used in parts: of what
each could run it runs a share, and pays that share of its overhead and of the way to and from it;
shares of units with a device in common add up to one at most. Its dual is bounded, not solved: any
prices of a block and of devices give a sound bound, and good ones a near one. Of all limits the one
that allows most counts.
"""

from __future__ import annotations

import math

import numpy as np

from covey.partition.profile import REPLY_TOKENS

from .chains import Chains, Found, objectives
from .dominance import Objectives
from .exact import least_busy_s
from .filling import caps_within
from .instance import Floats, Instance, Ints

_STEPS = 40  # limits at first
_FINER = 8  # in each step that may hold the least, again and again
_NEAR = 1.003  # upper over lower end of a step that is small enough
_PRICES = 24  # of a block, that each limit is tried with
_NO_ROOM_S = 1e4
_SLIVER = 1 - 1e-9  # floats, not grid values


def relative_gap(instance: Instance, found: Found) -> float:
    """How much more than any plan of these units the best found costs at most, balanced; 0: none.

    Infinite if nothing is found.
    """
    if not found.front:
        return math.inf
    best = min(balanced(point) for point, _ in found.front)
    return max(0.0, best / least_balanced(instance) - 1.0)


def balanced(point: Objectives) -> float:
    """As `choose.cost`, of objectives in seconds."""
    ttft_s, tpot_s, full_s = point
    return math.sqrt((ttft_s + (REPLY_TOKENS - 1) * tpot_s) / REPLY_TOKENS * full_s)


def limits_s(instance: Instance) -> tuple[float, float]:
    """From the least busy that a pipeline can be to where a limit limits no more."""
    batch = instance.batches[-1]
    n_blocks = np.minimum(instance.caps[0], instance.n_blocks)
    steps_s = instance.overhead_s + n_blocks * instance.decode_s[:, -1]
    low_s = least_busy_s(instance)
    return low_s, max(float(steps_s.max()) / batch, low_s) * 1.01


def least_balanced(instance: Instance) -> float:
    """No plan of these units has a balanced cost below this."""
    relaxed = _Relaxation(instance)
    bounds = [_least_alone(instance), *(relaxed.least(j) for j in range(len(instance.batches)))]
    return min(bounds) * _SLIVER


def _least_alone(instance: Instance) -> float:
    """The least of the plans of one unit that is the head as well: they have no way to go."""
    head = instance.head_idx
    units = np.flatnonzero(instance.head_ends[:, 0] == instance.n_blocks)
    if head is not None:
        units = units[instance.hub[units] == head]
    if not len(units):
        return math.inf
    n = np.full((len(units), 1), instance.n_blocks)
    points = objectives(instance, Chains(units[:, None], instance.hub[units], n))
    latency_s = (points[0] + (REPLY_TOKENS - 1) * points[1]) / REPLY_TOKENS
    return float(np.sqrt(latency_s * points[2]).min())


class _Relaxation:
    """Of the plans that have a way to go."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._reads_s = _least_reads_s(instance)
        heads = slice(None) if instance.head_idx is None else [instance.head_idx]
        self._head_s = instance.head_s[heads].min(axis=0)
        by_size = sorted(range(len(instance.units)), key=lambda u: len(instance.units[u].devices))
        self._members = [(u, list(instance.units[u].devices)) for u in by_size]
        self._units_of: list[list[int]] = [[] for _ in range(instance.n_devices)]
        for u, members in self._members:
            for device in members:
                self._units_of[device].append(u)
        self._has_groups = len(self._members[-1][1]) > 1

    def least(self, j: int) -> float:
        """The least balanced cost of plans whose sessions go round in batch j."""
        low_s, high_s = limits_s(self._instance)
        limits = np.append(np.geomspace(low_s, max(high_s, low_s * _NEAR), _STEPS), np.inf)
        lows, highs, sure = limits[:-1], limits[1:], math.inf
        while len(lows):
            bounds = self._at(j, lows, highs)
            is_small = (highs <= lows * _NEAR) | ~np.isfinite(highs)
            sure = min(sure, float(bounds[is_small].min(initial=math.inf)))
            # Only a step whose bound is below that of all small ones can lower the least.
            open_steps = np.flatnonzero(~is_small & (bounds < sure))
            least = np.argsort(bounds[open_steps], kind="stable")[:_FINER]
            rest = bounds[np.setdiff1d(open_steps, open_steps[least])]
            ends = [np.geomspace(lows[i], highs[i], _FINER + 1) for i in open_steps[least]]
            sure = min(sure, float(rest.min(initial=math.inf)))
            lows = np.concatenate([each[:-1] for each in ends]) if ends else np.empty(0)
            highs = np.concatenate([each[1:] for each in ends]) if ends else np.empty(0)
        return sure

    def _at(self, j: int, lows: Floats, highs: Floats) -> Floats:
        """[steps]: bounds of plans whose busiest unit takes from `lows` to `highs` per token."""
        instance = self._instance
        batch, fixed_s = instance.batches[j], instance.overhead_s
        caps = caps_within(
            highs[:, None] * batch,
            fixed_s,
            instance.decode_s[:, j],
            np.broadcast_to(instance.caps[0], (len(highs), len(fixed_s))),
        )
        per_block_s = instance.chunk_s + (REPLY_TOKENS - 1) * instance.decode_s[:, 0]
        # A chunk takes no less on its way than a token.
        latency_s = self._head_s[0] + self._least_sum(caps, per_block_s / REPLY_TOKENS, 1)
        cycle_s = self._head_s[j] + self._least_sum(caps, instance.decode_s[:, j], batch)
        full_s = np.maximum(lows, np.maximum(cycle_s, self._reads_s) / instance.n_sessions)
        bounds: Floats = np.sqrt(np.maximum(latency_s, self._reads_s) * full_s)
        return bounds

    def _least_sum(self, caps: Ints, per_block_s: Floats, batch: int) -> Floats:
        """[steps]: for each row of caps [steps, u], no plan within them has a lesser sum.

        With a price s of a block, a unit is worth `caps * (s - cost)` at most; if its devices cost
        no less than that, the price of all blocks less that of all devices is a bound.
        """
        instance, is_able = self._instance, caps > 0
        per_unit_s = instance.overhead_s + _half_hops(instance, batch)[instance.hub]
        cost = np.where(is_able, per_block_s + per_unit_s / np.maximum(caps, 1), np.inf)
        ranked = np.sort(cost, axis=1)
        picks = np.unique(np.linspace(0, ranked.shape[1] - 1, _PRICES).astype(np.int64))
        prices = np.where(np.isfinite(ranked[:, picks]), ranked[:, picks], 0.0)  # [steps, s]
        # Where there is no room for all blocks, no price is too high.
        prices = np.column_stack([prices, np.full(len(prices), _NO_ROOM_S)])
        worth = np.maximum(prices - np.where(is_able, cost, _NO_ROOM_S).T[:, :, None], 0.0)
        worth *= caps.T[:, :, None]  # [u, steps, s]
        devices = np.zeros((instance.n_devices, *prices.shape))
        for unit, members in self._members:
            lack = worth[unit] - devices[members].sum(axis=0)
            devices[members] += np.maximum(lack, 0.0) / len(members)
        if self._has_groups:
            self._cheapen(devices, worth)
        bound: Floats = (instance.n_blocks * prices - devices.sum(axis=0)).max(axis=1)
        return bound

    def _cheapen(self, devices: Floats, worth: Floats) -> None:
        """Lower the price of each device by what none of its units needs."""
        members_of = dict(self._members)
        for device, units in enumerate(self._units_of):
            spare = devices[device].copy()
            for unit in units:
                np.minimum(spare, devices[members_of[unit]].sum(axis=0) - worth[unit], out=spare)
            devices[device] -= np.maximum(spare, 0.0)


def _least_reads_s(instance: Instance) -> float:
    """What disks take for each token in any plan, at least: for what fits into no memory."""
    is_in = instance.mask[:, None] >> np.arange(instance.n_devices) & 1  # [u, d]
    held = instance.resident / is_in.sum(axis=1)
    most = (is_in * held[:, None]).max(axis=0).sum()
    return max(0.0, instance.n_blocks - float(most)) * float(instance.read_block_s.min())


def _half_hops(instance: Instance, batch: int) -> Floats:
    """[d]: half of the shortest way to each device and half of the shortest on from it."""
    hop_s = (instance.latency_s + batch * instance.wire_s).min(axis=2)
    np.fill_diagonal(hop_s, np.inf)
    half: Floats = (hop_s.min(axis=0) + hop_s.min(axis=1)) / 2
    return np.where(np.isfinite(half), half, 0.0)
