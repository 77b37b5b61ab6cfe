"""How others share a model's blocks out over machines, as pure functions: what our plans must beat.

Written anew from what the rules do: exo's as in `allocate_layers_proportionally` and
`get_smallest_cycles` of exo-explore/exo, Parallax's as in `adjust_pipeline_layers` of
GradientHQ/parallax (arXiv:2509.26182). None of them looks at a link. Capacities are blocks that a
machine can hold; a rule that ends above one of them has no plan there, like its model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

BISECTIONS = 40


class NoShare(ValueError):
    """The rule has no answer for these machines; the text says why."""


def equal_split(n_blocks: int, n_machines: int) -> tuple[int, ...]:
    """As many blocks for each; what is left over goes to the first ones.

    Raises:
        NoShare: there are fewer blocks than machines.
    """
    _check(n_blocks, n_machines)
    each, left = divmod(n_blocks, n_machines)
    return tuple(each + (idx < left) for idx in range(n_machines))


def memory_proportional(n_blocks: int, memories: Sequence[float]) -> tuple[int, ...]:
    """exo's rule: shares of memory by largest remainder, and at least one block for each.

    Raises:
        NoShare: there are fewer blocks than machines.
    """
    _check(n_blocks, len(memories))
    total = sum(memories)
    shares = _rounded(n_blocks, [n_blocks * memory / total for memory in memories])
    for idx, share in enumerate(shares):
        if not share:
            shares[shares.index(max(shares))] -= 1
            shares[idx] = 1
    return tuple(shares)


def water_filling(
    n_blocks: int, speeds: Sequence[float], capacities: Sequence[int]
) -> tuple[int, ...]:
    """Parallax's rule: shares of speed, each up to its capacity; some may come out as zero.

    The level is found by bisection as theirs is, then floors and largest remainders.

    Raises:
        NoShare: all capacities together are too small.
    """
    if sum(capacities) < n_blocks:
        raise NoShare(f"{sum(capacities)} of {n_blocks} blocks fit")
    low, high = 0.0, max(cap / speed for cap, speed in zip(capacities, speeds, strict=True))
    for _ in range(BISECTIONS):
        level = (low + high) / 2
        if sum(_filled(level, speeds, capacities)) >= n_blocks:
            high = level
        else:
            low = level
    return tuple(_rounded(n_blocks, _filled(high, speeds, capacities), capacities))


def fewest_machines(memories: Sequence[float], needed: float) -> tuple[int, ...]:
    """Which machines exo takes: as few as can hold it, and of such sets the one with most memory.

    Raises:
        NoShare: all of them cannot hold it.
    """
    for n_machines in range(1, len(memories) + 1):
        sets = combinations(range(len(memories)), n_machines)
        best = max(sets, key=lambda chosen: sum(memories[idx] for idx in chosen))
        if sum(memories[idx] for idx in best) >= needed:
            return best
    raise NoShare(f"{sum(memories):g} of {needed:g} bytes fit")


def _check(n_blocks: int, n_machines: int) -> None:
    if not 1 <= n_machines <= n_blocks:
        raise NoShare(f"{n_blocks} blocks for {n_machines} machines")


def _filled(level: float, speeds: Sequence[float], capacities: Sequence[int]) -> list[float]:
    return [min(cap, level * speed) for cap, speed in zip(capacities, speeds, strict=True)]


def _rounded(
    n_blocks: int, exact: Sequence[float], capacities: Sequence[int] | None = None
) -> list[int]:
    """Floors, and what is missing to `n_blocks` one by one to the largest remainders."""
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda idx: shares[idx] - exact[idx])
    while sum(shares) < n_blocks:
        for idx in by_remainder:
            has_room = capacities is None or shares[idx] < capacities[idx]
            if has_room and sum(shares) < n_blocks:
                shares[idx] += 1
    return shares
