"""A member carries bytes for two others, who trust it with none of them."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress

import psutil
import pytest

from covey.transport.errors import (
    ErrorCode,
    LinkBroken,
    LinkClosed,
    PeerUnreachable,
    RefusedByPeer,
)
from covey.transport.frame import Frame, Tensor
from covey.transport.liveness import LivenessRules
from covey.transport.messages import Beat, Forward, RelayOffer, RelayOpen, RelayOpened
from covey.transport.preamble import NONCE_BYTES, build_preamble
from covey.transport.relay import client as relay_client
from covey.transport.relay import keeper, splice
from covey.transport.relay.circuits import RelayLimits
from covey.transport.relay.keeper import RelayHolder
from covey.transport.relay.shaping import MAX_QUANTUM_BYTES
from support import relay_process
from support.meshes import Node, swarm_of
from support.relays import End, Trio, serve_relay, trio_of

pytestmark = pytest.mark.network

MIB = 1 << 20


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


def hidden(nbytes: int) -> Frame:
    message = Forward(session="s", epoch=0, stage_idx=0, step=0, position=0, n_return=1)
    return Frame(message=message, tensors={"hidden": Tensor("u8", (nbytes,), os.urandom(nbytes))})


async def until(is_so: Callable[[], bool]) -> None:
    """Wait for what nobody tells (each test has a deadline of its own)."""
    while not is_so():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def until_circuits(trio: Trio, n: int) -> None:
    """Wait for the relay to forget the others."""
    await until(lambda: trio.server.n_circuits <= n)


# --- what it is for ----------------------------------------------------------------------------


async def test_two_members_talk_through_a_third(stack: AsyncExitStack) -> None:
    trio = await trio_of(stack)
    at_a, at_b = await trio.link_pair()
    assert (at_a.peer_id, at_b.peer_id) == (trio.b.node.id, trio.a.node.id)
    assert at_a.remote is at_b.remote is None
    sent = hidden(3 * MIB)
    for sender, receiver in ((at_a, at_b), (at_b, at_a)):
        await sender.send(sent)
        got = await receiver.receive()
        assert got.tensors["hidden"].data == sent.tensors["hidden"].data
    assert trio.server.nbytes > 6 * MIB
    await at_a.aclose()
    with pytest.raises(LinkClosed):
        await at_b.receive()
    await until_circuits(trio, 0)


async def test_the_relay_sees_ciphertext_only(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = memoryview(bytearray(MAX_QUANTUM_BYTES))
    monkeypatch.setattr(splice, "_scratch", scratch)
    seen = bytearray()
    charge = splice.Toll.charge

    def record(toll: splice.Toll, payer: str, nbytes: int) -> None:
        seen.extend(scratch[:nbytes])
        charge(toll, payer, nbytes)

    monkeypatch.setattr(splice.Toll, "charge", record)
    trio = await trio_of(stack)
    at_a, at_b = await trio.link_pair()
    text = b"the hidden states of a private conversation"
    for sender, receiver in ((at_a, at_b), (at_b, at_a)):
        await sender.send(Frame(message=Beat(body=text)))
        assert (await receiver.receive()).message == Beat(body=text)
    assert len(seen) == trio.server.nbytes > 2 * len(text)
    for secret in (text, b"beat", trio.a.node.id.encode(), trio.b.node.id.encode()):
        assert secret not in seen
    for link in (at_a, at_b):
        await link.aclose()


async def test_what_an_end_says_first_waits_for_the_other(stack: AsyncExitStack) -> None:
    trio = await trio_of(stack)
    at_a = await trio.open()
    at_a.send(b"are you there?")
    at_b, _ = await trio.b.arrivals.get()
    assert await asyncio.get_running_loop().sock_recv(at_b, 100) == b"are you there?"
    for connection in (at_a, at_b):
        connection.close()
    await until_circuits(trio, 0)


async def test_a_half_that_ends_lets_the_other_finish(stack: AsyncExitStack) -> None:
    trio = await trio_of(stack)
    loop = asyncio.get_running_loop()
    at_a, at_b = await trio.socket_pair()
    data = os.urandom(5 * MIB)
    sending = asyncio.create_task(loop.sock_sendall(at_a, data))
    got = b""
    while len(got) < len(data) // 2:
        got += await loop.sock_recv(at_b, MIB)
    await sending
    at_a.shutdown(socket.SHUT_WR)
    while more := await loop.sock_recv(at_b, MIB):
        got += more
    assert got == data
    await loop.sock_sendall(at_b, b"thank you")
    at_b.close()
    assert await loop.sock_recv(at_a, 100) == b"thank you"
    assert await loop.sock_recv(at_a, 100) == b""
    at_a.close()
    await until_circuits(trio, 0)


# --- what ends it ------------------------------------------------------------------------------


async def test_when_the_relay_is_killed_both_ends_know_at_once(stack: AsyncExitStack) -> None:
    nodes = await swarm_of(stack, 3)
    stranger = Node()
    swarm = nodes[0].swarm
    if swarm is None:
        raise ValueError("no swarm")
    command = [sys.executable, relay_process.__file__, stranger.identity.seed.hex()]
    process = subprocess.Popen(  # noqa: ASYNC220  a moment, in a test
        [*command, json.dumps(swarm.to_dict())], stdout=subprocess.PIPE, text=True
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    if process.stdout is None:
        raise ValueError("no output")
    address = (await asyncio.to_thread(process.stdout.readline)).strip()
    process.stdout.close()
    a, b = End(nodes[0]), End(nodes[1])
    for end in (a, b):
        await end.start(stack)
        end.node.mesh.learn(stranger.id, [address])
        await (await end.node.mesh.peer(stranger.id)).ping(timeout_s=5)
    unused = serve_relay(nodes[2], stack)
    at_a, at_b = await Trio(a, b, stranger, unused).link_pair()
    await at_a.send(hidden(MIB))
    await at_b.receive()
    process.kill()
    killed_at = time.monotonic()
    for link in (at_a, at_b):
        with pytest.raises(LinkBroken):
            await link.receive()
    assert time.monotonic() - killed_at < 2.0


async def test_an_end_that_breaks_off_breaks_the_other(stack: AsyncExitStack) -> None:
    trio = await trio_of(stack)
    at_a, at_b = await trio.link_pair()
    at_a.abort(LinkBroken("the test says so"))
    with pytest.raises(LinkBroken):
        await at_b.receive()
    await until_circuits(trio, 0)


async def test_an_idle_circuit_ends_and_one_with_a_heartbeat_does_not(
    stack: AsyncExitStack,
) -> None:
    trio = await trio_of(stack, limits=RelayLimits(idle_s=0.3))
    at_a, at_b = await trio.link_pair()
    started_at = time.monotonic()
    while time.monotonic() < started_at + 0.7:
        await at_a.send(Frame(message=Beat(body=b"alive")))
        await at_b.receive()
        await asyncio.sleep(0.05)
    assert trio.server.n_circuits == 1
    for link in (at_a, at_b):
        with pytest.raises(LinkBroken):
            await link.receive()
    assert trio.server.n_circuits == 0


async def test_circuits_that_are_over_leave_nothing_behind(stack: AsyncExitStack) -> None:
    trio = await trio_of(stack, limits=RelayLimits(opens_per_s=1e6))

    async def open_and_end() -> None:
        at_a, at_b = await trio.socket_pair()
        at_a.send(b"some bytes")
        at_b.close()
        at_a.close()
        await until_circuits(trio, 0)

    await open_and_end()
    before = psutil.Process().num_fds()
    for _ in range(50):
        await open_and_end()
    assert psutil.Process().num_fds() == before
    assert not trio.server._waiting
    assert not trio.server._splices


async def test_a_relay_that_stops_ends_its_circuits(stack: AsyncExitStack) -> None:
    trio = await trio_of(stack)
    at_a, at_b = await trio.link_pair()
    waiting = await trio.open()
    trio.server.close()
    for link in (at_a, at_b):
        with pytest.raises(LinkBroken):
            await link.receive()
    assert await asked(trio, trio.b.node.id) is ErrorCode.RELAY_REFUSED
    waiting.close()
    (await trio.b.arrivals.get())[0].close()


async def test_a_removed_member_loses_its_circuits(stack: AsyncExitStack) -> None:
    trio = await trio_of(stack)
    at_a, at_b = await trio.link_pair()
    trio.server.drop(trio.b.node.id)
    for link in (at_a, at_b):
        with pytest.raises(LinkBroken):
            await link.receive()
    assert trio.server.n_circuits == 0


# --- who may ask, and for how much -------------------------------------------------------------


async def asked(trio: Trio, peer_id: str) -> ErrorCode | None:
    relay = await trio.a.node.mesh.peer(trio.relay.id)
    try:
        await relay.request(RelayOpen(peer=peer_id), timeout_s=5)
    except RefusedByPeer as error:
        return error.code
    return None


async def test_a_relay_says_why_it_will_not(stack: AsyncExitStack) -> None:
    trio = await trio_of(stack)
    assert await asked(trio, trio.a.node.id) is ErrorCode.RELAY_REFUSED
    assert await asked(trio, trio.relay.id) is ErrorCode.RELAY_REFUSED
    assert await asked(trio, Node().id) is ErrorCode.RELAY_NO_LINK
    trio.server.is_willing = False
    assert await asked(trio, trio.b.node.id) is ErrorCode.RELAY_REFUSED
    relay = await trio.a.node.mesh.peer(trio.relay.id)
    with pytest.raises(RefusedByPeer, match="relay refused"):
        await trio.a.client.open(trio.b.node.id, relay, deadline_s=5)
    assert trio.server.n_circuits == 0
    assert trio.b.arrivals.empty()


async def test_a_flood_of_requests_is_bounded_and_forgotten(stack: AsyncExitStack) -> None:
    limits = RelayLimits(half_open=6, half_open_per_peer=4, half_open_s=0.3)
    trio = await trio_of(stack, limits=limits)
    trio.b.node.mesh.serve(RelayOffer, lambda peer, frame: None)  # it never comes
    codes = [await asked(trio, trio.b.node.id) for _ in range(20)]
    assert codes == [None] * 4 + [ErrorCode.RELAY_FULL] * 16
    assert trio.server.n_circuits == 4
    await until_circuits(trio, 0)
    await trio.b.start(stack)
    at_a, at_b = await trio.link_pair()
    for link in (at_a, at_b):
        await link.aclose()


async def test_a_member_has_only_so_many_circuits(stack: AsyncExitStack) -> None:
    trio = await trio_of(stack, limits=RelayLimits(circuits_per_peer=2, opens_per_s=1e6))
    pairs = [await trio.socket_pair() for _ in range(2)]
    assert await asked(trio, trio.b.node.id) is ErrorCode.RELAY_FULL
    for connection in pairs.pop():
        connection.close()
    await until_circuits(trio, 1)
    pairs.append(await trio.socket_pair())
    for pair in pairs:
        for connection in pair:
            connection.close()


async def test_an_end_whose_other_does_not_come_is_dropped(stack: AsyncExitStack) -> None:
    trio = await trio_of(stack, limits=RelayLimits(half_open_s=0.3))
    trio.b.node.mesh.serve(RelayOffer, lambda peer, frame: None)
    at_a = await trio.open()
    assert await asyncio.get_running_loop().sock_recv(at_a, 100) == b""
    at_a.close()
    assert trio.server.n_circuits == 0


async def test_an_end_that_cannot_come_spares_the_other_the_wait(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    trio = await trio_of(stack, limits=RelayLimits(half_open_s=30.0))
    monkeypatch.setattr(relay_client, "MAX_OFFERS", 0)
    at_a = await trio.open()
    with suppress(ConnectionResetError):  # it was dropped with our preamble unread
        assert await asyncio.get_running_loop().sock_recv(at_a, 100) == b""
    at_a.close()
    await until_circuits(trio, 0)


async def test_a_circuit_opens_to_its_key_only_and_only_to_two(stack: AsyncExitStack) -> None:
    trio = await trio_of(stack)
    trio.b.node.mesh.serve(RelayOffer, lambda peer, frame: None)
    relay = await trio.a.node.mesh.peer(trio.relay.id)
    opened = (await relay.request(RelayOpen(peer=trio.b.node.id), timeout_s=5)).message
    if not isinstance(opened, RelayOpened):
        raise TypeError(opened)
    port = relay.dialled_address
    assert port is not None
    loop = asyncio.get_running_loop()

    async def enter(key: bytes) -> socket.socket:
        connection = await asyncio.to_thread(socket.create_connection, port)
        connection.setblocking(False)
        preamble = build_preamble(
            key_id=opened.circuit,
            key=key,
            expected_peer_id=trio.relay.id,
            nonce=os.urandom(NONCE_BYTES),
            unix_time=time.time(),
        )
        await loop.sock_sendall(connection, preamble)
        return connection

    thief = await enter(bytes(32))
    assert await loop.sock_recv(thief, 1) == b""
    first, second = await enter(opened.key), await enter(opened.key)
    await loop.sock_sendall(first, b"hello")
    assert await loop.sock_recv(second, 5) == b"hello"
    third = await enter(opened.key)
    assert await loop.sock_recv(third, 1) == b""
    for connection in (thief, first, second, third):
        connection.close()


async def test_only_so_many_offers_are_followed_at_once(stack: AsyncExitStack) -> None:
    limits = RelayLimits(half_open=100, half_open_per_peer=100, circuits_per_peer=100)
    trio = await trio_of(stack, limits=limits)
    trio.b.let_go.clear()  # it screens them for long
    relay = await trio.a.node.mesh.peer(trio.relay.id)
    opened = [
        await trio.a.client.open(trio.b.node.id, relay, deadline_s=5)
        for _ in range(2 * relay_client.MAX_OFFERS_PER_RELAY)
    ]
    await (await trio.relay.mesh.peer(trio.b.node.id)).ping(timeout_s=5)  # it has read them all
    came = [await trio.b.arrivals.get() for _ in range(relay_client.MAX_OFFERS_PER_RELAY)]
    await until_circuits(trio, relay_client.MAX_OFFERS_PER_RELAY)
    assert trio.b.arrivals.empty()
    trio.b.let_go.set()
    for connection in (*opened, *(connection for connection, _ in came)):
        connection.close()


async def test_offers_lead_to_the_relay_and_nowhere_else(stack: AsyncExitStack) -> None:
    """Whatever a hostile relay offers, all we do is connect to its own port."""
    a, b = await swarm_of(stack, 2)
    end = End(b)
    await end.start(stack)
    relay = await a.mesh.peer(b.id)
    for n in range(100):  # it dialled us, and is known by no address
        relay.post(RelayOffer(circuit=bytes([n] * 16), key=bytes(32), origin=Node().id))
    await relay.ping(timeout_s=5)
    assert end.arrivals.empty()
    end.addresses[a.id] = a.mesh.addresses
    relay.post(RelayOffer(circuit=bytes(16), key=bytes(32), origin=Node().id))
    connection, _ = await end.arrivals.get()
    assert connection.getpeername()[1] == int(a.mesh.addresses[0].rpartition(":")[2])
    with suppress(ConnectionResetError):
        assert await asyncio.get_running_loop().sock_recv(connection, 1) == b""
    connection.close()


async def test_a_relay_that_is_gone_is_told_apart_from_one_without_a_port(
    stack: AsyncExitStack,
) -> None:
    a, b = await swarm_of(stack, 2)
    serve_relay(a, stack)
    end = End(b)
    await end.start(stack)
    await a.mesh.peer(b.id)
    await b.ups.get()
    relay = b.mesh.peers[a.id]  # it dialled us
    with pytest.raises(RefusedByPeer, match="no link"):
        await end.client.open(Node().id, relay, deadline_s=5)
    third = Node()
    assert b.swarm is not None
    await stack.enter_async_context(third.make(b.swarm))
    a.mesh.learn(third.id, third.mesh.addresses)
    await a.mesh.peer(third.id)
    with pytest.raises(PeerUnreachable, match="no address"):
        await end.client.open(third.id, relay, deadline_s=5)
    relay.abort(LinkBroken("the test says so"))
    with pytest.raises(LinkBroken):
        await end.client.open(third.id, relay, deadline_s=5)


# --- sharing -----------------------------------------------------------------------------------


async def pour(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    with suppress(OSError):
        while True:
            await loop.sock_sendall(connection, bytes(256 << 10))


async def drain(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    with suppress(OSError):
        while await loop.sock_recv(connection, 256 << 10):
            pass


async def test_greedy_circuits_leave_room_for_a_modest_one(stack: AsyncExitStack) -> None:
    trio = await trio_of(stack, limits=RelayLimits(bytes_per_s=4e6, bytes_per_s_per_peer=4e6))
    loop = asyncio.get_running_loop()
    greedy = [await trio.socket_pair() for _ in range(4)]
    at_a, at_b = await trio.socket_pair()
    tasks = [
        asyncio.create_task(work) for one, other in greedy for work in (pour(one), drain(other))
    ]
    started_at, started_bytes = loop.time(), trio.server.nbytes
    times: list[float] = []
    while loop.time() < started_at + 0.8:
        sent_at = loop.time()
        await loop.sock_sendall(at_a, bytes(1000))
        got = 0
        while got < 1000:
            got += len(await loop.sock_recv(at_b, 1000 - got))
        times.append(loop.time() - sent_at)
    rate = (trio.server.nbytes - started_bytes) / (loop.time() - started_at)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for connection in (at_a, at_b, *(one for pair in greedy for one in pair)):
        connection.close()
    assert rate < 5e6
    # Its turn comes after one quantum of 20 KB from each of the four: 20 ms at 4 MB/s.
    assert sorted(times)[len(times) // 2] < 0.1


async def test_a_member_that_pays_its_limit_does_not_slow_another(stack: AsyncExitStack) -> None:
    limits = RelayLimits(bytes_per_s=1e9, bytes_per_s_per_peer=1e6)
    trio = await trio_of(stack, limits=limits)
    other_way = Trio(trio.b, trio.a, trio.relay, trio.server)  # b pays
    loop = asyncio.get_running_loop()
    greedy, modest = await trio.socket_pair(), await other_way.socket_pair()
    tasks = [asyncio.create_task(pour(greedy[0])), asyncio.create_task(drain(greedy[1]))]
    times: list[float] = []
    for _ in range(50):
        sent_at = loop.time()
        await loop.sock_sendall(modest[0], bytes(1000))
        await loop.sock_recv(modest[1], 1000)
        times.append(loop.time() - sent_at)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for connection in (*greedy, *modest):
        connection.close()
    assert sorted(times)[25] < 0.02  # the greedy one's quanta come 128 ms apart


async def test_a_slow_reader_slows_its_sender_and_nobody_else(stack: AsyncExitStack) -> None:
    trio = await trio_of(stack)
    loop = asyncio.get_running_loop()
    stuck, other = await trio.socket_pair(), await trio.socket_pair()
    n_sent = 0

    async def pour_counted() -> None:
        nonlocal n_sent
        while True:
            await loop.sock_sendall(stuck[0], bytes(64 << 10))
            n_sent += 64 << 10

    with suppress(TimeoutError):
        await asyncio.wait_for(pour_counted(), 0.5)
    # Nobody reads at b: what was taken is in the buffers of the four sockets.
    assert n_sent < 8 * MIB
    sent_at = loop.time()
    await loop.sock_sendall(other[0], b"quick")
    assert await loop.sock_recv(other[1], 5) == b"quick"
    assert loop.time() - sent_at < 0.2
    got = 0
    while got < n_sent:
        got += len(await loop.sock_recv(stuck[1], MIB))
    for connection in (*stuck, *other):
        connection.close()


# --- keeping two warm --------------------------------------------------------------------------


async def test_two_relays_are_kept_and_one_that_leaves_is_replaced(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "PERIOD_S", 0.05)
    node, *others = await swarm_of(stack, 4)
    holder = RelayHolder(node.id, node.mesh.peer)
    running = asyncio.create_task(holder.run())
    holder.see({other.id: None for other in others} | {node.id: None})
    holder.need(is_needed=True)
    await until(lambda: len(holder.relays) == 2)
    assert all(rtt_s > 0 for rtt_s in holder.relays.values())
    gone = next(other for other in others if other.id in holder.relays)
    await gone.mesh.aclose()
    remaining = {other.id for other in others} - {gone.id}
    await until(lambda: holder.relays.keys() == remaining)
    holder.need(is_needed=False)
    await until(lambda: not holder.relays)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_kept_link_outlives_the_time_that_unused_ones_have(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At both ends: pings in quick succession tell the relay that its link is needed."""
    monkeypatch.setattr(keeper, "PERIOD_S", 0.08)  # against 0.2 s, as 8 against 20
    rules = LivenessRules(idle_ping_s=0.2, idle_silence_s=5.0, unused_s=0.6)
    a, b, c = await swarm_of(stack, 3, rules=rules)
    holder = RelayHolder(a.id, a.mesh.peer)
    running = asyncio.create_task(holder.run())
    holder.see({b.id: None})
    holder.need(is_needed=True)
    await (await c.mesh.peer(b.id)).ping(timeout_s=5)
    await c.downs.get()  # nobody needs that one
    await asyncio.sleep(0.6)
    assert a.downs.empty()
    assert a.ups.qsize() == 1
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await a.downs.get()
