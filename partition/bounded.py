"""Good plans where there are too many to look at all: greedy ones and local moves, and how far off.

For each of several limits on how busy a unit may be, the units that give most for a block's latency
go into a chain until all blocks have a place, and moves that shorten the latency follow: a unit put
in (those that it shares devices with leave), taken out, put in another's place or elsewhere, a part
of the way turned round. What is found on the way counts for the front.

The bound is that of a relaxation in which units are used in parts: of what each could run within a
limit it runs a share, and pays that share of its overhead and of the way to and from it; shares of
units with a device in common add up to one at most. Its dual is bounded, not solved: any prices of
devices give a sound bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from .chains import Chains, Found, fits, objectives
from .dominance import Objectives
from .exact import least_busy_s
from .filling import caps_within, filled
from .instance import Floats, Instance, Ints
from .profile import REPLY_TOKENS

_LEVELS = 8  # limits at first, and again around the best of them
_ROUNDS = 12  # of moves, for each limit
_CANDIDATES = 48  # units that are tried in another's place
_STEPS = 400  # limits that the bound is worked out for
_PRICES = 48  # of a block, that each is worked out with

_NO_ROOM_S = 1e4

Way = tuple[int, ...]  # units in order


def search_bounded(instance: Instance, found: Found) -> None:
    """Put good plans into `found`."""
    low_s, high_s = _range_s(instance)
    limits = [float(limit) for limit in np.geomspace(low_s, high_s, _LEVELS)]
    best = _at_limits(instance, found, limits)
    if best is None:
        return
    step = (high_s / low_s) ** (1.0 / (_LEVELS - 1))
    _at_limits(instance, found, [best * step**x for x in (-0.6, -0.3, 0.3, 0.6)])


def relative_gap(instance: Instance, found: Found) -> float:
    """How much more than any plan of these units the best found costs at most, balanced; 0: none.

    Infinite if nothing is found.
    """
    if not found.front:
        return math.inf
    best = min(balanced(point, instance) for point, _ in found.front)
    return max(0.0, best / least_balanced(instance) - 1.0)


def balanced(point: Objectives, instance: Instance) -> float:
    """As `choose.cost`, of objectives in seconds."""
    ttft_s, tpot_s, full_s = point
    return math.sqrt((ttft_s + (REPLY_TOKENS - 1) * tpot_s) / REPLY_TOKENS * full_s)


def _range_s(instance: Instance) -> tuple[float, float]:
    """From the least busy that a pipeline can be to where a limit limits no more."""
    batch = instance.batches[-1]
    per_block_s = instance.decode_s[:, -1] / batch
    n_blocks = np.minimum(instance.caps[0], instance.n_blocks)
    low_s = least_busy_s(instance)
    return low_s, max(float((per_block_s * n_blocks).max()), low_s) * 1.01


def _at_limits(instance: Instance, found: Found, limits: Iterable[float]) -> float | None:
    """Search within each limit; the one with the best plan, if any has one."""
    best: tuple[float, float] | None = None
    for limit_s in limits:
        chain = _Local(instance, found, limit_s).run()
        if chain is not None and (best is None or chain < best[0]):
            best = (chain, limit_s)
    return None if best is None else best[1]


class _Local:
    """Local moves within one limit."""

    def __init__(self, instance: Instance, found: Found, limit_s: float) -> None:
        self._instance, self._found = instance, found
        batch = instance.batches[-1]
        fixed_s, decode_s = instance.overhead_s, instance.decode_s[:, -1]
        caps = _sure_caps(instance)
        self._caps = caps_within(np.full(len(caps), limit_s * batch), fixed_s, decode_s, caps)
        tokens = REPLY_TOKENS
        self._block_s = (instance.chunk_s + (tokens - 1) * instance.decode_s[:, 0]) / tokens
        self._hop_s = instance.latency_s + instance.wire_s[:, :, -1]
        hub_hops = np.where(self._hop_s > 0, self._hop_s, np.inf).min(axis=1)
        hub_hops = np.where(np.isfinite(hub_hops), hub_hops, 0.0)
        share = (fixed_s + hub_hops[instance.hub]) / np.maximum(self._caps, 1)
        self._worth = np.argsort(self._block_s + share, kind="stable")
        self._worth = self._worth[self._caps[self._worth] > 0]

    def run(self) -> float | None:
        """The least balanced cost that was seen; None if no chain was."""
        chain, best, seen = self._greedy(), math.inf, math.inf
        if chain is None:
            return None
        moves: Iterable[Way] = [chain]
        for _ in range(_ROUNDS):
            latency_s, cost, sequence = self._best_of(moves)
            seen = min(seen, cost)
            if not latency_s < best:
                break
            best, chain = latency_s, sequence
            moves = self._moves(chain)
        return seen if math.isfinite(seen) else None

    def _greedy(self) -> Way | None:
        """Units by what they are worth until all blocks have a place, on a short way."""
        instance, room = self._instance, self._caps[self._worth]
        n_devices = np.array([len(instance.units[unit].devices) for unit in self._worth], dtype=int)
        by_room = self._worth[np.argsort(-room / n_devices, kind="stable")]
        chosen = self._enough(self._worth) or self._enough(by_room)
        if not chosen:
            return None
        at = int(instance.hub[chosen[0]]) if instance.head_idx is None else instance.head_idx
        way: list[int] = []
        while chosen:
            nearest = min(chosen, key=lambda unit: (self._hop_s[at, instance.hub[unit]], unit))
            chosen.remove(nearest)
            way.append(nearest)
            at = int(instance.hub[nearest])
        return tuple(way)

    def _enough(self, units: Ints) -> list[int]:
        """The first of the units that share no device and have room for all blocks, if they do."""
        instance = self._instance
        used, room, chosen = 0, 0, []
        for unit in map(int, units):
            if room >= instance.n_blocks:
                break
            if not used & int(instance.mask[unit]):
                chosen.append(unit)
                used |= int(instance.mask[unit])
                room += int(self._caps[unit])
        return chosen if room >= instance.n_blocks else []

    def _best_of(self, moves: Iterable[Way]) -> tuple[float, float, Way]:
        """Of the moves, the one with the least latency; and the least balanced cost of all."""
        instance = self._instance
        best, cost = math.inf, math.inf
        best_sequence: Way = ()
        by_length: dict[int, list[Way]] = {}
        for sequence in dict.fromkeys(moves):
            by_length.setdefault(len(sequence), []).append(sequence)
        for sequences in by_length.values():
            chains = self._spread(np.array(sequences))
            if not len(chains.head):
                continue
            points = objectives(instance, chains)
            self._found.add(chains)
            latency_s = (points[0] + (REPLY_TOKENS - 1) * points[1]) / REPLY_TOKENS
            row = int(latency_s.argmin())
            cost = min(cost, float(np.sqrt(latency_s * points[2]).min()))
            if latency_s[row] < best:
                best = float(latency_s[row])
                best_sequence = tuple(int(unit) for unit in chains.units[row])
        return best, cost, best_sequence

    def _spread(self, units: Ints) -> Chains:
        """The chains of units that hold all blocks within the limit, the cheapest units filled."""
        instance = self._instance
        first = np.minimum(self._caps[units[:, 0]], instance.caps[1][units[:, 0]])
        caps = self._caps[units]
        caps[:, 0] = first
        able = (caps.min(axis=1) > 0) & (caps.sum(axis=1) >= instance.n_blocks)
        able &= units.shape[1] <= instance.n_blocks
        units, caps = units[able], caps[able]
        n = self._filled(units, caps)
        fixed = instance.head_idx
        head = instance.hub[units[:, 0]] if fixed is None else np.full(len(units), fixed)
        chains = Chains(units, head, n)
        return chains.take(fits(instance, chains))

    def _filled(self, units: Ints, caps: Ints) -> Ints:
        """The cheapest units filled; and where memory is short, the fastest disks with the rest."""
        instance = self._instance
        held = np.clip(instance.resident[units], 1, caps)
        is_short = held.sum(axis=1) < instance.n_blocks
        n = np.empty_like(caps)
        for short, limits in ((False, held), (True, caps)):
            rows = np.flatnonzero(is_short == short)
            costs = instance.read_block_s[units] if short else self._block_s[units]
            least = held[rows] if short else np.ones_like(held[rows])
            left = instance.n_blocks - least.sum(axis=1) + least.shape[1]
            n[rows] = least - 1 + filled(costs[rows], limits[rows] - least + 1, left)
        return n

    def _moves(self, chain: Way) -> Iterator[Way]:
        k = len(chain)
        for unit in map(int, self._worth):
            yield from self._put_in(chain, unit)
        for i in range(k):
            rest = chain[:i] + chain[i + 1 :]
            if rest:
                yield rest
                for unit in map(int, self._worth[:_CANDIDATES]):
                    if unit not in chain:
                        yield from self._put_in(rest, unit)
            for p in range(k):
                yield (*rest[:p], chain[i], *rest[p:])
            for j in range(i + 2, k + 1):
                yield chain[:i] + chain[i:j][::-1] + chain[j:]

    def _put_in(self, chain: Way, unit: int) -> Iterator[Way]:
        """`unit` where it makes the way least longer, and those with its devices out."""
        instance = self._instance
        mask, hub = int(instance.mask[unit]), instance.hub
        rest = tuple(other for other in chain if not int(instance.mask[other]) & mask)
        if unit in chain or not rest:
            yield (unit,)
            return
        hubs = hub[list(rest)]
        after = np.roll(hubs, -1)
        there_s = self._hop_s[hubs, hub[unit]] + self._hop_s[hub[unit], after]
        now_s = self._hop_s[hubs, after]
        p = int((there_s - np.where(np.isfinite(now_s), now_s, 0.0)).argmin()) + 1
        yield (*rest[:p], unit, *rest[p:])
        yield (unit, *rest)


def _sure_caps(instance: Instance) -> Ints:
    """[u]: blocks that a unit can run wherever its span begins."""
    blocks = np.arange(instance.n_blocks + 1)
    room = np.where(instance.ends < instance.n_blocks, instance.ends - blocks, instance.n_blocks)
    sure: Ints = room.min(axis=1)
    return sure


def least_balanced(instance: Instance) -> float:
    """No plan of these units has a balanced cost below this."""
    bounds = [_least_alone(instance)]
    low_s, high_s = _range_s(instance)
    limits = np.append(np.geomspace(low_s, max(high_s, low_s * 1.0001), _STEPS), np.inf)
    reads_s = _least_reads_s(instance)
    for j, batch in enumerate(instance.batches):
        fixed_s, decode_s = instance.overhead_s, instance.decode_s[:, j]
        caps = np.stack(
            [
                caps_within(
                    np.full(len(fixed_s), limit * batch), fixed_s, decode_s, instance.caps[0]
                )
                for limit in limits[1:]
            ]
        )
        latency_s = np.maximum(_least_sum(instance, caps, *_latency_parts(instance)), reads_s)
        cycle_s = np.maximum(_least_sum(instance, caps, *_cycle_parts(instance, j)), reads_s)
        full_s = np.maximum(limits[:-1], cycle_s / instance.n_sessions)
        bounds.append(float(np.sqrt(latency_s * full_s).min()))
    return min(bounds) * (1 - 1e-9)


def _least_reads_s(instance: Instance) -> float:
    """What disks take for each token in any plan, at least: for what fits into no memory."""
    is_in = instance.mask[:, None] >> np.arange(instance.n_devices) & 1  # [u, d]
    held = instance.resident / is_in.sum(axis=1)
    most = (is_in * held[:, None]).max(axis=0).sum()
    return max(0.0, instance.n_blocks - float(most)) * float(instance.read_block_s.min())


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


def _latency_parts(instance: Instance) -> tuple[Floats, Floats, float]:
    """[u] per block, [u] per unit, and once: of a token's share of a whole reply."""
    per_block_s = instance.chunk_s + (REPLY_TOKENS - 1) * instance.decode_s[:, 0]
    # A chunk takes no less on its way than a token.
    per_unit_s = instance.overhead_s + _half_hops(instance, 1)[instance.hub]
    return per_block_s / REPLY_TOKENS, per_unit_s, float(_heads(instance)[:, 0].min())


