"""Meshes on 127.0.0.1, on both event loops."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress

import pytest

from covey.transport import reception, stream_link
from covey.transport.errors import (
    AddressInUse,
    ErrorCode,
    InviteInvalid,
    LinkBroken,
    LinkClosed,
    NotAMember,
    PeerLeft,
    PeerUnreachable,
    RefusedByPeer,
)
from covey.transport.frame import Tensor
from covey.transport.handshake import Credentials, dial
from covey.transport.identity import Identity
from covey.transport.invite import Invite
from covey.transport.joining import redeem
from covey.transport.liveness import LivenessRules
from covey.transport.membership import Swarm
from covey.transport.memory import memory_link_pair
from covey.transport.messages import Beat, Forward, Hello, SessionOpened
from covey.transport.preamble import NONCE_BYTES, PREAMBLE_BYTES, build_preamble
from covey.transport.steady.link import SteadyLink
from support import mesh_process
from support.meshes import Node, beat, open_session, swarm_of

pytestmark = pytest.mark.network


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def test_two_meshes_exchange_requests_and_frames(stack: AsyncExitStack) -> None:
    a, b = await swarm_of(stack, 2)
    peer = await a.mesh.peer(b.id)
    answer = await peer.request(open_session(a.id), timeout_s=2)
    assert answer.message == SessionOpened(session="s")
    data = os.urandom(3 << 20)
    message = Forward(session="s", epoch=0, stage_idx=0, step=1, position=0, n_return=1)
    await peer.send(message, {"hidden": Tensor("u8", (3 << 20,), data)})
    await b.frames.get()
    sender, frame = await b.frames.get()
    assert (sender, frame.message) == (a.id, message)
    assert frame.tensors["hidden"].data == data
    assert await a.ups.get() == b.id
    assert await b.ups.get() == a.id


async def test_three_meshes_reach_each_other_once(stack: AsyncExitStack) -> None:
    nodes = await swarm_of(stack, 3)
    for node in nodes:
        for other in nodes:
            if node is not other:
                await (await node.mesh.peer(other.id)).send(beat(node.id))
    for node in nodes:
        senders = {(await node.frames.get())[0] for _ in range(2)}
        assert senders == {other.id for other in nodes} - {node.id}
        assert len(node.mesh.peers) == 2
        assert node.downs.empty()


async def test_simultaneous_dials_give_one_link_and_lose_nothing(stack: AsyncExitStack) -> None:
    for _ in range(5):
        a, b = await swarm_of(stack, 2)
        to_b, to_a = await asyncio.gather(a.mesh.peer(b.id), b.mesh.peer(a.id))
        await asyncio.gather(to_b.send(beat("from a")), to_a.send(beat("from b")))
        assert (await a.frames.get())[1].message == beat("from b")
        assert (await b.frames.get())[1].message == beat("from a")
        assert await to_b.ping(timeout_s=2) > 0
        assert a.ups.qsize() == b.ups.qsize() == 1
        assert a.downs.empty()
        assert b.downs.empty()


async def test_a_dial_that_gets_nowhere_does_not_keep_the_peer_out(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception, "HOLD_BACK_S", 0.2)
    a, b = await swarm_of(stack, 2)
    with socket.create_server(("127.0.0.1", 0)) as black_hole:
        a.mesh.learn(b.id, [f"127.0.0.1:{black_hole.getsockname()[1]}"])
        dialling = asyncio.create_task(a.mesh.peer(b.id))
        connection = await asyncio.to_thread(black_hole.accept)
        to_a = await b.mesh.peer(a.id)
        await (await dialling).send(beat("from a"))
        await to_a.send(beat("from b"))
        assert (await a.frames.get())[1].message == beat("from b")
        assert (await b.frames.get())[1].message == beat("from a")
        assert a.downs.empty()
        connection[0].close()


async def test_a_peer_whose_link_just_broke_can_be_dialled_at_once(stack: AsyncExitStack) -> None:
    a, b = await swarm_of(stack, 2)
    old = await a.mesh.peer(b.id)
    old.abort(LinkBroken("the test says so"))
    assert not a.mesh.peers
    new = await a.mesh.peer(b.id)
    assert new is not old
    await new.send(beat("again"))
    assert (await b.frames.get())[1].message == beat("again")


async def test_callers_at_once_share_one_dial(stack: AsyncExitStack) -> None:
    a, b = await swarm_of(stack, 2)
    peers = await asyncio.gather(*(a.mesh.peer(b.id) for _ in range(5)))
    assert len({id(peer) for peer in peers}) == 1


async def test_a_link_that_comes_up_when_a_mesh_has_closed_ends_at_once(
    stack: AsyncExitStack,
) -> None:
    (a,) = await swarm_of(stack, 1)
    near, far = memory_link_pair("a", "b")
    await a.mesh.aclose()
    a.mesh.take_up(SteadyLink(near, bytes(16)), a.mesh.contact(near.peer_id))
    with pytest.raises(LinkBroken):
        await far.receive()
    assert not a.mesh.peers


async def test_another_secret_is_refused_in_silence(stack: AsyncExitStack) -> None:
    a, b = Node(), Node()
    await stack.enter_async_context(a.make(Swarm.create(a.id)))
    await stack.enter_async_context(b.make(Swarm.create(b.id)))
    a.mesh.learn(b.id, b.mesh.addresses)
    with pytest.raises(PeerUnreachable, match="hung up"):
        await a.mesh.peer(b.id)
    assert b.ups.empty()


async def test_the_expected_peer_id_is_part_of_the_proof(stack: AsyncExitStack) -> None:
    a, b, c = await swarm_of(stack, 3)
    a.mesh.learn(b.id, c.mesh.addresses)
    with pytest.raises(PeerUnreachable, match="hung up"):
        await a.mesh.peer(b.id)


async def test_nobody_listens(stack: AsyncExitStack) -> None:
    (a,) = await swarm_of(stack, 1)
    stranger = Identity.generate().peer_id
    with pytest.raises(PeerUnreachable, match="no address"):
        await a.mesh.peer(stranger)
    a.mesh.learn(stranger, [free_address(), "nonsense"])
    with pytest.raises(PeerUnreachable, match="refused the connection; nonsense is not an address"):
        await a.mesh.peer(stranger)


@pytest.mark.parametrize(
    "hello",
    [b"", b"GET / HTTP/1.1\r\nHost: somebody\r\n\r\n" + bytes(100), bytes(PREAMBLE_BYTES)],
    ids=["nothing", "http", "zeros"],
)
async def test_a_stranger_reads_not_one_byte(stack: AsyncExitStack, hello: bytes) -> None:
    (a,) = await swarm_of(stack, 1)
    assert await bytes_read_after(a, hello, end=True) == b""


async def test_a_replayed_preamble_reads_not_one_byte(stack: AsyncExitStack) -> None:
    (a,) = await swarm_of(stack, 1)
    preamble = good_preamble(a)
    recorded = preamble + client_hello()
    assert await bytes_read_after(a, recorded, at_most=1) == b"\x16"  # a TLS handshake record
    assert await bytes_read_after(a, recorded) == b""


async def test_a_revoked_member_is_told_and_kept_out(stack: AsyncExitStack) -> None:
    a, b = await swarm_of(stack, 2)
    b.revoked.add(a.id)
    with pytest.raises(RefusedByPeer) as caught:
        await a.mesh.peer(b.id)
    assert caught.value.code is ErrorCode.NOT_A_MEMBER
    with pytest.raises(NotAMember):
        await b.mesh.peer(a.id)


async def test_drop_cuts_a_peer_off(stack: AsyncExitStack) -> None:
    a, b = await swarm_of(stack, 2)
    await a.mesh.peer(b.id)
    await b.ups.get()
    b.revoked.add(a.id)
    b.mesh.drop(a.id)
    assert (await a.downs.get())[0] == b.id
    assert not b.mesh.peers or await b.downs.get()
    assert not b.mesh.peers


async def test_a_port_in_use_is_named(stack: AsyncExitStack) -> None:
    (a,) = await swarm_of(stack, 1)
    host, _, port = a.mesh.addresses[0].rpartition(":")
    with pytest.raises(AddressInUse, match="choose another"):
        async with Node().make(Swarm.create(a.id), listen=((host, int(port)),)):
            pass


async def test_ipv6_and_wildcard_addresses_can_be_dialled(stack: AsyncExitStack) -> None:
    a, b = sorted((Node(), Node()), key=lambda node: node.id)
    swarm = Swarm.create(a.id)
    await stack.enter_async_context(a.make(swarm, listen=(("0.0.0.0", 0),)))  # noqa: S104
    await stack.enter_async_context(b.make(swarm, listen=(("::1", 0),)))
    assert not [address for address in a.mesh.addresses if address.startswith(("127.", "0.0."))]
    assert b.mesh.addresses[0].startswith("[::1]:")
    a.mesh.learn(b.id, [free_address(), *b.mesh.addresses])
    assert (await a.mesh.peer(b.id)).peer_id == b.id


async def test_goodbye_is_told_from_a_failure(stack: AsyncExitStack) -> None:
    a, b = await swarm_of(stack, 2)
    waiting = await a.mesh.peer(b.id)
    await b.mesh.aclose()
    peer_id, error = await a.downs.get()
    assert peer_id == b.id
    assert isinstance(error, PeerLeft)
    with pytest.raises(LinkClosed):
        await waiting.send(beat("too late"))
    assert not a.mesh.peers


async def test_a_request_fails_at_once_when_the_link_breaks(stack: AsyncExitStack) -> None:
    a, b = await swarm_of(stack, 2)
    peer = await a.mesh.peer(b.id)
    request = asyncio.create_task(peer.request(beat("no answer to this"), timeout_s=30))
    await b.frames.get()
    b.mesh.drop(a.id)
    with pytest.raises(LinkBroken):
        await request


async def test_a_link_nobody_uses_is_closed_cleanly(stack: AsyncExitStack) -> None:
    a, b = await swarm_of(stack, 2, rules=LivenessRules(unused_s=0.2))
    await a.mesh.peer(b.id)
    errors = [(await node.downs.get())[1] for node in (a, b)]
    assert [type(error) for error in errors] == [LinkClosed, LinkClosed]
    await (await a.mesh.peer(b.id)).send(beat("again"))
    assert (await b.frames.get())[1].message == beat("again")


async def test_a_held_link_is_kept_and_measured(stack: AsyncExitStack) -> None:
    rules = LivenessRules(unused_s=0.3, busy_ping_s=0.05, idle_ping_s=20)
    a, b = await swarm_of(stack, 2, rules=rules)
    peer = await a.mesh.peer(b.id)
    peer.hold()
    rtt_s, bytes_per_s = await peer.measure()
    assert 0 < rtt_s < 0.5
    assert bytes_per_s > 1e6
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.8):
            await b.downs.get()
    assert peer.rtt_s is not None
    peer.release()
    assert isinstance((await b.downs.get())[1], LinkClosed)


async def test_garbage_after_the_handshake_costs_only_its_link(stack: AsyncExitStack) -> None:
    (a,) = await swarm_of(stack, 1)
    vandal = Identity.generate()
    link = await dial_as(vandal, a)
    assert await a.ups.get() == vandal.peer_id
    transport = link._transport
    assert transport is not None
    transport.write(b"\xff" * 64)
    failure = await link.receive()
    assert failure.message.code is ErrorCode.MALFORMED_FRAME  # type: ignore[union-attr]
    with pytest.raises(LinkClosed):
        await link.receive()
    assert await a.downs.get()
    again = await dial_as(vandal, a)
    await again.aclose()


async def test_a_peer_that_dials_anew_replaces_its_dead_link(stack: AsyncExitStack) -> None:
    (a,) = await swarm_of(stack, 1)
    restarted = Identity.generate()
    silent = await dial_as(restarted, a)  # nobody reads it: no Pong will come
    assert await a.ups.get() == restarted.peer_id
    fresh = await dial_as(restarted, a)
    peer_id, error = await a.downs.get()
    assert (peer_id, type(error)) == (restarted.peer_id, LinkBroken)
    assert await a.ups.get() == restarted.peer_id
    await a.mesh.peers[restarted.peer_id].send(beat("welcome back"))
    assert (await fresh.receive()).message == beat("welcome back")
    for link in (silent, fresh):
        link.abort(LinkBroken("the test is over"))


async def test_a_killed_peer_is_seen_at_once(stack: AsyncExitStack) -> None:
    (a,) = await swarm_of(stack, 1)
    other, process = await start_process(stack, a)
    (await a.mesh.peer(other.peer_id)).hold()
    process.kill()
    killed_at = time.monotonic()
    peer_id, error = await a.downs.get()
    assert time.monotonic() - killed_at < 0.5
    assert (peer_id, type(error)) == (other.peer_id, LinkBroken)


async def test_a_stopped_peer_is_given_up_within_five_seconds(stack: AsyncExitStack) -> None:
    (a,) = await swarm_of(stack, 1)
    other, process = await start_process(stack, a)
    peer = await a.mesh.peer(other.peer_id)
    peer.hold()
    await peer.ping(timeout_s=2)
    process.send_signal(signal.SIGSTOP)
    stopped_at = time.monotonic()
    _, error = await a.downs.get()
    assert 2.0 < time.monotonic() - stopped_at < 5.0
    assert isinstance(error, LinkBroken)
    assert "silent" in str(error)


async def test_an_invite_lets_a_machine_in_once(stack: AsyncExitStack) -> None:
    (a,) = await swarm_of(stack, 1)
    joiner, late = Identity.generate(), Identity.generate()
    invite = issue(a)
    welcome = await redeem(joiner, invite, addresses=["127.0.0.1:4000"])
    again = await redeem(joiner, invite)  # its welcome may have been lost
    assert Swarm.from_welcome(welcome) == Swarm.from_welcome(again) == a.swarm
    with pytest.raises(InviteInvalid, match="used up"):
        await redeem(late, invite)
    node = Node(identity=joiner)
    await stack.enter_async_context(node.make(Swarm.from_welcome(welcome)))
    node.mesh.learn(a.id, a.mesh.addresses)
    assert (await node.mesh.peer(a.id)).peer_id == a.id


async def test_an_expired_invite_reads_not_one_byte(stack: AsyncExitStack) -> None:
    (a,) = await swarm_of(stack, 1)
    with pytest.raises(PeerUnreachable, match="hung up"):
        await redeem(Identity.generate(), issue(a, valid_s=-1))


async def test_a_removed_machine_cannot_come_back_by_an_invite(stack: AsyncExitStack) -> None:
    (a,) = await swarm_of(stack, 1)
    removed = Identity.generate()
    a.revoked.add(removed.peer_id)
    with pytest.raises(InviteInvalid, match="does not let"):
        await redeem(removed, issue(a))


async def test_a_failing_handler_costs_only_its_link(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a, b, c = await swarm_of(stack, 3)

    def broken(peer: object, frame: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(b.mesh, "_handler", broken)
    await (await a.mesh.peer(b.id)).send(beat("boom"))
    assert (await b.downs.get())[0] == a.id
    assert (await c.mesh.peer(b.id)).peer_id == b.id
    assert "task link failed" in caplog.messages


async def test_more_is_queued_than_either_side_buffers(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_link, "SEND_BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(stream_link, "RECEIVE_BUFFER_BYTES", 1 << 20)
    a, b = await swarm_of(stack, 2)
    peer = await a.mesh.peer(b.id)
    ballast = {"x": Tensor("u8", (1 << 20,), bytes(1 << 20))}
    await asyncio.gather(*(peer.send(Beat(body=bytes([i])), ballast) for i in range(24)))
    received = [(await b.frames.get())[1].message for _ in range(24)]
    assert received == [Beat(body=bytes([i])) for i in range(24)]


# --- helpers -----------------------------------------------------------------------------------


def issue(node: Node, *, valid_s: float = 60) -> Invite:
    assert node.swarm is not None
    return node.invites.issue(
        swarm=node.swarm.id,
        inviter=node.id,
        addresses=node.mesh.addresses,
        valid_s=valid_s,
        uses=1,
        unix_time=time.time(),
    )


async def start_process(
    stack: AsyncExitStack, node: Node
) -> tuple[Identity, asyncio.subprocess.Process]:
    """A member in a process of its own, known to the node."""
    assert node.swarm is not None
    identity = Identity.generate()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        mesh_process.__file__,
        identity.seed.hex(),
        json.dumps(node.swarm.to_dict()),
        stdout=asyncio.subprocess.PIPE,
    )

    async def kill() -> None:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()

    stack.push_async_callback(kill)
    assert process.stdout is not None
    address = (await process.stdout.readline()).decode().strip()
    node.mesh.learn(identity.peer_id, [address])
    return identity, process


async def dial_as(identity: Identity, node: Node) -> stream_link.StreamLink:
    """A bare link to the node, whose owner may misbehave."""
    assert node.swarm is not None
    connection = await connected(node)
    link, _ = await dial(
        connection,
        Credentials.of_swarm(node.swarm, identity),
        peer_id=node.id,
        is_allowed=lambda _: True,
        hello=Hello(link=os.urandom(16), is_new=True),
    )
    return link


async def connected(node: Node) -> socket.socket:
    host, _, port = node.mesh.addresses[0].rpartition(":")
    connection = socket.socket()
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
    return connection


def good_preamble(node: Node) -> bytes:
    assert node.swarm is not None
    return build_preamble(
        key_id=node.swarm.key_id,
        key=node.swarm.preamble_key,
        expected_peer_id=node.id,
        nonce=os.urandom(NONCE_BYTES),
        unix_time=time.time(),
    )


def client_hello() -> bytes:
    """What a TLS client says first."""
    outgoing = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


async def bytes_read_after(
    node: Node, hello: bytes, *, end: bool = False, at_most: int = 1 << 20
) -> bytes:
    """What the node says to someone who says `hello`."""
    loop = asyncio.get_running_loop()
    with await connected(node) as connection:
        await loop.sock_sendall(connection, hello)
        if end:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        try:
            while len(received) < at_most:
                more = await loop.sock_recv(connection, at_most - len(received))
                if not more:
                    break
                received += more
        except ConnectionResetError:
            pass  # it hung up with our bytes unread
        return received


def free_address() -> str:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"
