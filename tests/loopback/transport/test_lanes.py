"""Opening lanes between real meshes: by which way, for whom, and who gets none."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from covey.transport.errors import LinkBroken, LinkTimeout, NotAMember, RefusedByPeer
from covey.transport.lane.errors import LaneBroken
from covey.transport.lane.lane import Lane, LaneKind
from covey.transport.lane.opening import ALL_KINDS, MAX_AGREED_PER_PEER, Lanes
from covey.transport.lane.secure import KEY_BYTES, LANE_ID_BYTES, secure_tls
from covey.transport.messages import LaneDial, LaneOffer, LaneOverLink
from covey.transport.preamble import NONCE_BYTES, build_preamble
from support.meshes import Node, swarm_of

pytestmark = pytest.mark.network

SOON_S = 10.0
ID, KEY = bytes([7] * LANE_ID_BYTES), bytes([9] * KEY_BYTES)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


def lanes_of(stack: AsyncExitStack, node: Node, *kinds: LaneKind) -> Lanes:
    lanes = Lanes(node.mesh, kinds=kinds or ALL_KINDS)
    stack.push_async_callback(lanes.aclose)
    return lanes


async def opened(
    stack: AsyncExitStack, at_a: Lanes, at_b: Lanes, a: Node, b: Node
) -> tuple[Lane, Lane]:
    lanes = await asyncio.gather(at_a.open(b.id, b"test"), at_b.accept(a.id, b"test"))
    for lane in lanes:
        stack.callback(lane.close)
    return lanes[0], lanes[1]


async def said_by(lane: Lane) -> bytes:
    return bytes(await asyncio.to_thread(lane.receive, SOON_S))


@pytest.mark.parametrize(
    ("kinds_of_b", "expected"),
    [(ALL_KINDS, "local"), (("tls", "link"), "tls"), (("link",), "link")],
    ids=["one machine", "the network", "the link"],
)
async def test_the_fastest_way_that_both_have_is_taken(
    stack: AsyncExitStack, kinds_of_b: tuple[LaneKind, ...], expected: LaneKind
) -> None:
    a, b = await swarm_of(stack, 2)
    at_a, at_b = lanes_of(stack, a), lanes_of(stack, b, *kinds_of_b)
    one, other = await opened(stack, at_a, at_b, a, b)
    assert one.kind == other.kind == expected
    await asyncio.to_thread(one.send, b"there")
    assert await said_by(other) == b"there"
    await asyncio.to_thread(other.send, b"and back")
    assert await said_by(one) == b"and back"


async def test_a_lane_is_for_its_purpose_only_and_waits_for_who_wants_it(
    stack: AsyncExitStack,
) -> None:
    a, b = await swarm_of(stack, 2)
    at_a, at_b = lanes_of(stack, a), lanes_of(stack, b)
    one = await at_a.open(b.id, b"this")
    stack.callback(one.close)
    with pytest.raises(LinkTimeout):
        await at_b.accept(a.id, b"that", timeout_s=0.2)
    other = await at_b.accept(a.id, b"this")
    stack.callback(other.close)
    await asyncio.to_thread(one.send, b"x")
    assert await said_by(other) == b"x"


async def entering(of: Node, to: Node, key: bytes) -> None:
    """Dial `to` for lane `ID`, as `of`, and be taken. Raises what a dialer sees."""
    host, port = to.mesh.addresses[0].rsplit(":", 1)
    connection = socket.create_connection((host.strip("[]"), int(port)))
    connection.sendall(
        build_preamble(
            key_id=ID,
            key=key,
            expected_peer_id=to.id,
            nonce=bytes([len(of.id)] * NONCE_BYTES),
            unix_time=time.time(),
        )
    )
    wire = await secure_tls(
        connection,
        of.mesh.credentials.contexts,
        ID,
        peer_id=to.id,
        is_dialer=True,
        is_allowed=lambda _: True,
    )
    wire.close()


async def test_a_key_opens_nothing_for_another_member_than_it_was_agreed_with(
    stack: AsyncExitStack,
) -> None:
    a, b, thief = await swarm_of(stack, 3)
    at_b = lanes_of(stack, b, "tls")
    peer = await a.mesh.peer(b.id)
    await peer.request(LaneOffer(lane=ID, key=KEY, purpose=b"test"), timeout_s=SOON_S)
    with pytest.raises((LinkBroken, NotAMember)):
        await entering(thief, b, KEY)
    with pytest.raises((LinkBroken, NotAMember)):
        await entering(a, b, bytes(KEY_BYTES))
    with pytest.raises(LinkTimeout):
        await at_b.accept(a.id, b"test", timeout_s=0.1)
    with pytest.raises(LinkTimeout):
        await at_b.accept(thief.id, b"test", timeout_s=0.1)


async def test_a_lane_of_others_is_unknown_to_who_asks(stack: AsyncExitStack) -> None:
    a, b, other = await swarm_of(stack, 3)
    lanes_of(stack, b)
    peer = await a.mesh.peer(b.id)
    await peer.request(LaneOffer(lane=ID, key=KEY, purpose=b"test"), timeout_s=SOON_S)
    theirs = await other.mesh.peer(b.id)
    for request in (LaneDial(lane=ID), LaneOverLink(lane=ID)):
        with pytest.raises(RefusedByPeer):
            await theirs.request(request, timeout_s=SOON_S)


async def test_a_member_has_only_so_many_lanes_under_way(stack: AsyncExitStack) -> None:
    a, b, other = await swarm_of(stack, 3)
    lanes_of(stack, b)
    peer = await a.mesh.peer(b.id)

    def offer(number: int) -> LaneOffer:
        return LaneOffer(lane=number.to_bytes(LANE_ID_BYTES), key=KEY, purpose=b"")

    for number in range(MAX_AGREED_PER_PEER):
        await peer.request(offer(number), timeout_s=SOON_S)
    with pytest.raises(RefusedByPeer):
        await peer.request(offer(MAX_AGREED_PER_PEER), timeout_s=SOON_S)
    theirs = await other.mesh.peer(b.id)
    await theirs.request(offer(1000), timeout_s=SOON_S)  # its flood is nobody else's


async def test_a_removed_members_lanes_end(stack: AsyncExitStack) -> None:
    a, b = await swarm_of(stack, 2)
    at_a, at_b = lanes_of(stack, a), lanes_of(stack, b)
    _, other = await opened(stack, at_a, at_b, a, b)
    at_a.drop(b.id)
    with pytest.raises(LaneBroken):
        await said_by(other)
