"""Good plans where there are too many to look at all: greedy ones and local moves, and how far off.

For each of several limits on how busy a unit may be, the units that give most for a block's latency
go into a chain until all blocks have a place, and moves that shorten the latency follow: a unit put
in (those that it shares devices with leave), taken out, put in another's place or elsewhere, a part
of the way turned round. What is found on the way counts for the front.

How far off the best of them is, `relaxation` says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from covey.partition.profile import REPLY_TOKENS

from .chains import Chains, Found, fits, objectives
from .filling import caps_within, filled
from .instance import Instance, Ints
from .relaxation import limits_s

_LEVELS = 12  # limits at first
_REFINED = 3  # times two more, nearer and nearer to the best
_SHYNESS = (0.0, 0.5, 1.0)  # of taking many devices at once, in what is tried first
_ROUNDS = 12  # of moves, for each limit
_CANDIDATES = 48  # units that are tried in another's place
_STEPS = 400  # limits that the bound is worked out for
_FAR_S = 1e4  # instead of infinity, where two are not linked

Way = tuple[int, ...]  # units in order


def search_bounded(instance: Instance, found: Found) -> None:
    """Put good plans into `found`."""
    low_s, high_s = limits_s(instance)
    limits = [float(limit) for limit in np.geomspace(low_s, high_s, _LEVELS)]
    step = (high_s / low_s) ** (1.0 / (_LEVELS - 1))
    best = (math.inf, low_s)
    for _ in range(_REFINED + 1):
        best = min(best, *((_Local(instance, found, limit).run(), limit) for limit in limits))
        step = math.sqrt(step)
        limits = [best[1] / step, best[1] * step]


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
        self._hop_s = instance.latency_s[:, :, -1] + instance.wire_s[:, :, -1]
        self._hops: list[list[float]] = self._hop_s.tolist()
        self._hubs: list[int] = instance.hub.tolist()
        self._masks: list[int] = instance.mask.tolist()
        hub_hops = np.where(self._hop_s > 0, self._hop_s, np.inf).min(axis=1)
        hub_hops = np.where(np.isfinite(hub_hops), hub_hops, 0.0)
        share = (fixed_s + hub_hops[instance.hub]) / np.maximum(self._caps, 1)
        self._n_devices = np.array([len(unit.devices) for unit in instance.units])
        self._cost_s = self._block_s + share
        self._worth = np.argsort(self._cost_s, kind="stable")
        self._worth = self._worth[self._caps[self._worth] > 0]

    def run(self) -> float:
        """The least balanced cost that was seen; infinite if no chain was."""
        return min((self._from(way) for way in dict.fromkeys(self._greedy())), default=math.inf)

    def _from(self, way: Way) -> float:
        best = seen = math.inf
        moves: Iterable[Way] = [way]
        for _ in range(_ROUNDS):
            latency_s, cost, chain = self._best_of(moves)
            seen = min(seen, cost)
            if not latency_s < best:
                break
            best, moves = latency_s, self._moves(chain)
        return seen

    def _greedy(self) -> Iterator[Way]:
        """Units by what they are worth until all blocks have a place, on a short way."""
        orders = [self._cost_s * self._n_devices**shyness for shyness in _SHYNESS]
        orders.append(self._n_devices / np.maximum(self._caps, 1))
        for order in orders:
            chosen = self._enough(np.argsort(order, kind="stable"))
            if chosen:
                yield self._short_way(chosen)

    def _short_way(self, units: list[int]) -> Way:
        """From each hub to the nearest next, the first unit or the head first."""
        fixed, left = self._instance.head_idx, list(units)
        at, way = self._hubs[units[0]] if fixed is None else fixed, []
        while left:
            nearest = min(left, key=lambda unit: (self._hops[at][self._hubs[unit]], unit))
            left.remove(nearest)
            way.append(nearest)
            at = self._hubs[nearest]
        return tuple(way)

    def _enough(self, units: Ints) -> list[int]:
        """The first of the units that share no device and have room for all blocks, if they do."""
        used, room, chosen = 0, 0, []
        for unit in map(int, units):
            if room >= self._instance.n_blocks:
                break
            if self._caps[unit] and not used & self._masks[unit]:
                chosen.append(unit)
                used |= self._masks[unit]
                room += int(self._caps[unit])
        return chosen if room >= self._instance.n_blocks else []

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
        k, masks = len(chain), [self._masks[unit] for unit in chain]
        yield from self._with_one_more(chain, self._worth)
        for unit in self._worth.tolist():  # in place of all that it shares devices with
            mask = self._masks[unit]
            shared = [i for i in range(k) if masks[i] & mask]
            if shared:
                first, behind = shared[0], chain[shared[0] :]
                yield (
                    *chain[:first],
                    unit,
                    *(one for one in behind if not self._masks[one] & mask),
                )
        for i in range(k):
            rest = chain[:i] + chain[i + 1 :]
            if rest:
                yield rest
                yield from self._with_one_more(rest, self._worth[:_CANDIDATES])
            for p in range(k):
                yield (*rest[:p], chain[i], *rest[p:])
            for j in range(i + 2, k + 1):
                yield chain[:i] + chain[i:j][::-1] + chain[j:]

    def _with_one_more(self, chain: Way, units: Ints) -> Iterator[Way]:
        """Each of the units that shares no device with the chain put in: at the beginning, and
        where it makes the way least longer."""
        instance, used = self._instance, 0
        for one in chain:
            used |= self._masks[one]
        units = units[instance.mask[units] & used == 0]
        new, hubs = instance.hub[units], instance.hub[list(chain)]
        after = np.concatenate([hubs[1:], hubs[:1]])
        there_s = self._hop_s[hubs][:, new] + self._hop_s[:, after][new].T
        place = (there_s - np.minimum(self._hop_s[hubs, after], _FAR_S)[:, None]).argmin(axis=0)
        for unit, before in zip(units.tolist(), place.tolist(), strict=True):
            yield (*chain[: before + 1], unit, *chain[before + 1 :])
            yield (unit, *chain)


def _sure_caps(instance: Instance) -> Ints:
    """[u]: blocks that a unit can run wherever its span begins."""
    blocks = np.arange(instance.n_blocks + 1)
    room = np.where(instance.ends < instance.n_blocks, instance.ends - blocks, instance.n_blocks)
    sure: Ints = room.min(axis=1)
    return sure
