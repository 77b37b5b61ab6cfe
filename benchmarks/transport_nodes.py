"""The other processes of `bench_transport.py`: a relay, and the far end of every link.

    python -m benchmarks.transport_nodes relay|end SEED SWARM

Each is a mesh in the swarm, on loopback; it prints its address, and lives until its standard
input ends. The far end also follows offers to relay and echoes frames on a port without a mesh.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import uvloop

from covey.transport.frame import Frame
from covey.transport.identity import Identity
from covey.transport.membership import Swarm
from covey.transport.mesh import Mesh
from covey.transport.messages import Beat, RelayDeclined, RelayOffer, RelayOpen
from covey.transport.peer import Peer
from covey.transport.relay.client import RelayClient
from covey.transport.relay.server import RelayServer

from .bench_link import connect, echo


@dataclass(frozen=True, slots=True)
class Child:
    """A running node of the benchmark's swarm."""

    peer_id: str
    address: str
    echo_port: int


@contextmanager
def running_child(role: str, swarm: Swarm, relay: Child | None = None) -> Generator[Child]:
    """Start a node; an end dials `relay` and keeps the link."""
    identity = Identity.generate()
    facts = [identity.seed.hex(), json.dumps(swarm.to_dict())]
    known = [relay.peer_id, relay.address] if relay is not None else []
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.transport_nodes", role, *facts, *known],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        if process.stdout is None:
            raise ValueError("a child without pipes")
        address, port = json.loads(process.stdout.readline())
        yield Child(identity.peer_id, address, port)
    finally:
        process.kill()
        process.communicate()


def serve_relay(mesh: Mesh) -> None:
    """Relay for the members of the swarm, within the limits that every node has."""
    server = RelayServer(mesh.peer_id, lambda: mesh.peers)
    mesh.serve(RelayOpen, server.on_open)
    mesh.serve(RelayDeclined, server.on_declined)
    mesh.add_door(server)


def answer(peer: Peer, frame: Frame) -> None:
    """The far end's answer to a call: a word."""
    if frame.request is not None:
        peer.reply(frame, Beat(body=b"taken"))


async def _relay(mesh: Mesh) -> None:
    serve_relay(mesh)
    print(json.dumps([mesh.addresses[0], 0]), flush=True)
    await _until_stdin_ends()


async def _end(mesh: Mesh, relay_id: str, relay_address: str) -> None:
    async def echo_on(connection: socket.socket, origin: str = "") -> None:
        await echo(await connect(connection, is_dialer=True))

    client = RelayClient(addresses_of=lambda _: [relay_address], on_connection=echo_on)
    mesh.serve(RelayOffer, client.on_offer)
    mesh.learn(relay_id, [relay_address])
    relay = await mesh.peer(relay_id)
    relay.hold()
    tasks: set[asyncio.Task[None]] = set()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        print(json.dumps([mesh.addresses[0], server.getsockname()[1]]), flush=True)
        loop = asyncio.get_running_loop()

        async def accept() -> None:
            while True:
                connection, _ = await loop.sock_accept(server)
                tasks.add(asyncio.create_task(echo_on(connection)))

        tasks.add(asyncio.create_task(accept()))
        await _until_stdin_ends()


async def _until_stdin_ends() -> None:
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def _main(role: str, seed: str, state: str, *known: str) -> None:
    identity, swarm = Identity(bytes.fromhex(seed)), Swarm.from_dict(json.loads(state))
    async with Mesh(identity, swarm, handler=answer) as mesh:
        if role == "relay":
            await _relay(mesh)
        else:
            await _end(mesh, *known)


if __name__ == "__main__":
    uvloop.run(_main(*sys.argv[1:]))
