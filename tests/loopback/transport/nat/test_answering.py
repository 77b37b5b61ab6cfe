"""What a member does for others, and what it refuses: never another host, never without bound."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from covey.transport.errors import ErrorCode, RefusedByPeer
from covey.transport.identity import Identity
from covey.transport.memory import memory_link_pair
from covey.transport.messages import (
    AnyMessage,
    DialBack,
    DialledBack,
    Message,
    ProbeSent,
    SendProbe,
    View,
    ViewRequest,
)
from covey.transport.nat.answering import EACH_DIAL, EACH_PROBE, EACH_VIEW, Answering, Ports
from covey.transport.nat.facts import Endpoint
from covey.transport.nat.observation import ObservationDoor, ObserveKeys
from covey.transport.nat.responder import UdpPort
from covey.transport.nat.stun import read_probe
from covey.transport.peer import Handler, Peer
from support.meshes import Node, swarm_of

pytestmark = pytest.mark.network

NONCE = b"n" * 12


@asynccontextmanager
async def asker_and_member() -> AsyncIterator[tuple[Node, Peer, Node]]:
    """A node, its link to a member that answers, and that member."""
    async with AsyncExitStack() as stack:
        asker, member = await swarm_of(stack, 2)
        swarm = member.swarm
        assert swarm is not None
        keys = ObserveKeys.of(swarm)
        for node in (asker, member):
            door = ObservationDoor(keys)
            node.mesh.add_door(door)
            stack.push_async_callback(door.aclose)
        answering = Answering(
            member.mesh.serve,
            lambda: keys,
            lambda: swarm.stun_key,
            lambda: frozenset({"127.0.0.1"}),
        )
        stack.push_async_callback(answering.aclose)
        other = await UdpPort.bind("127.0.0.1", 0, lambda packet, source: None)
        stack.push_async_callback(other.aclose)
        answering.probe_ports[4] = other
        answering.ports = Ports(listening=1, udp=2, other_udp=other.local[1], other_tcp=4)
        yield asker, await asker.mesh.peer(member.id), member


def asker_key(asker: Node) -> bytes:
    assert asker.swarm is not None
    return asker.swarm.stun_key


async def ask(peer: Peer, message: AnyMessage) -> Message:
    return (await peer.request(message, timeout_s=5)).message


async def test_a_view_is_what_the_link_shows() -> None:
    async with asker_and_member() as (_, peer, _):
        view = await ask(peer, ViewRequest(host="127.0.0.1"))
        assert isinstance(view, View)
        assert (view.host, view.udp_port, view.is_own_host) == ("127.0.0.1", 2, True)
        elsewhere = await ask(peer, ViewRequest(host="11.0.0.1"))
        assert isinstance(elsewhere, View)
        assert not elsewhere.is_own_host


async def test_a_listening_port_is_dialled_back_and_proves_itself() -> None:
    async with asker_and_member() as (asker, peer, _):
        port = asker.mesh.bound[0][1]
        answer = await ask(peer, DialBack(port=port))
        assert answer == DialledBack(outcome="answered", host="127.0.0.1")


async def test_another_program_on_the_port_is_not_our_listener() -> None:
    async with asker_and_member() as (_, peer, _):
        server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        wrong = await ask(peer, DialBack(port=port))
        assert wrong == DialledBack(outcome="wrong", host="127.0.0.1")
        server.close()
        await server.wait_closed()
        refused = await ask(peer, DialBack(port=port))
        assert refused == DialledBack(outcome="refused", host="127.0.0.1")


async def test_a_dial_back_to_any_port_sends_one_sealed_packet() -> None:
    async with asker_and_member() as (asker, peer, _):
        received: asyncio.Queue[bytes] = asyncio.Queue()

        async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            received.put_nowait(await reader.read())
            writer.close()

        server = await asyncio.start_server(read, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        answer = await ask(peer, DialBack(port=port, nonce=NONCE))
        assert answer == DialledBack(outcome="answered", host="127.0.0.1")
        assert read_probe(await received.get(), asker_key(asker)) == NONCE
        server.close()
        await server.wait_closed()


async def test_a_flood_of_dial_backs_opens_a_bounded_number_of_connections() -> None:
    async with asker_and_member() as (_, peer, _):
        n_accepted = 0

        def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal n_accepted
            n_accepted += 1
            writer.close()

        server = await asyncio.start_server(count, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        message = DialBack(port=port, nonce=NONCE)
        answers = await asyncio.gather(*(ask(peer, message) for _ in range(200)))
        assert DialledBack(outcome="declined", host="127.0.0.1") in answers
        assert 0 < n_accepted <= EACH_DIAL.burst
        server.close()
        await server.wait_closed()


async def test_a_probe_is_one_small_packet_from_the_other_port() -> None:
    async with asker_and_member() as (asker, peer, _):
        packets: asyncio.Queue[tuple[bytes, Endpoint]] = asyncio.Queue()
        port = await UdpPort.bind(
            "127.0.0.1", 0, lambda packet, source: packets.put_nowait((packet, source))
        )
        message = SendProbe(port=port.local[1], nonce=NONCE)
        answers = await asyncio.gather(*(ask(peer, message) for _ in range(100)))
        assert answers.count(ProbeSent(is_sent=True)) == EACH_PROBE.burst
        packet, _ = await packets.get()
        assert len(packet) <= 64
        assert read_probe(packet, asker_key(asker)) == NONCE
        assert packets.qsize() < EACH_PROBE.burst
        await port.aclose()


async def test_a_flood_of_questions_is_refused_after_a_while() -> None:
    async with asker_and_member() as (_, peer, _):
        questions = (ask(peer, ViewRequest(host="127.0.0.1")) for _ in range(200))
        answers = await asyncio.gather(*questions, return_exceptions=True)
        refusals = [answer for answer in answers if isinstance(answer, RefusedByPeer)]
        assert len(answers) - len(refusals) <= EACH_VIEW.burst + 1
        assert {refusal.code for refusal in refusals} == {ErrorCode.NOT_READY}


@pytest.mark.parametrize(
    "message",
    [
        DialBack(port=1),
        ViewRequest(host="11.0.0.1"),
        SendProbe(port=1, nonce=NONCE),
    ],
)
async def test_nothing_goes_to_a_peer_whose_link_shows_no_address(message: AnyMessage) -> None:
    # Relayed: the far end's address would be the relay's, and that is nobody's to aim at.
    services: dict[type[Message], Handler] = {}
    keys = ObserveKeys(os.urandom(16), os.urandom(32))
    answering = Answering(services.__setitem__, lambda: keys, lambda: b"", frozenset)
    other = await UdpPort.bind("127.0.0.1", 0, lambda packet, source: None)
    answering.probe_ports[4] = other
    a, b = memory_link_pair(Identity.generate().peer_id, Identity.generate().peer_id)
    asking = Peer(a, lambda peer, frame: None)
    member = Peer(b, lambda peer, frame: services[type(frame.message)](peer, frame))
    running = [asyncio.create_task(peer.run()) for peer in (asking, member)]
    (answer,) = await asyncio.gather(ask(asking, message), return_exceptions=True)
    if isinstance(answer, RefusedByPeer):
        assert answer.code is ErrorCode.NOT_READY
    else:
        assert answer == ProbeSent(is_sent=False)
    await asking.aclose()
    await asyncio.gather(*running)
    await other.aclose()
    await answering.aclose()
