"""Several pipelines side by side, where throughput asks for them: who goes with whom.

A session runs on one of them, so a session alone gains nothing; with many, each pipeline has a
part. For each set of devices there is one pipeline that does most with its part of the sessions.
Those, and each point of the front of single pipelines, are put together: for a point, what its
devices leave over is shared out among one to three others in the best way that there is, by the sum
of what they do. What the cost model says of them together then decides.

Of more than `ALL_SETS_OF` devices not every set is looked at: what goes with a point are devices
that run the model alone, and other points.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from covey.partition.profile import REPLY_TOKENS

from .chains import Chain, Chains, objectives
from .exact import search_exact
from .instance import Bools, Floats, Instance, Ints

ALL_SETS_OF = 8  # devices
GOOD_ENOUGH = 1.01  # a pipeline that is to go with others need not be the best to the last percent
_MAX_EFFORT = 3_000_000  # for each number of sessions
_MAX_PARTS = 256  # that get others beside them
_MAX_POINTS = 64  # of a front, spread over it, that get others beside them


@dataclass(frozen=True, slots=True)
class _Part:
    """One pipeline that may be a part, and what it does with its sessions."""

    chain: Chain
    mask: int
    tokens_per_s: float
    reply_s: float  # of a lone session


class BestByDevices:
    """Of each set of devices, the pipeline that does most, to within `GOOD_ENOUGH`; none where some
    of them do as well."""

    def __init__(self, instance: Instance) -> None:
        """Nothing is found yet."""
        self._instance = instance
        self._best_s = np.full(1 << instance.n_devices, np.inf)  # by set, subsets included
        self._chains: dict[int, Chain] = {}

    def add(self, chains: Chains) -> None:
        """As `Sink` has it."""
        full_s = objectives(self._instance, chains)[2]
        masks = self._masks(chains.units)
        order = np.lexsort((full_s, masks))
        first = order[np.concatenate([[True], np.diff(masks[order]) > 0])] if len(order) else order
        for row in first[full_s[first] < self._best_s[masks[first]]]:
            self._best_s[masks[row]] = full_s[row]
            self._chains[int(masks[row])] = chains.one(int(row))
        every = np.arange(len(self._best_s))
        for device in range(self._instance.n_devices):
            self._best_s = np.minimum(self._best_s, self._best_s[every & ~(1 << device)])

    def dominates(self, bounds: Floats, units: Ints) -> Bools:
        """As `Sink` has it."""
        covered: Bools = self._best_s[self._masks(units)] <= GOOD_ENOUGH * bounds[2]
        return covered

    def parts(self) -> list[_Part]:
        """By set."""
        return [_part(self._instance, self._chains[mask]) for mask in sorted(self._chains)]

    def _masks(self, units: Ints) -> Ints:
        masks: Ints = np.bitwise_or.reduce(self._instance.mask[units], axis=1)
        return masks


def side_by_side(
    instance: Instance, front: Sequence[Chain], *, max_pipelines: int
) -> Iterator[tuple[Chain, ...]]:
    """Sets of pipelines that share no device and may do more than `front` has, and empty ones; not
    priced."""
    if max_pipelines < 2 or instance.n_sessions < 2 or instance.n_devices < 2:
        return
    step = -(-len(front) // _MAX_POINTS)
    points = front[::step]
    everything = (1 << instance.n_devices) - 1
    most = min(max_pipelines, instance.n_sessions, instance.n_devices)
    by_sessions = {1: _Shared(_parts(instance.with_sessions(1), front), instance.n_devices, most)}
    for n_pipelines in range(2, most + 1):
        fewer, odd = divmod(instance.n_sessions, n_pipelines)
        for n_sessions in sorted({fewer, fewer + (odd > 0)}):
            if n_sessions not in by_sessions:
                parts = _parts(instance.with_sessions(n_sessions), front)
                by_sessions[n_sessions] = _Shared(parts, instance.n_devices, most)
            shared = by_sessions[n_sessions]
            yield shared.best(everything, n_pipelines)
            # What answers a lone session, or has one session more than the others.
            more = [*by_sessions[1].chains, *by_sessions[max(by_sessions)].chains]
            for first in dict.fromkeys([*points, *more]):
                part = _part(instance, first)
                for others in (
                    shared.best(everything & ~part.mask, n_pipelines - 1),
                    shared.slower_than(part, n_pipelines - 1),
                ):
                    yield (first, *others) if others else ()


def _parts(instance: Instance, front: Sequence[Chain]) -> list[_Part]:
    """What may go beside others, with that many sessions for each."""
    if instance.n_devices <= ALL_SETS_OF:
        best = BestByDevices(instance)
        search_exact(instance, best, max_effort=_MAX_EFFORT)
        return best.parts()
    chains = [*front, *_alone(instance)]
    return [_part(instance, chain) for chain in dict.fromkeys(chains)]


def _part(instance: Instance, chain: Chain) -> _Part:
    one = Chains(np.array([chain.units]), np.array([chain.head]), np.array([chain.n_blocks]))
    ttft_s, tpot_s, full_s = map(float, objectives(instance, one)[:, 0])
    reply_s = ttft_s + (REPLY_TOKENS - 1) * tpot_s
    return _Part(chain, _mask(instance, chain), 1.0 / full_s, reply_s)


def _alone(instance: Instance) -> list[Chain]:
    """Units that run the whole model and are the head as well."""
    return [
        Chain((number,), unit.hub, (instance.n_blocks,))
        for number, unit in enumerate(instance.units)
        if instance.head_ends[number, 0] == instance.n_blocks
        and instance.head_idx in (None, unit.hub)
    ]


def _mask(instance: Instance, chain: Chain) -> int:
    mask = 0
    for unit in chain.units:
        mask |= instance.units[unit].mask
    return mask


class _Shared:
    """Devices shared out among parts, so that these do most together."""

    def __init__(self, parts: Sequence[_Part], n_devices: int, max_parts: int) -> None:
        self._parts = parts
        self._fastest = sorted(parts, key=lambda part: (-part.tokens_per_s, part.chain))
        self._is_all = n_devices <= ALL_SETS_OF
        # [n][mask]: the most that n parts within the mask do, and the first of them.
        self._most: list[Floats] = [np.zeros(1 << n_devices if self._is_all else 1)]
        self._first: list[Ints] = []
        for _ in range(max_parts if self._is_all else 0):
            before = self._most[-1]
            most, first = np.full_like(before, -np.inf), np.full(len(before), -1)
            masks = np.arange(len(before))
            for idx, part in enumerate(parts):
                holds = masks & part.mask == part.mask
                with_it = part.tokens_per_s + before[masks & ~part.mask]
                better = holds & (with_it > most)
                most[better], first[better] = with_it[better], idx
            self._most.append(most)
            self._first.append(first)

    @property
    def chains(self) -> list[Chain]:
        """Those that do most."""
        return [part.chain for part in self._fastest[:_MAX_PARTS]]

    def best(self, mask: int, n_parts: int) -> tuple[Chain, ...]:
        """That many parts within the mask; none where there are not so many."""
        if not self._is_all:
            return self._greedy(mask, n_parts, 0.0)
        chains = []
        for n_left in range(n_parts, 0, -1):
            idx = int(self._first[n_left - 1][mask])
            if idx < 0:
                return ()
            chains.append(self._parts[idx].chain)
            mask &= ~self._parts[idx].mask
        return tuple(chains)

    def slower_than(self, first: _Part, n_parts: int) -> tuple[Chain, ...]:
        """That many parts beside one that shall go on being what a lone session gets."""
        return self._greedy(~first.mask, n_parts, first.reply_s)

    def _greedy(self, mask: int, n_parts: int, least_reply_s: float) -> tuple[Chain, ...]:
        chains: list[Chain] = []
        for part in self._fastest:
            if len(chains) == n_parts:
                break
            if part.mask & mask == part.mask and part.reply_s >= least_reply_s:
                chains.append(part.chain)
                mask &= ~part.mask
        return tuple(chains) if len(chains) == n_parts else ()
