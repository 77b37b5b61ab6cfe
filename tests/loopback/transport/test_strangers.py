"""What strangers may do to an open port: they read nothing, cost little, and keep nobody out."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress

import psutil
import pytest

from covey.transport import listener
from covey.transport.errors import PeerUnreachable
from covey.transport.listener import BUDGET, MAX_SILENT, MAX_TRACKED
from covey.transport.membership import Keyring, Swarm
from covey.transport.preamble import NONCE_BYTES, PREAMBLE_BYTES, build_preamble
from support.meshes import Node, beat, swarm_of

pytestmark = pytest.mark.network


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


def port_of(node: Node) -> tuple[str, int]:
    host, _, port = node.mesh.addresses[0].rpartition(":")
    return host, int(port)


async def connected(node: Node, source: str = "127.0.0.2") -> socket.socket:
    connection = socket.socket()
    connection.setblocking(False)
    connection.bind((source, 0))
    await asyncio.get_running_loop().sock_connect(connection, port_of(node))
    return connection


async def read_to_the_end(connection: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    received = b""
    with connection, suppress(ConnectionResetError):
        while more := await loop.sock_recv(connection, 65536):
            received += more
    return received


def preamble(node: Node, *, key: bytes | None = None, key_id: bytes | None = None) -> bytes:
    assert node.swarm is not None
    return build_preamble(
        key_id=key_id or node.swarm.key_id,
        key=key or node.swarm.preamble_key,
        expected_peer_id=node.id,
        nonce=os.urandom(NONCE_BYTES),
        unix_time=time.time(),
    )


@pytest.mark.parametrize("n_bytes", [1, PREAMBLE_BYTES - 1, PREAMBLE_BYTES, 4096, 1 << 20])
async def test_garbage_of_any_length_reads_not_one_byte(
    stack: AsyncExitStack, n_bytes: int
) -> None:
    (node,) = await swarm_of(stack, 1)
    connection = await connected(node)
    with suppress(ConnectionResetError, BrokenPipeError):
        await asyncio.get_running_loop().sock_sendall(connection, os.urandom(n_bytes))
        connection.shutdown(socket.SHUT_WR)
    assert await read_to_the_end(connection) == b""


async def test_a_wrong_secret_reads_not_one_byte(stack: AsyncExitStack) -> None:
    (node,) = await swarm_of(stack, 1)
    for hello in (preamble(node, key=b"x" * 32), preamble(node, key_id=b"x" * 16)):
        connection = await connected(node)
        await asyncio.get_running_loop().sock_sendall(connection, hello)
        assert await read_to_the_end(connection) == b""


async def test_a_secret_of_an_epoch_that_is_forgotten_reads_not_one_byte(
    stack: AsyncExitStack,
) -> None:
    (node,) = await swarm_of(stack, 1)
    hello = preamble(node)
    assert node.swarm is not None
    node.mesh.use_swarm(node.swarm.next_epoch())  # and no door honours the one before
    connection = await connected(node)
    await asyncio.get_running_loop().sock_sendall(connection, hello)
    assert await read_to_the_end(connection) == b""


async def test_one_byte_at_a_time_is_cut_off_at_the_deadline(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "PREAMBLE_S", 0.3)
    (node,) = await swarm_of(stack, 1)
    connection = await connected(node)
    began_at = time.monotonic()
    hello, loop = preamble(node), asyncio.get_running_loop()

    async def drip() -> None:
        with suppress(OSError):
            for byte in hello:
                await loop.sock_sendall(connection, bytes([byte]))
                await asyncio.sleep(0.05)

    dripping = asyncio.create_task(drip())
    assert await read_to_the_end(connection) == b""
    assert time.monotonic() - began_at < 1.0
    dripping.cancel()
    assert not node.mesh.reception._listener._silent


async def test_an_address_runs_out_of_failures_before_anything_is_checked(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await swarm_of(stack, 2)
    judged = 0
    judge = a.mesh.reception._listener._gate.judge

    def counting(data: bytes, *, unix_time: float) -> object:
        nonlocal judged
        judged += 1
        return judge(data, unix_time=unix_time)

    monkeypatch.setattr(a.mesh.reception._listener._gate, "judge", counting)
    for _ in range(3 * BUDGET):
        connection = await connected(a)
        with suppress(OSError):
            await asyncio.get_running_loop().sock_sendall(connection, bytes(PREAMBLE_BYTES))
        assert await read_to_the_end(connection) == b""
    assert BUDGET <= judged < 2 * BUDGET  # what the time they took gives back is among them
    assert (await b.mesh.peer(a.id)).peer_id == a.id  # from another address


N_DIALS = 10_000
N_SOURCES = 500  # addresses of 127.0.0.0/8
HELD = 400  # connections that the attacker keeps open at once


@pytest.mark.slow
async def test_ten_thousand_half_open_dials_keep_no_member_out(stack: AsyncExitStack) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2048:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, hard), hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
    a, b, c = await swarm_of(stack, 3)
    to_c = await a.mesh.peer(c.id)
    process = psutil.Process()
    rss_before, fds_before = process.memory_info().rss, process.num_fds()
    held: list[socket.socket] = []
    n_kept_max = slowest_s = 0.0
    for n in range(N_DIALS):
        source = n % N_SOURCES
        held.append(await connected(a, f"127.0.{1 + source // 250}.{1 + source % 250}"))
        if len(held) > HELD:
            held.pop(0).close()
        n_kept_max = max(n_kept_max, len(a.mesh.reception._listener._silent))
        if n % 1000 == 999:
            began_at = time.monotonic()
            peer = await b.mesh.peer(a.id)  # a new link in the middle of it
            slowest_s = max(slowest_s, time.monotonic() - began_at)
            await peer.send(beat("hello"))
            assert (await a.frames.get())[1].message == beat("hello")
            b.mesh.drop(a.id)
            b.mesh.learn(a.id, a.mesh.addresses)
            await b.downs.get()
            await to_c.ping(timeout_s=2)
    n_fds = process.num_fds() - len(held) - fds_before
    for connection in held:
        connection.close()
    assert n_kept_max <= MAX_SILENT + 1  # the one that makes way is still ending
    assert n_fds <= MAX_SILENT + 8
    assert slowest_s < 2.0
    assert process.memory_info().rss - rss_before < 32 << 20
    assert len(a.mesh.reception._listener._budget._buckets) <= MAX_TRACKED


async def test_a_member_of_another_epoch_is_a_stranger(stack: AsyncExitStack) -> None:
    a, b = Node(), Node()
    swarm = Swarm.create(a.id)
    await stack.enter_async_context(a.make(swarm))
    await stack.enter_async_context(b.make(Keyring(current=swarm).current.next_epoch()))
    b.mesh.learn(a.id, a.mesh.addresses)
    with pytest.raises(PeerUnreachable, match="hung up"):
        await b.mesh.peer(a.id)
