"""The search's view of one question: every cost as a numpy table, by unit, device and block.

Devices are numbered in the order they are given, which the caller makes the same on every member.
Tables hold the same grid values as `cost.price`, so sums of them equal its figures bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from covey.partition.codecs import codec_for
from covey.partition.cost import Network, head_steps_s, token_bytes_at
from covey.partition.profile import STEP_BATCHES, DeviceProfile, ModelLayout, Workload
from covey.partition.speed import block_steps_s, chunk_s_per_block

from .rooms import Resident, Streaming
from .units import Unit, has_all_groups, units_of

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Instance:
    """Tables of one question.

    n devices d, e; N blocks b; U units u; B batches j, the STEP_BATCHES that the sessions fill.
    """

    n_blocks: int
    n_chunks: int
    n_sessions: int
    head_idx: int | None  # device; None: the hub of the first stage
    units: tuple[Unit, ...]
    has_all_groups: bool  # False: of many devices, only likely ones
    alone_s: Floats  # [d, B] a block of each device alone
    alone_chunk_s: Floats  # [d]
    head_s: Floats  # [d, B]
    decode_s: Floats  # [u, B] per block, of a whole batch
    chunk_s: Floats  # [u] per block
    overhead_s: Floats  # [u] per step
    ends: Ints  # [u, b]: furthest end of a span that starts at b and fits
    head_ends: Ints  # [u, b]: the same of the first stage
    latency_s: Floats  # [d, e, b] of one token, cut in front of b; inf: no link
    round_trip_s: Floats  # [d, e] of a short message; 0: no link
    wire_s: Floats  # [d, e, b] of one token
    chunk_wire_s: Floats  # [d, e, b]
    #: [u, 2, start, n], as `Room.read_s`; None: everything is in memory.
    read_s: Floats | None

    @property
    def n_devices(self) -> int:
        """Devices in the tables."""
        return len(self.head_s)

    @property
    def batches(self) -> tuple[int, ...]:
        """Sessions of a step, for each j."""
        return STEP_BATCHES[: self.head_s.shape[1]]

    @cached_property
    def hub(self) -> Ints:
        """[u]: each unit's hub."""
        return np.array([unit.hub for unit in self.units], dtype=np.int64)

    @cached_property
    def mask(self) -> Ints:
        """[u]: each unit's devices, a bit for each."""
        masks = np.array([unit.mask for unit in self.units], dtype=np.uint64)
        return masks.astype(np.int64)

    @cached_property
    def caps(self) -> tuple[Ints, Ints]:
        """[u] each: most blocks that a unit could run at its best place; the same if it is first,
        where it begins at block 0."""
        room = self.ends - np.arange(self.n_blocks + 1)
        return room.max(axis=1), self.head_ends[:, 0].copy()

    @cached_property
    def is_uniform(self) -> bool:
        """Whether it is all the same where cuts are: no figure then depends on the order of spans
        but for the links between them."""
        blocks = np.arange(self.n_blocks + 1)
        caps = self.caps[0][:, None]
        has_even_room = (self.ends == np.minimum(blocks + caps, self.n_blocks)).all()
        has_even_wire = all(
            (table_s == table_s[:, :, -1:]).all() for table_s in (self.latency_s, self.wire_s)
        )
        has_even_disks = self.read_s is None or self.read_s.shape[2] == 1
        return bool(has_even_room and has_even_wire and has_even_disks)

    @cached_property
    def resident(self) -> Ints:
        """[u]: blocks that a unit holds in memory, at its best place."""
        if self.read_s is None:
            return self.caps[0]
        held = (self.read_s == 0.0).any(axis=(1, 2)).cumprod(axis=1).sum(axis=1) - 1
        resident: Ints = np.minimum(held, self.caps[0])
        return resident

    @cached_property
    def read_block_s(self) -> Floats:
        """[u]: what each block beyond those takes the disk for a step, at least."""
        if self.read_s is None:
            return np.zeros(len(self.units))
        beyond = np.arange(self.n_blocks + 1) - self.resident[:, None]  # [u, n]
        may = (beyond > 0) & (np.arange(self.n_blocks + 1) <= self.caps[0][:, None])
        least_s = np.where(self.read_s > 0.0, self.read_s, np.inf).min(axis=(1, 2))
        per_block_s = np.where(may, least_s / np.maximum(beyond, 1), np.inf).min(axis=1)
        return np.where(np.isfinite(per_block_s), per_block_s, 0.0)

    def with_sessions(self, n_sessions: int) -> Instance:
        """The same for fewer sessions in flight; there is room for as many as before."""
        n_batches = sum(batch <= n_sessions for batch in self.batches)
        return replace(
            self,
            n_sessions=n_sessions,
            head_s=self.head_s[:, :n_batches],
            decode_s=self.decode_s[:, :n_batches],
            alone_s=self.alone_s[:, :n_batches],
        )

    def least_reads_s(self, units: Ints, n_blocks: Ints | int) -> Floats:
        """[r]: what units [r, k] read for each step, all together, at least."""
        short = np.maximum(n_blocks - self.resident[units].sum(axis=1), 0)
        least: Floats = short * self.read_block_s[units].min(axis=1)
        return least

    def reads(self, units: Ints, starts: Ints, n: Ints, *, is_first: Ints | bool) -> Floats | float:
        """How long each step of a stage reads, element by element."""
        if self.read_s is None:
            return 0.0
        at = starts if self.read_s.shape[2] > 1 else 0
        found: Floats = self.read_s[units, np.asarray(is_first, dtype=np.int64), at, n]
        return found


