"""How far a span may reach on a device or a group, in memory or with a part of it on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from covey.partition.memory import block_cap, head_bytes, kv_bytes_per_block, weight_share
from covey.partition.plan import Member, Span
from covey.partition.profile import DeviceProfile, ModelLayout, Workload
from covey.partition.window import Floats, Holder, Ints, Spans


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The spans that a unit can run."""

    ends: Ints  # [n_blocks + 1]: how far one may reach that starts there
    head_ends: Ints  # the same where the unit's hub is the head because it comes first
    #: [2, start, n]: how long each step reads n blocks from there; of an ordinary stage, and of the
    #: first. One start where blocks are alike. None: nothing is ever read.
    read_s: Floats | None = None


class Rooms(Protocol):
    """Works out rooms; a model's sizes are added up once for all units."""

    def of(self, members: Sequence[Member], devices: Sequence[DeviceProfile], hub_idx: int) -> Room:
        """The room of a unit of some members, whose profiles are `devices`."""


class Resident:
    """Everything in memory."""

    def __init__(self, layout: ModelLayout, request: Workload, head: str | None) -> None:
        """`head` is a peer that keeps the head's weights whatever it runs; None: the first hub."""
        self._layout, self._request, self._head = layout, request, head
        total = np.concatenate([[0], np.cumsum(layout.block_bytes)])
        self._bytes = total[None, :] - total[:, None]  # [start, end]
        blocks = np.arange(layout.n_blocks + 1)
        self._n_blocks = blocks[None, :] - blocks[:, None]

    def of(self, members: Sequence[Member], devices: Sequence[DeviceProfile], hub_idx: int) -> Room:
        """As `Rooms` has it."""
        head, hub = self._head, members[hub_idx].peer_id
        ends = self._ends(holders_of(self._layout, members, devices, head))
        if head is not None:
            return Room(ends=ends, head_ends=ends)
        return Room(
            ends=ends, head_ends=self._ends(holders_of(self._layout, members, devices, hub))
        )

    def _ends(self, holders: Sequence[Holder]) -> Ints:
        layout, blocks = self._layout, self._n_blocks
        fits = blocks >= 0
        for one in holders:
            share = 1.0 if one.is_alone else weight_share(layout, one.member)
            kv_bytes = kv_bytes_per_block(
                layout, self._request, None if one.is_alone else one.member
            )
            weights = self._bytes if one.is_alone else np.ceil(self._bytes * share)
            needed = weights + blocks * kv_bytes + one.reserved_bytes
            fits &= (needed <= one.device.memory_bytes) & (blocks <= block_cap(one.device))
        first = np.arange(layout.n_blocks + 1)
        # Whatever is reserved, an empty span is where it starts.
        ends: Ints = np.maximum(first + fits.sum(axis=1) - 1, first)
        return ends


class Streaming:
    """Spans may be larger than memory; what must streams from disk."""

    def __init__(self, layout: ModelLayout, request: Workload, head: str | None) -> None:
        """As `Resident`."""
        self._layout, self._head = layout, head
        self._spans = Spans(layout, request)

    def of(self, members: Sequence[Member], devices: Sequence[DeviceProfile], hub_idx: int) -> Room:
        """As `Rooms` has it."""
        head = self._head
        hub = members[hub_idx].peer_id if head is None else head
        ends, read_s = self._ends(holders_of(self._layout, members, devices, head))
        head_ends, head_read_s = self._ends(holders_of(self._layout, members, devices, hub))
        return Room(ends=ends, head_ends=head_ends, read_s=np.stack([read_s, head_read_s]))

    def streamed(
        self, members: Sequence[Member], devices: Sequence[DeviceProfile], span: Span
    ) -> tuple[int, ...]:
        """How many blocks of a span each member of a unit must stream, where `head` is the head."""
        return tuple(
            self._spans.streamed_in(one, span)
            for one in holders_of(self._layout, members, devices, self._head)
        )

    def _ends(self, holders: Sequence[Holder]) -> tuple[Ints, Floats]:
        n_blocks = self._layout.n_blocks
        read_s = np.zeros((1, n_blocks + 1))
        for one in holders:
            read_s = np.maximum(read_s, self._spans.read_s(one, self._spans.streamed(one)))
        first, n = np.arange(n_blocks + 1), np.arange(n_blocks + 1)
        can = np.isfinite(read_s) & (first[:, None] + n <= n_blocks)
        ends: Ints = first + np.maximum(can.sum(axis=1) - 1, 0)
        return ends, np.where(np.isfinite(read_s), read_s, 0.0)


def holders_of(
    layout: ModelLayout,
    members: Sequence[Member],
    devices: Sequence[DeviceProfile],
    head: str | None,
) -> list[Holder]:
    """The members of a unit, the one called `head` with the head's weights."""
    return [
        Holder(
            member,
            device,
            head_bytes(layout) if member.peer_id == head else 0,
            len(members) == 1,
        )
        for member, device in zip(members, devices, strict=True)
    ]
