"""Handing out parts alike to workers unlike, so that the last of them is done soonest."""

from __future__ import annotations

from collections.abc import Sequence

from .speed import GRID_S


def handed_out(n_parts: int, whole_s: Sequence[float], delays: Sequence[float]) -> list[int]:
    """How many of `n_parts` alike each member gets, so that the last sum comes soonest.

    Member i, who would take `whole_s[i]` for all of them, is done with k parts k of these parts
    after `delays[i]`. The `n_parts` earliest of all such moments are the answer; to find them, the
    level up to which everybody is filled is worked out as if parts could be divided, and what
    rounding down leaves goes out one by one.
    """
    part_s = [max(seconds / n_parts, GRID_S) for seconds in whole_s]
    level = _water_level(n_parts, part_s, delays)
    counts = [
        min(n_parts, max(0, int((level - delay) / seconds)))
        for seconds, delay in zip(part_s, delays, strict=True)
    ]
    while sum(counts) > n_parts:  # only where rounding of floats has given one too many
        counts[counts.index(max(counts))] -= 1
    for _ in range(n_parts - sum(counts)):
        done = [
            delay + (count + 1) * seconds
            for count, seconds, delay in zip(counts, part_s, delays, strict=True)
        ]
        counts[done.index(min(done))] += 1
    return counts


def _water_level(n_parts: int, part_s: Sequence[float], delays: Sequence[float]) -> float:
    """When all would be done if parts could be divided: members join in the order of delays."""
    level, speed, done = 0.0, 0.0, 0.0
    for delay, seconds in sorted(zip(delays, part_s, strict=True)):
        if speed > 0.0 and done + (delay - level) * speed >= n_parts:
            break
        done += (delay - level) * speed
        level, speed = delay, speed + 1.0 / seconds
    return level + (n_parts - done) / speed
