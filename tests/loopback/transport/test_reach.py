"""Meshes on 127.0.0.1 that reach each other through a third, and then better."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress

import pytest

from covey.transport.errors import LinkBroken
from covey.transport.link import LinkKind
from covey.transport.messages import SessionOpened
from covey.transport.nat.facts import NatFacts
from covey.transport.peer import Peer
from covey.transport.punch.attempts import Attempt, attempts
from covey.transport.reach import Reach
from covey.transport.upgrade import upgrader
from support.meshes import Node, beat, open_session, swarm_of

pytestmark = pytest.mark.network


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def reachable(node: Node, stack: AsyncExitStack) -> Reach:
    assert node.swarm is not None
    reach = Reach(node.mesh, node.swarm, maps_ports=False, is_outside=lambda _: True)
    return await stack.enter_async_context(reach)


async def three(stack: AsyncExitStack) -> tuple[list[Node], list[Reach]]:
    """Two ends that know of each other only that the third relays; the lower id is the first."""
    nodes = await swarm_of(stack, 3)
    reaches = [await reachable(node, stack) for node in nodes]
    a, b, relay = nodes
    for end, other in ((a, b), (b, a)):
        end.mesh.learn(other.id, (), relays=(relay.id,))
        await end.mesh.peer(relay.id)
    return nodes, reaches


async def until_kind(node: Node, peer: Peer, wanted: LinkKind) -> None:
    moved = asyncio.Event()
    node.mesh.on_path(lambda _: moved.set())
    async with asyncio.timeout(10):
        while peer.kind is not wanted:
            moved.clear()
            await moved.wait()


async def test_a_peer_without_an_address_is_reached_through_its_relay(
    stack: AsyncExitStack,
) -> None:
    (a, b, _), _ = await three(stack)
    peer = await a.mesh.peer(b.id)
    answer = await peer.request(open_session(a.id), timeout_s=5)
    assert answer.message == SessionOpened(session="s")


@pytest.mark.parametrize("dialler", [0, 1])
async def test_a_relayed_link_becomes_a_direct_one_and_loses_nothing(
    stack: AsyncExitStack, dialler: int
) -> None:
    (a, b, _), reaches = await three(stack)
    for reach in reaches:
        await reach.nat.refresh()
    ends = (a, b) if dialler == 0 else (b, a)
    peer = await ends[0].mesh.peer(ends[1].id)
    n_sent = 0

    async def talk() -> None:
        nonlocal n_sent
        while True:
            await peer.send(beat(str(n_sent)))
            n_sent += 1
            await asyncio.sleep(0)

    talking = asyncio.create_task(talk())
    await until_kind(ends[0], peer, LinkKind.DIRECT)
    talking.cancel()
    await asyncio.gather(talking, return_exceptions=True)
    for number in range(n_sent):
        _, frame = await ends[1].frames.get()
        assert frame.message == beat(str(number))
    assert a.downs.empty()


async def test_a_relayed_link_survives_its_relay_when_there_is_another(
    stack: AsyncExitStack,
) -> None:
    nodes = await swarm_of(stack, 4)
    a, b, first, second = nodes
    for node in nodes:
        await reachable(node, stack)
    for end, other in ((a, b), (b, a)):
        end.mesh.learn(other.id, (), relays=(first.id, second.id))
        for relay in (first, second):
            await end.mesh.peer(relay.id)
    peer = await a.mesh.peer(b.id)
    answer = await peer.request(open_session(a.id), timeout_s=5)
    await first.mesh.aclose()
    link = peer._link
    if peer.kind is LinkKind.RELAYED:
        link._carrier.abort(LinkBroken("the relay is gone"))  # type: ignore[attr-defined]
    answer = await peer.request(open_session(a.id), timeout_s=5)
    assert answer.message == SessionOpened(session="s")
    assert a.mesh.peers[b.id] is peer


@contextmanager
def full_server() -> Iterator[str]:
    """An address from which no answer comes, as from one behind a router."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        host, port = server.getsockname()
        for _ in range(4):
            connection = stack.enter_context(socket.socket())
            connection.setblocking(False)
            with suppress(BlockingIOError):
                connection.connect((host, port))
        yield f"{host}:{port}"


async def test_a_dial_that_leads_nowhere_takes_the_relays_that_become_known(
    stack: AsyncExitStack,
) -> None:
    a, b, relay = await swarm_of(stack, 3)
    for node in (a, b, relay):
        await reachable(node, stack)
    for end in (a, b):
        await end.mesh.peer(relay.id)
    with full_server() as address:
        a.mesh.learn(b.id, (address,))
        dialling = asyncio.create_task(a.mesh.peer(b.id))
        for _ in range(10):  # until it has begun
            await asyncio.sleep(0)
        assert a.mesh.contact(b.id).dial is not None
        a.mesh.learn(b.id, (address,), relays=(relay.id,))
        async with asyncio.timeout(5):
            peer = await dialling
    answer = await peer.request(open_session(a.id), timeout_s=5)
    assert answer.message == SessionOpened(session="s")


def needed(peer: Peer, reach: Reach) -> None:
    peer.hold()


def new_facts(peer: Peer, reach: Reach) -> None:
    reach.upgrader.facts_changed()


@pytest.mark.parametrize("reason", [needed, new_facts])
async def test_what_did_not_work_is_tried_again_soon_if_there_is_a_reason(
    stack: AsyncExitStack,
    monkeypatch: pytest.MonkeyPatch,
    reason: Callable[[Peer, Reach], None],
) -> None:
    may_work, tried = False, asyncio.Event()

    def attempts_now(ours: NatFacts, theirs: NatFacts) -> tuple[Attempt, ...]:
        tried.set()
        return attempts(ours, theirs) if may_work else ()

    monkeypatch.setattr(upgrader, "attempts", attempts_now)
    monkeypatch.setattr(upgrader, "PAUSES_S", (0.0, 3600.0))
    monkeypatch.setattr(upgrader, "NEEDED_PAUSE_S", 0.1)
    monkeypatch.setattr(upgrader, "LOOK_S", 0.1)
    (a, b, _), reaches = await three(stack)
    for reach in reaches:
        await reach.nat.refresh()
    peer = await a.mesh.peer(b.id)
    async with asyncio.timeout(10):
        await tried.wait()
    assert peer.kind is LinkKind.RELAYED
    may_work = True
    reason(peer, reaches[0])
    await until_kind(a, peer, LinkKind.DIRECT)
