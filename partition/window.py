"""Spans larger than memory: how far they may reach, what of them streams, and how long that takes.

A member streams no more blocks than it must: with each of them it reads more for every step. How
many that are follows from its span alone, so a window needs no place in a search of its own. While
reading keeps up with computing, of each block (TPI-LLM's tight condition) or of all together (its
loose one), a step takes no longer than without; else it takes as long as the disk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .memory import WINDOW_BLOCKS, block_cap, kv_bytes_per_block, weight_share
from .plan import Member, Span
from .profile import DeviceProfile, ModelLayout, Workload
from .speed import GRID_S

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_NEVER = 1 << 61  # bytes: more than there are


@dataclass(frozen=True, slots=True)
class Holder:
    """A member of a unit, and what it may use."""

    member: Member
    device: DeviceProfile
    reserved_bytes: int  # the head's weights, where it is the head
    is_alone: bool


class Spans:
    """All spans of a model: what their blocks weigh; where all weigh the same, by length only."""

    def __init__(self, layout: ModelLayout, request: Workload) -> None:
        """Add up each span's largest blocks."""
        self._layout, self._request = layout, request
        n_blocks, sizes = layout.n_blocks, np.array(layout.block_bytes, dtype=np.int64)
        n_starts = 1 if len(set(layout.block_bytes)) == 1 else n_blocks + 1
        # [start, n, h]: bytes of the h largest of the n blocks from `start` on.
        self._largest = np.full((n_starts, n_blocks + 1, n_blocks + 1), _NEVER, dtype=np.int64)
        self._largest[:, :, 0] = 0
        for start in range(n_starts):
            for n in range(1, n_blocks + 1 - start):
                sums = np.cumsum(np.sort(sizes[start : start + n])[::-1])
                self._largest[start, n, 1 : n + 1] = sums
        self._n = np.arange(n_blocks + 1)

    def streamed(self, holder: Holder) -> Ints:
        """[start, n]: the fewest blocks that must stream; -1 where not even that would do."""
        device, n = holder.device, self._n
        weights = self._largest
        member = None if holder.is_alone else holder.member
        if member is not None:
            weights = np.ceil(weights * weight_share(self._layout, member)).astype(np.int64)
        kv_bytes = kv_bytes_per_block(self._layout, self._request, member)
        budget = device.memory_bytes - holder.reserved_bytes - n * kv_bytes
        is_held = (weights <= budget[:, None]) & (self._largest < _NEVER)
        held = is_held.sum(axis=2) - 1  # blocks
        fewest = np.where(held == n, 0, n - held + WINDOW_BLOCKS)
        can = (held >= np.minimum(n, WINDOW_BLOCKS)) & (n <= block_cap(device))
        # No more than the model has behind `start`, and not even none where the cache has no room.
        can &= (self._largest[:, n, n] < _NEVER) & (budget >= 0)
        found: Ints = np.where(can, fewest, -1)
        return found

    def read_s(self, holder: Holder, streamed: Ints) -> Floats:
        """[start, n]: how long the disk takes for what streams, for each step."""
        starts = np.arange(len(streamed))[:, None]
        n_bytes = self._largest[starts, self._n, np.maximum(streamed, 0)]
        if not holder.is_alone:
            share = weight_share(self._layout, holder.member)
            n_bytes = np.ceil(n_bytes * share).astype(np.int64)
        seconds: Floats = np.rint(n_bytes / holder.device.disk_bytes_per_s / GRID_S) * GRID_S
        return np.where(streamed >= 0, seconds, np.inf)

    def streamed_in(self, holder: Holder, span: Span) -> int:
        """Of one span."""
        table = self.streamed(holder)
        return int(table[span.start if len(table) > 1 else 0, span.n_blocks])
