"""What every kind of lane promises, whatever carries it."""

from __future__ import annotations

import asyncio
import os
import select
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import AsyncExitStack
from typing import TypeVar

import pytest

from covey.transport.lane import stream
from covey.transport.lane.errors import LaneBroken, LaneTimeout
from covey.transport.lane.inbox import memory_lane_pair
from covey.transport.lane.lane import MAX_MESSAGE, Lane, LaneKind
from covey.transport.lane.opening import Lanes
from covey.transport.lane.waiting import wait_any
from support.lanes import A, B, LanePair, local_lane_pair, tls_lane_pair
from support.meshes import swarm_of

T = TypeVar("T")
MIB = 1 << 20
SOON_S = 5.0


async def memory_pair(_: AsyncExitStack) -> LanePair:
    return memory_lane_pair(A.peer_id, B.peer_id)


async def local_pair(_: AsyncExitStack) -> LanePair:
    return await local_lane_pair()


async def tls_pair(_: AsyncExitStack) -> LanePair:
    return await tls_lane_pair()


async def link_pair(stack: AsyncExitStack) -> LanePair:
    a, b = await swarm_of(stack, 2)
    kinds: tuple[LaneKind, ...] = ("link",)
    at_a, at_b = Lanes(a.mesh, kinds=kinds), Lanes(b.mesh, kinds=kinds)
    stack.push_async_callback(at_a.aclose)
    stack.push_async_callback(at_b.aclose)
    lanes = await asyncio.gather(at_a.open(b.id, b"test"), at_b.accept(a.id, b"test"))
    return lanes[0], lanes[1]


@pytest.fixture(
    params=[
        pytest.param(memory_pair, id="memory"),
        pytest.param(local_pair, id="local"),
        pytest.param(tls_pair, id="tls", marks=pytest.mark.network),
        pytest.param(link_pair, id="link", marks=pytest.mark.network),
    ],
)
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[LanePair]:
    async with AsyncExitStack() as stack:
        lanes = await request.param(stack)
        yield lanes
        for lane in lanes:
            lane.close()


