"""What a member may make another do in the name of a better way; meshes on 127.0.0.1."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from covey.transport.errors import ErrorCode, MalformedFrame, PeerUnreachable, RefusedByPeer
from covey.transport.link import LinkKind
from covey.transport.messages import (
    HostAnswer,
    HostRequest,
    NatCard,
    PathAnswer,
    PathOffer,
    PathReady,
    PathText,
    PathTry,
)
from covey.transport.nat.facts import NatFacts
from covey.transport.peer import Peer
from covey.transport.punch.attempts import Attempt, AttemptKind
from covey.transport.reach import Reach
from covey.transport.upgrade.ways import MAX_TRIES, Leader, confirmed_host
from support.meshes import Node, swarm_of

pytestmark = pytest.mark.network

VICTIM = "192.0.2.7"


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def swarm(stack: AsyncExitStack, n: int) -> tuple[list[Node], list[Reach]]:
    nodes = await swarm_of(stack, n)
    reaches = []
    for node in nodes:
        assert node.swarm is not None
        reach = Reach(node.mesh, node.swarm, maps_ports=False, is_outside=lambda _: True)
        reaches.append(await stack.enter_async_context(reach))
    return nodes, reaches


def facts(*hosts: str) -> NatFacts:
    return NatFacts(port=4000, public_hosts=hosts, measured_at=0.0)


def card(*hosts: str) -> NatCard:
    return facts(*hosts).to_card(now=0.0)


async def ask(peer: Peer, attempt: str, *addresses: str) -> PathReady:
    wanted = PathTry(attempt=attempt, addresses=list(addresses))  # type: ignore[arg-type]
    answer = await peer.request(wanted, timeout_s=5)
    assert isinstance(answer.message, PathReady)
    return answer.message


async def test_a_member_has_only_so_many_attempts_begun(stack: AsyncExitStack) -> None:
    (a, b), _ = await swarm(stack, 2)
    peer = await a.mesh.peer(b.id)
    for _ in range(MAX_TRIES):
        with pytest.raises(RefusedByPeer) as caught:
            await ask(peer, "birthday_hard")  # without an address it fails at once
        assert caught.value.code is ErrorCode.NOT_READY
    with pytest.raises(RefusedByPeer):
        await ask(peer, "dial", a.mesh.addresses[0])  # by now not even what makes sense


@pytest.mark.parametrize("address", ["x:1", "0.0.0.0:80", "224.0.0.1:80", "127.0.0.1:0"])
@pytest.mark.parametrize("attempt", ["punch", "birthday_hard"])
async def test_an_address_that_is_none_is_refused(
    stack: AsyncExitStack, attempt: str, address: str
) -> None:
    (a, b), _ = await swarm(stack, 2)
    peer = await a.mesh.peer(b.id)
    with pytest.raises(RefusedByPeer):
        await ask(peer, attempt, address)
    assert (await peer.ping(timeout_s=2)) > 0  # it costs nothing but the attempt


async def test_a_birthday_needs_facts_and_a_host_that_a_relay_confirms(
    stack: AsyncExitStack,
) -> None:
    (a, b, relay), _ = await swarm(stack, 3)
    peer = await a.mesh.peer(b.id)
    for node, other in ((a, b), (b, a)):
        await node.mesh.peer(relay.id)
        node.mesh.learn(other.id, (), relays=(relay.id,))
    with pytest.raises(RefusedByPeer):
        await ask(peer, "birthday_easy")  # it does not know our host
    answer = await peer.request(PathOffer(nat=card(VICTIM)), timeout_s=5)
    assert isinstance(answer.message, PathAnswer)
    with pytest.raises(RefusedByPeer):
        await ask(peer, "birthday_easy")  # and will not take our word for somebody else's


async def test_only_a_host_that_relay_and_peer_agree_on_is_confirmed(
    stack: AsyncExitStack,
) -> None:
    (a, b, relay), _ = await swarm(stack, 3)
    peer = await a.mesh.peer(b.id)
    await a.mesh.peer(relay.id)
    await b.mesh.peer(relay.id)
    with pytest.raises(PeerUnreachable):
        await confirmed_host(a.mesh, peer, facts("127.0.0.1"))  # it announces no relay
    a.mesh.learn(b.id, (), relays=(relay.id,))
    assert await confirmed_host(a.mesh, peer, facts(VICTIM, "127.0.0.1")) == "127.0.0.1"
    with pytest.raises(PeerUnreachable):
        await confirmed_host(a.mesh, peer, facts(VICTIM))


async def test_a_member_is_told_where_another_is_seen_and_no_more(stack: AsyncExitStack) -> None:
    (a, b, c), _ = await swarm(stack, 3)
    peer = await a.mesh.peer(b.id)
    answer = await peer.request(HostRequest(peer=c.id), timeout_s=5)
    assert answer.message == HostAnswer(host=None)
    await c.mesh.peer(b.id)
    await b.ups.get()
    answer = await peer.request(HostRequest(peer=c.id), timeout_s=5)
    assert answer.message == HostAnswer(host="127.0.0.1")


async def test_descriptions_nobody_waits_for_are_dropped(stack: AsyncExitStack) -> None:
    (a, b), _ = await swarm(stack, 2)
    peer = await a.mesh.peer(b.id)
    for _ in range(50):
        peer.post(PathText(text="v=0 " * 4000))
    assert (await peer.ping(timeout_s=5)) > 0
    assert b.frames.empty()


async def test_a_follower_that_names_no_address_ends_only_the_attempt(
    stack: AsyncExitStack,
) -> None:
    (a, b), (reach, _) = await swarm(stack, 2)
    peer = await a.mesh.peer(b.id)
    b.mesh.serve(PathTry, lambda at_b, frame: at_b.reply(frame, PathReady(address="nowhere")))
    leader = Leader(a.mesh, reach.nat)
    attempt = Attempt(AttemptKind.BIRTHDAY_HARD, LinkKind.PUNCHED)
    with pytest.raises(MalformedFrame):
        await leader.make(peer, attempt, facts("127.0.0.1"))
    assert peer.error is None