def build_instance(
    layout: ModelLayout,
    devices: Sequence[DeviceProfile],
    network: Network,
    *,
    request: Workload,
    head: str | None,
    index_pattern: str | None,
    max_members: int,
    streams: bool = False,
) -> Instance:
    """Fill the tables; with `streams`, spans may be larger than memory."""
    rooms = (Streaming if streams else Resident)(layout, request, head)
    found = units_of(layout, devices, network, request, max_members=max_members, rooms=rooms)
    reads = [room.read_s for _, room in found if room.read_s is not None]
    units = [unit for unit, _ in found]
    peers = [device.peer_id for device in devices]
    n_batches = sum(batch <= request.n_sessions for batch in STEP_BATCHES)
    latency_s, wire_s, chunk_wire_s = _link_tables(layout, peers, network, request, index_pattern)
    return Instance(
        n_blocks=layout.n_blocks,
        n_chunks=request.n_chunks,
        n_sessions=request.n_sessions,
        head_idx=None if head is None else peers.index(head),
        units=tuple(units),
        has_all_groups=max_members < 2 or not layout.can_split or has_all_groups(devices),
        alone_s=np.array([block_steps_s(device, request)[:n_batches] for device in devices]),
        alone_chunk_s=np.array([chunk_s_per_block(device, request) for device in devices]),
        head_s=np.array([head_steps_s(device)[:n_batches] for device in devices]),
        decode_s=np.array([unit.decode_s[:n_batches] for unit in units]).reshape(-1, n_batches),
        chunk_s=np.array([unit.chunk_s for unit in units]),
        overhead_s=np.array([unit.overhead_s for unit in units]),
        ends=np.array([room.ends for _, room in found]).reshape(-1, layout.n_blocks + 1),
        head_ends=np.array([room.head_ends for _, room in found]).reshape(-1, layout.n_blocks + 1),
        latency_s=latency_s,
        round_trip_s=np.array([[network.round_trip_s(d, e) for e in peers] for d in peers]),
        wire_s=wire_s,
        chunk_wire_s=chunk_wire_s,
        read_s=np.stack(reads) if reads else None,
    )


def _link_tables(
    layout: ModelLayout,
    peers: Sequence[str],
    network: Network,
    request: Workload,
    index_pattern: str | None,
) -> tuple[Floats, Floats, Floats]:
    """Latency, wire and chunk wire, [d, e, b] each; a device is at no distance from itself."""
    n, n_cuts = len(peers), layout.n_blocks + 1
    latency_s = np.full((n, n, n_cuts), np.inf)
    wire_s, chunk_wire_s = np.zeros((2, n, n, n_cuts))
    for d, sender in enumerate(peers):
        for e, receiver in enumerate(peers):
            link = None if d == e else network.link(sender, receiver)
            if d == e:
                latency_s[d, e] = 0.0
            if link is None:
                continue
            codec = codec_for(layout, link, request)
            cuts = [
                token_bytes_at(layout, b, codec=codec, index_pattern=index_pattern)
                for b in (range(n_cuts) if index_pattern else (n_cuts - 1,))
            ]
            for token_bytes in set(cuts):  # at most two: with and without indices
                border = network.border(
                    sender, receiver, token_bytes=token_bytes, chunk_tokens=request.chunk_tokens
                )
                if border is None:
                    continue
                here = (
                    [n_bytes == token_bytes for n_bytes in cuts] if index_pattern else slice(None)
                )
                latency_s[d, e, here] = border.latency_s
                wire_s[d, e, here] = border.wire_s
                chunk_wire_s[d, e, here] = border.chunk_wire_s
    return latency_s, wire_s, chunk_wire_s
