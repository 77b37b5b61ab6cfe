"""Peers on links in memory, under virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from covey.transport.errors import (
    ErrorCode,
    LinkBroken,
    LinkClosed,
    LinkTimeout,
    MalformedFrame,
    PeerLeft,
    RefusedByPeer,
    TransportError,
)
from covey.transport.frame import Frame, Tensor
from covey.transport.identity import Identity
from covey.transport.memory import Conditions, MemoryLink, memory_link_pair
from covey.transport.messages import Beat, Failure, Goodbye, Pong, StoreSync
from covey.transport.peer import Peer
from support.virtual_time import VirtualTimeLoop

A, B = (Identity(bytes([n] * 32)).peer_id for n in (1, 2))


def beat(n: int = 0) -> Beat:
    return Beat(body=bytes([n]))


@dataclass
class End:
    """One peer, its link, and what it was handed."""

    link: MemoryLink
    answer: Callable[[Peer, Frame], None] | None = None
    frames: list[Frame] = field(default_factory=list)

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.peer = Peer(self.link, self._handle, clock=loop.time)
        self.ended = asyncio.create_task(self.peer.run())

    def _handle(self, peer: Peer, frame: Frame) -> None:
        self.frames.append(frame)
        if self.answer is not None:
            self.answer(peer, frame)


@asynccontextmanager
async def two_peers(
    answer: Callable[[Peer, Frame], None] | None = None, *, delay_s: float = 0.05
) -> AsyncIterator[tuple[End, End]]:
    link_a, link_b = memory_link_pair(A, B, conditions=Conditions(delay_s=delay_s))
    ends = End(link_a), End(link_b, answer)
    yield ends
    for end in ends:
        end.peer.abort(LinkBroken("the test is over"))
        await end.ended


def in_virtual_time(test: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    def run() -> None:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            runner.run(test())

    run.__name__ = test.__name__
    return run


def echo(peer: Peer, frame: Frame) -> None:
    if frame.request is not None:
        peer.reply(frame, frame.message)


@in_virtual_time
async def test_answers_find_their_requests() -> None:
    async with two_peers(echo) as (a, _):
        answers = await asyncio.gather(*(a.peer.request(beat(n), timeout_s=1) for n in range(9)))
        assert [answer.message for answer in answers] == [beat(n) for n in range(9)]


@in_virtual_time
async def test_a_refusal_is_raised_with_its_code() -> None:
    def refuse(peer: Peer, frame: Frame) -> None:
        peer.reply(frame, Failure(code=ErrorCode.CACHE_FULL))

    async with two_peers(refuse) as (a, _):
        with pytest.raises(RefusedByPeer) as caught:
            await a.peer.request(beat(), timeout_s=1)
        assert caught.value.code is ErrorCode.CACHE_FULL


@in_virtual_time
async def test_a_late_answer_is_dropped_and_harms_nothing() -> None:
    requests: list[tuple[Peer, Frame]] = []
    async with two_peers(lambda peer, frame: requests.append((peer, frame))) as (a, _):
        with pytest.raises(LinkTimeout, match="Beat within 2 s"):
            await a.peer.request(beat(1), timeout_s=2)
        second = asyncio.create_task(a.peer.request(beat(2), timeout_s=2))
        await asyncio.sleep(0.1)
        for peer, frame in requests:
            echo(peer, frame)
        assert (await second).message == beat(2)
        assert a.frames == []


@in_virtual_time
async def test_all_who_wait_learn_that_the_link_broke() -> None:
    async with two_peers() as (a, b):
        waiting = [asyncio.create_task(a.peer.request(beat(), timeout_s=99)) for _ in range(3)]
        await asyncio.sleep(0.1)
        a.link.break_()
        for task in waiting:
            with pytest.raises(LinkBroken):
                await task
        assert isinstance(await b.ended, LinkBroken)
        with pytest.raises(LinkBroken):
            await a.peer.request(beat(), timeout_s=99)


@in_virtual_time
async def test_a_cancelled_request_leaves_the_peer_usable() -> None:
    async with two_peers(echo) as (a, _):
        task = asyncio.create_task(a.peer.request(beat(), timeout_s=99))
        await asyncio.sleep(0)
        task.cancel()
        assert (await a.peer.request(beat(1), timeout_s=1)).message == beat(1)


@in_virtual_time
async def test_a_silent_peer_of_a_session_is_suspected_within_three_seconds() -> None:
    async with two_peers() as (a, b):
        a.peer.hold()
        await asyncio.sleep(30)
        assert a.peer.error is None
        assert a.peer.rtt_s == pytest.approx(0.1)
        a.link.stall()
        stopped_at = asyncio.get_running_loop().time()
        error = await a.ended
        # Two and a half seconds after its last sign of life, which was at most one second ago.
        assert 1.5 <= asyncio.get_running_loop().time() - stopped_at <= 2.5
        assert "silent" in str(error)
        assert b.peer.error is None or isinstance(b.peer.error, TransportError)


@in_virtual_time
async def test_a_held_link_outlives_an_hour_and_an_unused_one_a_minute() -> None:
    async with two_peers() as (a, b):
        a.peer.hold()
        await asyncio.sleep(3600)
        assert a.peer.error is b.peer.error is None
        a.peer.release()
        released_at = asyncio.get_running_loop().time()
        errors = await asyncio.gather(a.ended, b.ended)
        assert all(type(error) is LinkClosed for error in errors)
        assert 55 < asyncio.get_running_loop().time() - released_at < 65


@in_virtual_time
async def test_goodbye_is_told_from_closing() -> None:
    async with two_peers() as (a, b):
        await a.peer.send(beat(1))
        await a.peer.aclose()
        assert isinstance(await b.ended, PeerLeft)
        assert [frame.message for frame in b.frames] == [beat(1)]
        assert isinstance(await a.ended, LinkClosed)


@in_virtual_time
async def test_a_handler_that_finds_a_violation_closes_with_its_code() -> None:
    def object_(peer: Peer, frame: Frame) -> None:
        raise MalformedFrame("not what the session said")

    async with two_peers(object_) as (a, b):
        await a.peer.send(beat())
        assert isinstance(await b.ended, MalformedFrame)
        error = await a.ended
        assert isinstance(error, RefusedByPeer)
        assert error.code is ErrorCode.MALFORMED_FRAME


@in_virtual_time
async def test_frames_reach_the_handler_in_order_and_heartbeats_never_do() -> None:
    async with two_peers() as (a, b):
        a.peer.hold()
        for n in range(20):
            await a.peer.send(beat(n))
            await asyncio.sleep(0.5)
        assert [frame.message for frame in b.frames] == [beat(n) for n in range(20)]
        assert a.frames == []


@in_virtual_time
async def test_an_answer_to_nothing_is_ignored() -> None:
    async with two_peers(echo) as (a, b):
        b.link.post(Frame(message=beat(), reply_to=12345))
        b.link.post(Frame(message=Pong()))
        assert (await a.peer.request(beat(1), timeout_s=1)).message == beat(1)
        assert a.frames == []


@in_virtual_time
async def test_a_measurement_ends_in_bounded_time() -> None:
    async with two_peers(delay_s=0.02) as (a, _):
        rtt_s, bytes_per_s = await a.peer.measure()
        assert rtt_s == pytest.approx(0.04)
        assert bytes_per_s > 1e6
        a.link.stall()
        with pytest.raises(LinkTimeout):
            await a.peer.measure()


@in_virtual_time
async def test_what_came_before_an_abort_is_not_handed_on_after_it() -> None:
    async with two_peers(delay_s=0.0) as (a, b):
        for n in range(3):
            a.peer.post(beat(n))
        b.peer.abort(LinkClosed(by_peer=False))
        await b.ended
        assert b.frames == []


@in_virtual_time
async def test_release_without_hold_is_our_mistake() -> None:
    async with two_peers() as (a, _):
        with pytest.raises(ValueError, match="without hold"):
            a.peer.release()
        with pytest.raises(ValueError, match="wants no answer"):
            a.peer.reply(Frame(message=Goodbye()), beat())


@in_virtual_time
async def test_loss_delays_frames_and_keeps_their_order() -> None:
    conditions = Conditions(delay_s=0.01, jitter_s=0.05, loss=0.3, retransmit_s=0.2)
    link_a, link_b = memory_link_pair(A, B, conditions=conditions, seed=3)
    for n in range(50):
        await link_a.send(Frame(message=beat(n)))
    got = [(await link_b.receive()).message for _ in range(50)]
    assert got == [beat(n) for n in range(50)]
    assert asyncio.get_running_loop().time() > 0.2


@in_virtual_time
async def test_the_same_seed_gives_the_same_weather() -> None:
    async def arrival_times(seed: int) -> list[float]:
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        conditions = Conditions(delay_s=0.01, jitter_s=0.05, loss=0.3)
        link_a, link_b = memory_link_pair(A, B, conditions=conditions, seed=seed)
        times: list[float] = []
        for n in range(10):
            await link_a.send(Frame(message=StoreSync(body=bytes(n))))
            await link_b.receive()
            times.append(round(loop.time() - started_at, 6))
        return times

    assert await arrival_times(1) == await arrival_times(1) != await arrival_times(2)


@in_virtual_time
async def test_ballast_is_not_handed_on() -> None:
    async with two_peers() as (a, b):
        assert await a.peer.ping(timeout_s=1, nbytes=1000) == pytest.approx(0.1)
        assert b.frames == []
        with pytest.raises(LinkTimeout):
            await a.peer.request(beat(), {"x": Tensor("u8", (1,), b"x")}, timeout_s=0.01)
