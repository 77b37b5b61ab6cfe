"""Star or ring, by the size of what is to be added: what the formula says, and what was measured.

Only the hub chooses, for all; sizes are taken together in classes, half an octave each. Where the
formula puts the two close to each other both are tried, some rounds each, and the faster one stays.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from covey.partition.allreduce import Algorithm, ring_s, star_s

CLOSE = 1.6  # a factor between the two that the formula need not get right
N_TRIALS = 5
N_CLASSES = 64  # up to 2^32 bytes


@dataclass(frozen=True, slots=True)
class GroupLink:
    """What lies between two members: one-way latency, and bandwidth of each way."""

    latency_s: float
    bytes_per_s: float


def size_class(nbytes: int) -> int:
    """Which class a payload is in: twice the octave, and one more in its upper half."""
    octave = max(nbytes, 1).bit_length() - 1
    upper = nbytes >= 3 << (octave - 1) if octave else False
    return min(2 * octave + upper, N_CLASSES - 1)


def class_bytes(size: int) -> float:
    """The middle of a class."""
    return (1.25 if size % 2 == 0 else 1.75) * 2.0 ** (size // 2)


class Chooser:
    """What the hub has found out about its group; `rings` has a bit for each class."""

    def __init__(self, n_members: int, link: GroupLink) -> None:
        self.rings = 0
        self._trials: dict[int, dict[Algorithm, list[float]]] = {}
        for size in range(N_CLASSES):
            figures = {"latency_s": link.latency_s, "bytes_per_s": link.bytes_per_s}
            star = star_s(n_members, class_bytes(size), **figures)
            ring = ring_s(n_members, class_bytes(size), **figures)
            self._set(size, is_ring=ring < star)
            if max(star, ring) < CLOSE * min(star, ring):
                self._trials[size] = {"star": [], "ring": []}

    def algorithm(self, nbytes: int) -> Algorithm:
        """What is to be done with such a payload, once all have heard of it."""
        return "ring" if self.rings >> size_class(nbytes) & 1 else "star"

    def measured(self, nbytes: int, algorithm: Algorithm, took_s: float) -> None:
        """A round has ended, which took so long."""
        size = size_class(nbytes)
        trials = self._trials.get(size)
        if trials is None:
            return
        trials[algorithm].append(took_s)
        n_star, n_ring = len(trials["star"]), len(trials["ring"])
        if min(n_star, n_ring) < N_TRIALS:
            self._set(size, is_ring=n_ring < n_star)
            return
        # The first of each warms up buffers, and TCP.
        star, ring = (statistics.median(trials[name][1:]) for name in ("star", "ring"))
        self._set(size, is_ring=ring < star)
        del self._trials[size]

    def _set(self, size: int, *, is_ring: bool) -> None:
        self.rings = self.rings & ~(1 << size) | is_ring << size
