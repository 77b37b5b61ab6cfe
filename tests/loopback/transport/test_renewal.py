"""What an earlier epoch's secret opens: one request, for thirty days, and nothing else."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from covey.transport.errors import ErrorCode, PeerUnreachable, RefusedByPeer
from covey.transport.frame import Frame
from covey.transport.handshake import Credentials, dial
from covey.transport.identity import Identity
from covey.transport.link import Link, LinkKind
from covey.transport.membership import HONOURED_S, Keyring
from covey.transport.messages import Failure, SecretAnswer, SecretRequest
from covey.transport.paths import direct_ways, open_path
from covey.transport.renewal import RenewalDoor, renew
from covey.transport.tls import build_contexts
from support.meshes import Node, beat, open_session, swarm_of

pytestmark = pytest.mark.network

ANSWER = SecretAnswer(statements=[b"signed"], copy=b"c" * 80)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


class Host:
    """A member that goes on to the next epoch and answers those that were away."""

    def __init__(self, node: Node) -> None:
        assert node.swarm is not None
        self.node = node
        self.now = time.time()
        self.asked: list[str] = []
        self.refused: set[str] = set()
        self.ring = Keyring(current=node.swarm)
        self.door = RenewalDoor(node.identity, self.ring, self.answer, unix_time=lambda: self.now)
        node.mesh.add_door(self.door)

    def rotate(self) -> None:
        swarm = self.ring.current.next_epoch()
        self.ring = self.ring.adopt(swarm, by=None, unix_time=self.now)
        self.door.use(self.ring)
        self.node.mesh.use_swarm(swarm)

    def answer(self, peer_id: str) -> SecretAnswer | Failure:
        self.asked.append(peer_id)
        return Failure(code=ErrorCode.NOT_A_MEMBER) if peer_id in self.refused else ANSWER


async def test_links_that_stand_stand_and_new_ones_are_told_to_ask(stack: AsyncExitStack) -> None:
    a, b, c = await swarm_of(stack, 3)
    host = Host(a)
    standing = await b.mesh.peer(a.id)
    host.rotate()
    await standing.send(beat("still here"))
    assert (await a.frames.get())[1].message == beat("still here")
    with pytest.raises(RefusedByPeer) as caught:
        await c.mesh.peer(a.id)
    assert caught.value.code is ErrorCode.EPOCH_OVER
    assert c.id not in a.mesh.peers


async def test_who_was_away_asks_and_is_answered(stack: AsyncExitStack) -> None:
    a, b = await swarm_of(stack, 2)
    host = Host(a)
    old = host.ring.current
    for _ in range(3):  # it may have missed some
        host.rotate()
    assert await renew(b.identity, old, a.id, a.mesh.addresses) == ANSWER
    assert host.asked == [b.id]


async def test_who_is_refused_is_told(stack: AsyncExitStack) -> None:
    a, b = await swarm_of(stack, 2)
    host = Host(a)
    old = host.ring.current
    host.rotate()
    host.refused.add(b.id)
    with pytest.raises(RefusedByPeer) as caught:
        await renew(b.identity, old, a.id, a.mesh.addresses)
    assert caught.value.code is ErrorCode.NOT_A_MEMBER


@pytest.mark.parametrize("message", [beat("x"), open_session(Identity.generate().peer_id)])
async def test_nothing_else_is_heard_on_such_a_link(stack: AsyncExitStack, message: object) -> None:
    a, b = await swarm_of(stack, 2)
    host = Host(a)
    link = await opened(host, b)
    await link.send(Frame(message=message, request=1))  # type: ignore[arg-type]
    assert (await link.receive()).message == Failure(code=ErrorCode.UNKNOWN_MESSAGE)
    await link.aclose()
    assert a.frames.empty()
    assert not host.asked


async def test_one_request_is_all(stack: AsyncExitStack) -> None:
    a, b = await swarm_of(stack, 2)
    host = Host(a)
    link = await opened(host, b)
    for number in (1, 2):
        await link.send(Frame(message=SecretRequest(), request=number))
    assert (await link.receive()).message == ANSWER
    await link.aclose()
    assert host.asked == [b.id]


async def test_after_thirty_days_it_opens_nothing(stack: AsyncExitStack) -> None:
    a, b = await swarm_of(stack, 2)
    host = Host(a)
    old = host.ring.current
    host.rotate()
    host.now += HONOURED_S + 1
    with pytest.raises(PeerUnreachable, match="hung up"):
        await renew(b.identity, old, a.id, a.mesh.addresses)
    with pytest.raises(PeerUnreachable, match="hung up"):
        await b.mesh.peer(a.id)


async def test_the_key_of_the_present_epoch_asks_for_nothing(stack: AsyncExitStack) -> None:
    a, b = await swarm_of(stack, 2)
    host = Host(a)
    with pytest.raises(PeerUnreachable, match="hung up"):
        await renew(b.identity, host.ring.current, a.id, a.mesh.addresses)


async def opened(host: Host, asker: Node) -> Link:
    """A bare link by the earlier secret, whose owner may misbehave."""
    old = host.ring.current
    host.rotate()
    contexts = build_contexts(old.authority_seed, asker.identity)
    credentials = Credentials(old.renewal_key_id, old.renewal_key, contexts)

    async def secure(connection: socket.socket, kind: LinkKind) -> Link:
        link, _ = await dial(
            connection,
            credentials,
            peer_id=host.node.id,
            is_allowed=lambda _: True,
            kind=kind,
        )
        return link

    ways = direct_ways(host.node.mesh.addresses)
    return await open_path(host.node.id, ways, (), secure, deadline_s=5.0)
