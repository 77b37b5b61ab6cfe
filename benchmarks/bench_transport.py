"""What a link costs: direct, through a relay, and for calls beside lattica's.

    make bench-transport

Three processes on loopback: this one, a relay, and the far end of every link. What is compared
runs in turn, round by round, over connections that stand side by side, so that other work on the
machine falls on both alike. A call carries its payload one way and is answered with a word, here
and in lattica, which runs in two processes of its own. Needs an idle machine.
"""

from __future__ import annotations

import asyncio
import socket
import statistics
import sys
import time
from contextlib import AsyncExitStack

import uvloop

from covey.transport.frame import Tensor
from covey.transport.identity import Identity
from covey.transport.membership import Swarm
from covey.transport.mesh import Mesh
from covey.transport.messages import Beat
from covey.transport.peer import Peer
from covey.transport.relay.client import RelayClient
from covey.transport.steady.link import SteadyLink

from . import lattica_rpc
from .bench_link import connect, round_trips_us, speeds_mb_s
from .installs import CannotBuild
from .rows import Row, report
from .transport_nodes import Child, answer, running_child

N_ROUNDS = 9
N_SMALL, N_LARGE = 300, 3  # in each round
DEADLINE_S = 10.0
# Payload, how many calls are under way at once, calls in a round.
CALLS = ((128, 1, 1000), (128, 16, 3000), (256 << 10, 1, 150), (256 << 10, 16, 150))


async def main() -> list[Row]:
    """Start the other processes, measure in turn."""
    identity = Identity.generate()
    swarm = Swarm.create(identity.peer_id)
    async with AsyncExitStack() as stack:
        relay = stack.enter_context(running_child("relay", swarm))
        far = stack.enter_context(running_child("end", swarm, relay))
        mesh = await stack.enter_async_context(Mesh(identity, swarm, handler=answer))
        for child in (relay, far):
            mesh.learn(child.peer_id, [child.address])
        rows = await _link_rows(mesh, relay, far)
        lattica = stack.enter_context(lattica_rpc.running_pair())
        return [*rows, *await _call_rows(await mesh.peer(far.peer_id), lattica)]


async def _link_rows(mesh: Mesh, relay: Child, far: Child) -> list[Row]:
    direct, relayed = await _direct_link(far), await _relayed_link(mesh, relay, far)
    await asyncio.gather(*(round_trips_us(link, N_SMALL) for link in (direct, relayed)))
    times: dict[SteadyLink, list[float]] = {direct: [], relayed: []}
    speeds: dict[SteadyLink, list[float]] = {direct: [], relayed: []}
    for _ in range(N_ROUNDS):
        for link in (direct, relayed):
            times[link].append(statistics.median(await round_trips_us(link, N_SMALL)))
        for link in (direct, relayed):
            speeds[link].append(statistics.median(await speeds_mb_s(link, N_LARGE)))
    added = [one - other for one, other in zip(times[relayed], times[direct], strict=True)]
    for link in (direct, relayed):
        await link.aclose()
    return [
        Row("direct: 16 KB frame, round trip p50, us", statistics.median(times[direct]), 150),
        Row("direct: 8 MB frame, MB/s", statistics.median(speeds[direct]), 500, "at least"),
        Row("relayed: 8 MB frame, MB/s", statistics.median(speeds[relayed]), 100, "at least"),
        Row("relayed: added to the round trip of 16 KB, us", statistics.median(added), 300),
        Row("  round trip p50, us", statistics.median(times[relayed])),
    ]


async def _direct_link(far: Child) -> SteadyLink:
    connection = socket.socket()
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", far.echo_port))
    return await connect(connection, is_dialer=False)


async def _relayed_link(mesh: Mesh, relay: Child, far: Child) -> SteadyLink:
    async def refuse(connection: socket.socket, origin: str) -> None:
        connection.close()

    client = RelayClient(addresses_of=lambda _: [relay.address], on_connection=refuse)
    to_relay = await mesh.peer(relay.peer_id)
    connection = await client.open(far.peer_id, to_relay, deadline_s=DEADLINE_S)
    return await connect(connection, is_dialer=False)


async def _call_rows(peer: Peer, lattica: lattica_rpc.Caller) -> list[Row]:
    rows: list[Row] = []
    for nbytes, in_flight, n_calls in CALLS:
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(N_ROUNDS):
            ours.append(await _calls_per_s(peer, nbytes, in_flight, n_calls))
            theirs.append(await asyncio.to_thread(lattica.calls_per_s, nbytes, in_flight, n_calls))
        size = f"{nbytes} B" if nbytes < 1 << 10 else f"{nbytes >> 10} KB"
        what = f"calls of {size}, {in_flight} at once"
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        rows += [
            Row(f"{what}: ours to lattica's", ratio, 1, "at least"),
            Row("  ours, calls/s", statistics.median(ours)),
            Row("  lattica's, calls/s", statistics.median(theirs)),
        ]
    return rows


async def _calls_per_s(peer: Peer, nbytes: int, in_flight: int, n_calls: int) -> float:
    payload = {"payload": Tensor("u8", (nbytes,), bytes(nbytes))}
    left = n_calls

    async def call_on() -> None:
        nonlocal left
        while left:
            left -= 1
            await peer.request(Beat(body=b""), payload, timeout_s=DEADLINE_S)

    started_at = time.perf_counter()
    await asyncio.gather(*(call_on() for _ in range(in_flight)))
    return n_calls / (time.perf_counter() - started_at)


if __name__ == "__main__":
    try:
        found = uvloop.run(main())
    except CannotBuild as error:
        sys.exit(f"{error}")
    report(found)
