"""The observation door of a real listening port: members learn their address, strangers nothing."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator

import pytest

from covey.transport.errors import LinkBroken, LinkTimeout, MalformedFrame, TransportError
from covey.transport.identity import Identity
from covey.transport.membership import Swarm
from covey.transport.mesh import Mesh
from covey.transport.nat import observation
from covey.transport.nat.observation import (
    MAX_HELD_EACH,
    ObservationDoor,
    ObserveKeys,
    observe,
    reusable_socket,
)
from covey.transport.preamble import NONCE_BYTES, build_preamble

pytestmark = pytest.mark.network

ME = Identity(bytes([7] * 32))
SWARM = Swarm.create(ME.peer_id)
KEYS = ObserveKeys.of(SWARM)
STRANGER = ObserveKeys.of(Swarm.create(ME.peer_id))


@pytest.fixture
async def server() -> AsyncIterator[str]:
    door = ObservationDoor(KEYS)
    async with Mesh(ME, SWARM, handler=lambda peer, frame: None) as mesh:
        mesh.add_door(door)
        yield mesh.addresses[0]
        await door.aclose()


async def is_hung_up(connection: socket.socket) -> bool:
    """Whether the other side closes within a moment, without a byte."""
    try:
        async with asyncio.timeout(2):
            return await asyncio.get_running_loop().sock_recv(connection, 1) == b""
    except ConnectionError:
        return True


async def is_held(connection: socket.socket) -> bool:
    try:
        async with asyncio.timeout(0.1):
            await asyncio.get_running_loop().sock_recv(connection, 1)
    except TimeoutError:
        return True
    return False


async def test_a_member_learns_its_address_and_keeps_the_connection(server: str) -> None:
    with reusable_socket("127.0.0.1") as connection:
        local_port = connection.getsockname()[1]
        seen = await observe(connection, server, peer_id=ME.peer_id, keys=KEYS)
        assert seen == f"127.0.0.1:{local_port}"
        assert await is_held(connection)
        # The port can be listened on, and connected from, meanwhile.
        with reusable_socket("127.0.0.1", local_port) as listening:
            listening.listen()


async def test_a_stranger_gets_a_close_and_no_byte(server: str) -> None:
    with reusable_socket("127.0.0.1") as connection, pytest.raises(LinkBroken, match="hung up"):
        await observe(connection, server, peer_id=ME.peer_id, keys=STRANGER)


async def test_who_means_another_member_gets_a_close(server: str) -> None:
    other = Identity.generate().peer_id
    with reusable_socket("127.0.0.1") as connection, pytest.raises(LinkBroken):
        await observe(connection, server, peer_id=other, keys=KEYS)


async def test_a_slow_dialer_is_dropped(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observation, "NONCE_S", 0.05)
    preamble = build_preamble(
        key_id=KEYS.key_id,
        key=KEYS.key,
        expected_peer_id=ME.peer_id,
        nonce=os.urandom(NONCE_BYTES),
        unix_time=time.time(),
    )
    host, _, port = server.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_sendall(connection, preamble + b"half")
        assert await is_hung_up(connection)


async def test_a_connection_is_held_for_a_bounded_time(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observation, "HELD_S", 0.05)
    with reusable_socket("127.0.0.1") as connection:
        await observe(connection, server, peer_id=ME.peer_id, keys=KEYS)
        assert await is_hung_up(connection)


async def test_one_host_holds_a_bounded_number_and_all_are_answered(server: str) -> None:
    connections = [reusable_socket("127.0.0.1") for _ in range(MAX_HELD_EACH + 4)]
    for connection in connections:
        await observe(connection, server, peer_id=ME.peer_id, keys=KEYS)
    held = [await is_held(connection) for connection in connections]
    assert held.count(True) == MAX_HELD_EACH
    for connection in connections:
        connection.close()


async def test_a_held_connection_gives_its_place_back() -> None:
    door = ObservationDoor(KEYS)
    async with Mesh(ME, SWARM, handler=lambda peer, frame: None) as mesh:
        mesh.add_door(door)
        for _ in range(MAX_HELD_EACH + 1):
            with reusable_socket("127.0.0.1") as connection:
                await observe(connection, mesh.addresses[0], peer_id=ME.peer_id, keys=KEYS)
        async with asyncio.timeout(2):
            await door._tasks.join(2)
        assert door._held.total() == 0
        await door.aclose()


async def test_a_server_that_is_no_member_is_not_believed() -> None:
    async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(77)
        writer.write(os.urandom(52))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(lie, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    with reusable_socket("127.0.0.1") as connection, pytest.raises(MalformedFrame):
        await observe(connection, address, peer_id=ME.peer_id, keys=KEYS)
    server.close()
    await server.wait_closed()


async def test_silence_ends_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with reusable_socket("127.0.0.1") as connection, pytest.raises(LinkTimeout):
            await observe(connection, address, peer_id=ME.peer_id, keys=KEYS, timeout_s=0.05)


async def test_a_taken_port_is_an_error_of_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(TransportError):
        reusable_socket("127.0.0.1", taken.getsockname()[1])