def in_thread(work: Callable[[], T]) -> Future[T]:
    """As compute threads do; the event loop stays free for what a lane over a link needs."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


async def off(work: Callable[[], T]) -> T:
    return await asyncio.wait_for(asyncio.wrap_future(in_thread(work)), 30)


async def test_each_end_knows_the_other(pair: LanePair) -> None:
    at_a, at_b = pair
    assert at_a.peer_id != at_b.peer_id
    assert at_a.kind == at_b.kind


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 65535, 65536, 65537, 3 * MIB])
async def test_a_message_arrives_as_it_was_sent(pair: LanePair, nbytes: int) -> None:
    at_a, at_b = pair
    data = os.urandom(nbytes)
    third = nbytes // 3
    sending = in_thread(lambda: at_a.send(data[:third], bytearray(data[third:])))
    received = await off(lambda: bytes(at_b.receive(SOON_S)))
    assert received == data
    await asyncio.wrap_future(sending)


async def test_messages_keep_their_order_and_bounds(pair: LanePair) -> None:
    at_a, at_b = pair
    sizes = [0, 5, 70_000, 1, 0, 4096, 200_000, 3] * 5
    messages = [bytes([i % 256]) * size for i, size in enumerate(sizes)]

    def send_all() -> None:
        for message in messages:
            at_a.send(message)

    sending = in_thread(send_all)
    for message in messages:
        assert await off(lambda: bytes(at_b.receive(SOON_S))) == message
    await asyncio.wrap_future(sending)


async def test_what_was_received_stays_while_more_comes_and_is_sent(pair: LanePair) -> None:
    at_a, at_b = pair
    await off(lambda: at_a.send(b"first"))
    first = await off(lambda: at_b.receive(SOON_S))
    await off(lambda: at_a.send(b"2" * 100_000))
    await off(lambda: at_b.send(b"answer"))
    assert bytes(first) == b"first"


async def test_both_may_send_much_at_once(pair: LanePair) -> None:
    big = [bytes([i]) * (4 * MIB) for i in range(2)]

    def exchange(i: int) -> bool:
        pair[i].send(big[i])
        return bytes(pair[i].receive(SOON_S)) == big[1 - i]

    both = [in_thread(lambda i=i: exchange(i)) for i in range(2)]  # type: ignore[misc]
    assert [await asyncio.wait_for(asyncio.wrap_future(it), 30) for it in both] == [True, True]


async def test_a_lane_stays_usable_after_a_timeout(pair: LanePair) -> None:
    at_a, at_b = pair
    with pytest.raises(LaneTimeout) as caught:
        await off(lambda: at_b.receive(0.02))
    assert caught.value.after_s == 0.02
    assert at_b.poll() is None
    await off(lambda: at_a.send(b"late"))
    assert await off(lambda: bytes(at_b.receive(SOON_S))) == b"late"


async def test_its_file_tells_when_there_is_something(pair: LanePair) -> None:
    at_a, at_b = pair
    assert wait_any([at_b], 0.0) == []
    await off(lambda: at_a.send(b"x"))
    assert await off(lambda: wait_any([at_a, at_b], SOON_S)) == [at_b]
    assert bytes(at_b.receive(SOON_S)) == b"x"
    assert at_b.poll() is None
    assert not select.select([at_b.fileno()], (), (), 0.0)[0]


async def test_what_is_here_is_told_by_its_file_or_as_unseen(pair: LanePair) -> None:
    at_a, at_b = pair
    messages = [b"1", b"2" * 5000, b"3"]
    for message in messages:
        await off(lambda message=message: at_a.send(message))  # type: ignore[misc]
    for message in messages:
        assert at_b.has_unseen() or await off(lambda: wait_any([at_b], SOON_S)) == [at_b]
        assert bytes(at_b.receive(SOON_S)) == message
    assert at_b.poll() is None
    assert not at_b.has_unseen()
    at_b.close()
    assert at_b.has_unseen() or wait_any([at_b], 0.0) == [at_b]


async def test_of_several_lanes_the_one_that_has_something_is_found(pair: LanePair) -> None:
    idle, other_end = memory_lane_pair("c", "d")
    at_a, at_b = pair
    waiting = in_thread(lambda: wait_any([idle, at_b], SOON_S))
    await off(lambda: at_a.send(b"x"))
    assert await asyncio.wrap_future(waiting) == [at_b]
    other_end.close()
    assert set(await off(lambda: wait_any([idle, at_b], SOON_S))) == {idle, at_b}
    idle.close()


async def test_closing_ends_both_sides(pair: LanePair) -> None:
    at_a, at_b = pair
    await off(lambda: at_a.send(b"last words"))
    await off(at_a.close)
    at_a.close()
    for call in (lambda: at_a.send(b"x"), lambda: at_a.receive(1.0), at_a.poll):
        with pytest.raises(LaneBroken):
            await off(call)
    assert await off(lambda: bytes(at_b.receive(SOON_S))) == b"last words"
    with pytest.raises(LaneBroken):
        await off(lambda: at_b.receive(SOON_S))
    with pytest.raises(LaneBroken):
        await off(lambda: send_until_broken(at_b))


def send_until_broken(lane: Lane) -> None:
    """The first message after the other's end may still get away."""
    until = time.monotonic() + SOON_S
    while time.monotonic() < until:
        lane.send(b"x")


async def test_a_thread_that_waits_is_woken_by_the_end(pair: LanePair) -> None:
    _, at_b = pair
    waiting = [in_thread(lambda lane=lane: lane.receive(60.0)) for lane in pair]  # type: ignore[misc]
    await off(at_b.close)
    for it in waiting:
        with pytest.raises(LaneBroken):
            await asyncio.wait_for(asyncio.wrap_future(it), SOON_S)


async def test_a_message_beyond_the_limit_is_refused_here(pair: LanePair) -> None:
    at_a, at_b = pair
    half = bytes(MAX_MESSAGE // 2 + 1)
    with pytest.raises(ValueError, match="over"):
        await off(lambda: at_a.send(half, half))
    await off(lambda: at_a.send(b"small"))
    assert await off(lambda: bytes(at_b.receive(SOON_S))) == b"small"


@pytest.mark.parametrize("make", [local_lane_pair, tls_lane_pair])
async def test_a_peer_that_takes_nothing_does_not_hold_up_for_ever(
    make: Callable[[], AsyncIterator[LanePair]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SEND_TIMEOUT_S", 0.2)
    at_a, at_b = await make()  # type: ignore[misc]
    with pytest.raises(LaneBroken, match="took nothing"):
        await off(lambda: [at_a.send(bytes(MIB)) for _ in range(64)])
    at_a.close()
    at_b.close()
