"""What a stage can be run by: one device, or a group of them that shares out each block.

A unit is a set of devices with a hub; its shares, and so what a block takes it, follow from
`group_term`. Ranks are in the order of peer ids, whoever is the hub, as a plan that a person writes
has them: which device is which rank changes neither shares nor figures.

A group is left out where a part of its devices with the same hub does as well in everything: its
place can always be taken by that part. Of up to `ALL_GROUPS_OF` devices nothing else is left out,
so that a search over the units that remain is as good as one over all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from .group import SUM_CODEC, group_term
from .memory import block_cap, head_bytes, kv_bytes_per_block, weight_share
from .network import Network
from .plan import Member, Span, StagePlan
from .profile import DeviceProfile, ModelLayout, Workload
from .speed import Steps, block_step_s, block_steps_s, chunk_s_per_block, step_overhead_s

Ints = npt.NDArray[np.int64]

ALL_GROUPS_OF = 8  # devices; of more not every group is looked at, see `_likely`


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Devices that run a span together, and what one block of it takes them."""

    devices: tuple[int, ...]  # their numbers, rising: the order of peer ids, and of ranks
    members: tuple[Member, ...]
    hub_idx: int  # of both
    decode_s: Steps  # one block, by STEP_BATCHES
    chunk_s: float
    overhead_s: float  # of a step, whatever its blocks
    sum_codec: str = SUM_CODEC

    @property
    def hub(self) -> int:
        """The hub's number."""
        return self.devices[self.hub_idx]

    @property
    def mask(self) -> int:
        """A bit for each device."""
        return sum(1 << device for device in self.devices)

    def stage(self, start: int, end: int, streamed: Sequence[int] | None = None) -> StagePlan:
        """The stage that runs blocks `[start, end)`; `streamed` blocks of each member, if any."""
        members = self.members
        if streamed is not None and any(streamed):
            members = tuple(
                Member(one.peer_id, one.kv_heads, one.mlp_columns, n_blocks)
                for one, n_blocks in zip(members, streamed, strict=True)
            )
        return StagePlan(Span(start, end), members, self.hub_idx, self.sum_codec)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How far a span of a unit may reach, for each block that it could start at."""

    ends: Ints  # [n_blocks + 1]
    head_ends: Ints  # the same where the unit's hub is the head because it comes first


def units_of(
    layout: ModelLayout,
    devices: Sequence[DeviceProfile],
    network: Network,
    request: Workload,
    *,
    max_members: int,
    head: str | None,
) -> list[tuple[Unit, Room]]:
    """Every unit worth having, single devices first; `devices` in order of peer id."""
    rooms = Rooms(layout, devices, request, head)
    found = [(unit, rooms.of(unit)) for unit in _singles(devices, request)]
    blocks = np.arange(layout.n_blocks + 1)
    kept = [one for one in found if (one[1].ends > blocks).any()]
    if layout.can_split:
        for n_members in range(2, min(max_members, len(devices)) + 1):
            groups = [
                (unit, rooms.of(unit))
                for unit in _groups(layout, devices, network, request, n_members)
            ]
            kept += [
                one
                for one in groups
                if (one[1].ends > blocks).any()
                and not any(_is_no_worse(other, one) for other in kept)
            ]
    return kept


def has_all_groups(devices: Sequence[DeviceProfile]) -> bool:
    """Whether `units_of` looks at every group there could be."""
    return sum(block_cap(device) > 0 for device in devices) <= ALL_GROUPS_OF


def _singles(devices: Sequence[DeviceProfile], request: Workload) -> Iterator[Unit]:
    for idx, device in enumerate(devices):
        yield Unit(
            devices=(idx,),
            members=(Member(device.peer_id),),
            hub_idx=0,
            decode_s=block_steps_s(device, request),
            chunk_s=chunk_s_per_block(device, request),
            overhead_s=step_overhead_s(device),
        )


def _groups(
    layout: ModelLayout,
    devices: Sequence[DeviceProfile],
    network: Network,
    request: Workload,
    n_members: int,
) -> Iterator[Unit]:
    able = [idx for idx, device in enumerate(devices) if block_cap(device) > 0]
    if has_all_groups(devices):
        each: Iterator[tuple[tuple[int, ...], int]] = (
            (chosen, hub) for chosen in combinations(able, n_members) for hub in chosen
        )
    else:
        each = _likely(devices, able, network, request, n_members)
    for chosen, hub in each:
        members = [devices[idx] for idx in chosen]
        if len({member.engine for member in members}) > 1:
            continue  # one's sums would not be the other's
        term = group_term(layout, members, network, request, hub=devices[hub].peer_id)
        if term is not None:
            yield Unit(
                devices=chosen,
                members=term.members,
                hub_idx=term.hub_idx,
                decode_s=term.decode_s,
                chunk_s=term.chunk_s,
                overhead_s=max(step_overhead_s(member) for member in members),
                sum_codec=term.sum_codec,
            )


def _likely(
    devices: Sequence[DeviceProfile],
    able: Sequence[int],
    network: Network,
    request: Workload,
    n_members: int,
) -> Iterator[tuple[tuple[int, ...], int]]:
    """Groups and hubs where there are too many to look at: each device with those that are fast
    and near to it, and devices of like speed around the one that is nearest to them."""
    block_s = [block_step_s(device, 1, request.depth) for device in devices]

    def rtt_s(one: int, other: int) -> float:
        link = network.link(devices[one].peer_id, devices[other].peer_id)
        return math.inf if link is None else link.rtt_s

    found: dict[tuple[tuple[int, ...], int], None] = {}
    for hub in able:
        others = sorted(
            (idx for idx in able if idx != hub),
            key=lambda idx: (rtt_s(hub, idx) + block_s[idx], idx),
        )
        found[tuple(sorted([hub, *others[: n_members - 1]])), hub] = None
    by_speed = sorted(able, key=lambda idx: (block_s[idx], idx))
    for first in range(len(by_speed) - n_members + 1):
        chosen = tuple(sorted(by_speed[first : first + n_members]))
        hub = min(
            chosen,
            key=lambda idx: (sum(rtt_s(idx, other) for other in chosen if other != idx), idx),
        )
        found[chosen, hub] = None
    return iter(found)


def _is_no_worse(one: tuple[Unit, Room], other: tuple[Unit, Room]) -> bool:
    """Whether `one`, with fewer devices, can stand in for `other` wherever that may be."""
    (unit, room), (than, than_room) = one, other
    return (
        unit.hub == than.hub
        and unit.mask & than.mask == unit.mask
        and unit.chunk_s <= than.chunk_s
        and unit.overhead_s <= than.overhead_s
        and all(mine <= its for mine, its in zip(unit.decode_s, than.decode_s, strict=True))
        and bool((room.ends >= than_room.ends).all())
        and bool((room.head_ends >= than_room.head_ends).all())
    )


class Rooms:
    """Works out how far spans may reach; a model's sizes are added up once for all units."""

    def __init__(
        self,
        layout: ModelLayout,
        devices: Sequence[DeviceProfile],
        request: Workload,
        head: str | None,
    ) -> None:
        """`head` is a peer that keeps the head's weights whatever it runs; None: the first hub."""
        self._layout, self._devices, self._request, self._head = layout, devices, request, head
        total = np.concatenate([[0], np.cumsum(layout.block_bytes)])
        self._bytes = total[None, :] - total[:, None]  # [start, end]
        blocks = np.arange(layout.n_blocks + 1)
        self._n_blocks = blocks[None, :] - blocks[:, None]

    def of(self, unit: Unit) -> Room:
        """The room of one unit, everything resident."""
        reserved = [
            head_bytes(self._layout) if member.peer_id == self._head else 0
            for member in unit.members
        ]
        ends = self._ends(unit, reserved)
        if self._head is None:
            reserved[unit.hub_idx] = head_bytes(self._layout)
            return Room(ends=ends, head_ends=self._ends(unit, reserved))
        return Room(ends=ends, head_ends=ends)

    def _ends(self, unit: Unit, reserved: Sequence[int]) -> Ints:
        layout, blocks = self._layout, self._n_blocks
        fits = blocks >= 0
        is_group = len(unit.devices) > 1
        for device_idx, member, held in zip(unit.devices, unit.members, reserved, strict=True):
            device = self._devices[device_idx]
            share = weight_share(layout, member) if is_group else 1.0
            kv_bytes = kv_bytes_per_block(layout, self._request, member if is_group else None)
            taken = np.ceil(self._bytes * share) if is_group else self._bytes
            fits &= taken + blocks * kv_bytes + held <= device.memory_bytes
            fits &= blocks <= block_cap(device)
        first = np.arange(layout.n_blocks + 1)
        # Whatever is reserved, an empty span is where it starts.
        ends: Ints = np.maximum(first + fits.sum(axis=1) - 1, first)
        return ends
