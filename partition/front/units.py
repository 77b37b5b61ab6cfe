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

from covey.partition.group import SUM_CODEC, group_term
from covey.partition.memory import block_cap
from covey.partition.network import Network
from covey.partition.plan import Member, Span, StagePlan
from covey.partition.profile import DeviceProfile, ModelLayout, Workload
from covey.partition.speed import (
    Steps,
    block_step_s,
    block_steps_s,
    chunk_s_per_block,
    step_overhead_s,
)

from .rooms import Room, Rooms

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

    def stage(self, span: Span, streamed: Sequence[int] | None = None) -> StagePlan:
        """The stage that runs a span, `streamed` blocks of it from each member's disk, if any."""
        members = self.members
        if streamed is not None and any(streamed):
            members = tuple(
                Member(one.peer_id, one.kv_heads, one.mlp_columns, n_blocks)
                for one, n_blocks in zip(members, streamed, strict=True)
            )
        return StagePlan(span, members, self.hub_idx, self.sum_codec)


def units_of(
    layout: ModelLayout,
    devices: Sequence[DeviceProfile],
    network: Network,
    request: Workload,
    *,
    max_members: int,
    rooms: Rooms,
) -> list[tuple[Unit, Room]]:
    """Every unit worth having, single devices first; `devices` in order of peer id."""
    blocks = np.arange(layout.n_blocks + 1)
    kept: list[tuple[Unit, Room]] = []
    sizes = range(1, min(max_members, len(devices)) + 1) if layout.can_split else (1,)
    for n_members in sizes:
        new = []
        for unit in (
            _singles(devices, request)
            if n_members == 1
            else _groups(layout, devices, network, request, n_members)
        ):
            room = rooms.of(unit.members, [devices[idx] for idx in unit.devices], unit.hub_idx)
            one = (unit, room)
            if (room.ends > blocks).any() and not any(_is_no_worse(other, one) for other in kept):
                new.append(one)
        kept += new
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
        and (
            room.read_s is None
            or than_room.read_s is None
            or bool((room.read_s <= than_room.read_s).all())
        )
    )
