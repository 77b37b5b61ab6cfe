"""Pairs of lanes of every kind, without the meshes that agree on them."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from itertools import combinations

from covey.transport.identity import Identity
from covey.transport.lane.inbox import memory_lane_pair
from covey.transport.lane.lane import Lane
from covey.transport.lane.secure import secure_local, secure_tls
from covey.transport.lane.stream import StreamLane
from covey.transport.lane.waiting import SPIN_S
from covey.transport.tls import build_contexts

A, B = Identity(bytes(32)), Identity(bytes([1] * 32))

LanePair = tuple[Lane, Lane]


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        dialled = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    return dialled, accepted


async def tls_lane(
    connection: socket.socket,
    own: Identity,
    peer: Identity,
    *,
    is_dialer: bool,
    seed: bytes = bytes(32),
    lane_id: bytes = bytes(16),
    spin_s: float = SPIN_S,
) -> StreamLane:
    wire = await secure_tls(
        connection,
        build_contexts(seed, own),
        lane_id,
        peer_id=peer.peer_id,
        is_dialer=is_dialer,
        is_allowed=lambda _: True,
    )
    return StreamLane(wire, peer.peer_id, "tls", spin_s=spin_s)


async def tls_lane_pair(*, spin_s: float = SPIN_S) -> LanePair:
    dialled, accepted = tcp_pair()
    at_a, at_b = await asyncio.gather(
        tls_lane(dialled, A, B, is_dialer=True, spin_s=spin_s),
        tls_lane(accepted, B, A, is_dialer=False, spin_s=spin_s),
    )
    return at_a, at_b


async def local_lane_pair(*, spin_s: float = SPIN_S) -> LanePair:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    key, lane_id = os.urandom(32), os.urandom(16)
    for end in (near, far):
        end.setblocking(False)
    at_a, at_b = await asyncio.gather(
        secure_local(near, key, lane_id, is_dialer=True),
        secure_local(far, key, lane_id, is_dialer=False),
    )
    return (
        StreamLane(at_a, B.peer_id, "local", spin_s=spin_s),
        StreamLane(at_b, A.peer_id, "local", spin_s=spin_s),
    )


def memory_mesh(n: int, *, spin_s: float = 0.0) -> list[Mapping[int, Lane]]:
    """For each of `n` ranks its lanes to all others."""
    ends: list[dict[int, Lane]] = [{} for _ in range(n)]
    for i, j in combinations(range(n), 2):
        ends[i][j], ends[j][i] = memory_lane_pair(str(i), str(j), spin_s=spin_s)
    return list(ends)
