"""The search's view of one question: every cost as a numpy table, indexed by device and block.

Devices are numbered in the order they are given, which the caller makes the same on every member.
Tables hold the same grid values as `cost.price`, so sums of them equal its figures bit for bit.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .cost import (
    Network,
    block_cap,
    block_step_s,
    chunk_s_per_block,
    kv_bytes_per_block,
    on_grid,
    token_bytes_at,
)
from .profile import DeviceProfile, ModelLayout, Workload

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """Tables of one question. n devices, N blocks; d and e are devices, b blocks, h the head."""

    n_blocks: int
    n_chunks: int
    n_sessions: int
    head_idx: int | None  # None: the first stage's device
    head_s: Floats  # [h]
    decode_s: Floats  # [e] per block
    chunk_s: Floats  # [e] per block
    ends: Ints  # [e, b]: furthest end of a span that starts at b and fits
    head_ends: Ints  # [e, b]: the same when e is the head as well
    hop_s: Floats  # [d, e, b] latency + wire of one token, cut in front of b; inf: no link
    wire_s: Floats  # [d, e, b]
    chunk_hop_s: Floats  # [d, e, b]
    chunk_wire_s: Floats  # [d, e, b]

    @property
    def n_devices(self) -> int:
        """Devices in the tables."""
        return len(self.decode_s)

    def ends_of(self, e: int, start: Ints, is_head: npt.NDArray[np.bool_]) -> Ints:
        """Furthest end of a span of `e` from each of `start`; `start` itself if none fits."""
        ends: Ints = np.where(is_head, self.head_ends[e, start], self.ends[e, start])
        return ends

    def caps(self) -> Ints:
        """[e]: most blocks that e could run at its best place."""
        room = self.ends - np.arange(self.n_blocks + 1)
        if self.head_idx is not None:
            head_room = self.head_ends[self.head_idx] - np.arange(self.n_blocks + 1)
            room[self.head_idx] = head_room
        caps: Ints = room.max(axis=1)
        return caps


def build_instance(
    layout: ModelLayout,
    devices: Sequence[DeviceProfile],
    network: Network,
    *,
    request: Workload,
    head: str | None,
    codec: str,
    index_pattern: str | None,
) -> Instance:
    """Fill the tables."""
    head_bytes = layout.embedding_bytes + layout.head_bytes
    peers = [device.peer_id for device in devices]
    hops = _hop_tables(layout, peers, network, request, codec, index_pattern)
    return Instance(
        n_blocks=layout.n_blocks,
        n_chunks=request.n_chunks,
        n_sessions=request.n_sessions,
        head_idx=None if head is None else peers.index(head),
        head_s=np.array([on_grid(device.head_s) for device in devices]),
        decode_s=np.array([block_step_s(device, 1, request.depth) for device in devices]),
        chunk_s=np.array([chunk_s_per_block(device, request) for device in devices]),
        ends=np.array([span_ends(layout, device, request) for device in devices]),
        head_ends=np.array(
            [span_ends(layout, device, request, reserved=head_bytes) for device in devices]
        ),
        hop_s=hops[0],
        wire_s=hops[1],
        chunk_hop_s=hops[2],
        chunk_wire_s=hops[3],
    )


def span_ends(
    layout: ModelLayout, device: DeviceProfile, request: Workload, *, reserved: int = 0
) -> list[int]:
    """[n_blocks + 1]: how far a span from each block may reach on `device`.

    `reserved` bytes of its memory are for something else.
    """
    kv_bytes = kv_bytes_per_block(layout, request)
    total = [0]  # memory of the first b blocks
    for n_bytes in layout.block_bytes:
        total.append(total[-1] + n_bytes + kv_bytes)
    budget, cap = device.memory_bytes - reserved, block_cap(device)
    # bisect gives the first total above the budget; the one before it still fits.
    reach = [bisect_right(total, used + budget) - 1 for used in total]
    return [max(b, min(end, b + cap)) for b, end in enumerate(reach)]


def _hop_tables(
    layout: ModelLayout,
    peers: Sequence[str],
    network: Network,
    request: Workload,
    codec: str,
    index_pattern: str | None,
) -> Floats:
    """[4, d, e, b]: hop, wire, chunk hop and chunk wire; a device is at no distance from itself."""
    cuts = [
        token_bytes_at(layout, b, codec=codec, index_pattern=index_pattern)
        for b in range(layout.n_blocks + 1)
    ]
    tables = np.full((4, len(peers), len(peers), layout.n_blocks + 1), np.inf)
    for d, sender in enumerate(peers):
        for e, receiver in enumerate(peers):
            for token_bytes in set(cuts):  # at most two: with and without indices
                border = network.border(
                    sender, receiver, token_bytes=token_bytes, chunk_tokens=request.chunk_tokens
                )
                if border is None:
                    continue
                here = [n_bytes == token_bytes for n_bytes in cuts]
                tables[0, d, e, here] = border.decode_s
                tables[1, d, e, here] = border.wire_s
                tables[2, d, e, here] = border.chunk_s
                tables[3, d, e, here] = border.chunk_wire_s
    return tables