def _cycle_parts(instance: Instance, j: int) -> tuple[Floats, Floats, float]:
    """The same of a batch once around."""
    per_unit_s = instance.overhead_s + _half_hops(instance, instance.batches[j])[instance.hub]
    return instance.decode_s[:, j], per_unit_s, float(_heads(instance)[:, j].min())


def _heads(instance: Instance) -> Floats:
    return instance.head_s if instance.head_idx is None else instance.head_s[[instance.head_idx]]


def _half_hops(instance: Instance, batch: int) -> Floats:
    """[d]: half of the shortest way to each device and half of the shortest on from it."""
    hop_s = instance.latency_s + batch * instance.wire_s.min(axis=2)
    np.fill_diagonal(hop_s, np.inf)
    half: Floats = (hop_s.min(axis=0) + hop_s.min(axis=1)) / 2
    return np.where(np.isfinite(half), half, 0.0)


def _least_sum(
    instance: Instance, caps: Ints, per_block_s: Floats, per_unit_s: Floats, once_s: float
) -> Floats:
    """[steps]: for each row of caps [steps, u], no plan within them has a lesser sum.

    With a price s of a block, a unit is worth `caps * (s - cost)` at most; whatever its devices
    cost together more than that, the price of all blocks less that of all devices is a bound.
    """
    is_able = caps > 0
    cost = np.where(is_able, per_block_s + per_unit_s / np.maximum(caps, 1), np.inf)
    ranked = np.sort(cost, axis=1)
    picks = np.unique(np.linspace(0, ranked.shape[1] - 1, _PRICES).astype(np.int64))
    prices = np.where(np.isfinite(ranked[:, picks]), ranked[:, picks], 0.0)  # [steps, s]
    # Where there is no room for all blocks, no price is too high.
    prices = np.column_stack([prices, np.full(len(prices), _NO_ROOM_S)])
    devices = np.zeros((instance.n_devices, *prices.shape))
    for unit in sorted(range(len(instance.units)), key=lambda u: len(instance.units[u].devices)):
        members = list(instance.units[unit].devices)
        excess = np.where(is_able[:, [unit]], prices - cost[:, [unit]], 0.0)
        lack = caps[:, [unit]] * np.maximum(excess, 0.0) - devices[members].sum(axis=0)
        devices[members] += np.maximum(lack, 0.0) / len(members)
    bound: Floats = (instance.n_blocks * prices - devices.sum(axis=0)).max(axis=1)
    return bound + once_s
