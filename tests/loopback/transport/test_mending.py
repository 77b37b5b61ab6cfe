"""Links between two meshes on 127.0.0.1 whose connections break while both live."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from covey.transport.errors import LinkBroken, PeerLeft
from covey.transport.frame import Tensor
from covey.transport.liveness import LivenessRules
from covey.transport.messages import Forward, SessionOpened
from covey.transport.peer import Peer
from covey.transport.steady.link import SteadyLink
from support.meshes import Node, open_session, swarm_of

pytestmark = pytest.mark.network


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


def cut(peer: Peer) -> None:
    """Cut the connection under a link, as a router does that forgets."""
    link = peer._link
    assert isinstance(link, SteadyLink)
    assert link._carrier is not None
    link._carrier.abort(LinkBroken("cut by the test"))


async def connected(stack: AsyncExitStack) -> tuple[Node, Node, Peer, Peer]:
    a, b = await swarm_of(stack, 2)
    at_a = await a.mesh.peer(b.id)
    await b.ups.get()
    return a, b, at_a, b.mesh.peers[a.id]


@pytest.mark.parametrize("end", [0, 1])
async def test_a_link_whose_connection_breaks_goes_on(stack: AsyncExitStack, end: int) -> None:
    a, b, at_a, at_b = await connected(stack)
    for _ in range(10):
        cut((at_a, at_b)[end])
        answers = await asyncio.gather(
            at_a.request(open_session(a.id), timeout_s=5),
            at_b.request(open_session(b.id), timeout_s=5),
        )
        assert all(answer.message == SessionOpened(session="s") for answer in answers)
    assert a.mesh.peers[b.id] is at_a
    assert a.downs.empty()
    assert b.downs.empty()


async def test_large_frames_cross_a_link_that_is_cut_again_and_again(
    stack: AsyncExitStack,
) -> None:
    _, b, at_a, at_b = await connected(stack)
    data = os.urandom(3 << 20)

    async def disturb() -> None:
        while True:
            await asyncio.sleep(0.03)
            cut(at_a)
            await asyncio.sleep(0.03)
            cut(at_b)

    disturbing = asyncio.create_task(disturb())
    for step in range(20):
        message = Forward(session="s", epoch=0, stage_idx=0, step=step, position=0, n_return=1)
        await at_a.send(message, {"hidden": Tensor("u8", (len(data),), data)})
    for step in range(20):
        _, frame = await b.frames.get()
        assert isinstance(frame.message, Forward)
        assert frame.message.step == step
        assert frame.tensors["hidden"].data == data
    disturbing.cancel()


async def test_a_silent_link_is_mended_while_the_peer_lives(stack: AsyncExitStack) -> None:
    rules = LivenessRules(busy_ping_s=0.1, busy_silence_s=0.3)
    a, b = await swarm_of(stack, 2, rules=rules)
    peer = await a.mesh.peer(b.id)
    peer.hold()
    link = peer._link
    assert isinstance(link, SteadyLink)
    carrier = link._carrier
    assert carrier is not None
    transport = carrier._transport  # type: ignore[attr-defined]
    transport.pause_reading()  # what the other end says does not arrive any more
    answer = await peer.request(open_session(a.id), timeout_s=5)
    assert answer.message == SessionOpened(session="s")
    assert link.n_moves >= 1
    assert a.downs.empty()


async def test_a_goodbye_is_not_mended(stack: AsyncExitStack) -> None:
    a, b, _, _ = await connected(stack)
    await b.mesh.aclose()
    peer_id, error = await a.downs.get()
    assert (peer_id, type(error)) == (b.id, PeerLeft)


async def test_a_peer_that_does_not_know_the_link_ends_it(stack: AsyncExitStack) -> None:
    a, b, at_a, at_b = await connected(stack)
    link = at_b._link
    assert isinstance(link, SteadyLink)
    link.id = bytes(16)  # as after a restart
    cut(at_a)
    peer_id, error = await a.downs.get()
    assert (peer_id, type(error)) == (b.id, LinkBroken)
    assert await a.mesh.peer(b.id) is not at_a
