"""The head's end of a session: opening all or nothing, steps, and everything that ends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import numpy as np
import pytest

from covey.node.engine.tensors import HiddenStates
from covey.node.errors import Busy, NotReady, SessionFailed
from covey.node.hidden import WrongTensor
from covey.node.pipeline import OPEN_TIMEOUT_S, STEP_TIMEOUT_S, PipelineSession, StepResult
from covey.node.switch import WrongFrame
from covey.transport.errors import ErrorCode, RefusedByPeer
from covey.transport.frame import Tensor
from covey.transport.messages import (
    AnyMessage,
    CloseSession,
    Forward,
    OpenSession,
    Pong,
    SessionOpened,
    StageTrace,
)
from covey.transport.messages import SessionFailed as Failed
from support.node_core import (
    HIDDEN,
    LINK_S,
    PEERS,
    CoreNode,
    Net,
    in_virtual_time,
    route_of,
    rows,
    settled,
    wire,
)

HEAD, FIRST, LAST, STRANGER = PEERS[:4]
ROUTE = route_of(FIRST, LAST)


async def step(
    session: PipelineSession, hidden: HiddenStates, *, position: int, n_return: int
) -> StepResult:
    return await session.wait(await session.send(hidden, position=position, n_return=n_return))


class Stages:
    """A head whose two stages answer as the test wants, and write down what they get."""

    def __init__(self, nodes: list[CoreNode]) -> None:
        self.head, self.first, self.last = nodes
        self.opened: list[tuple[str, OpenSession]] = []
        self.closed: list[str] = []
        self.forwards: list[Forward] = []
        for node in (self.first, self.last):
            self.answer(node, _accept)
            node.switch.on_message(CloseSession, self._note_close(node))
        self.first.switch.on_message(Forward, lambda _, m, __: self.forwards.append(m))

    def answer(
        self, node: CoreNode, how: Callable[[OpenSession], Coroutine[Any, Any, AnyMessage]]
    ) -> None:
        async def handler(_: str, message: OpenSession) -> AnyMessage:
            self.opened.append((node.peer_id, message))
            return await how(message)

        node.switch.on_request(OpenSession, handler)

    def _note_close(self, node: CoreNode) -> Callable[..., None]:
        return lambda _, __, ___: self.closed.append(node.peer_id)

    async def open(self, name: str = "s") -> PipelineSession:
        return await self.head.pipelines.open(name, ROUTE, hidden_size=HIDDEN, n_tokens=9)

    async def send(self, hidden: HiddenStates, **changes: Any) -> asyncio.Future[Any]:
        [session] = self.head.pipelines
        return await session.send(hidden, **{"position": 0, "n_return": 1, **changes})

    def give_back(self, tensors: Any = None, sender: str = LAST, **changes: Any) -> None:
        plain = Forward(
            session="s",
            epoch=ROUTE.epoch,
            stage_idx=2,
            step=0,
            position=0,
            n_return=1,
            trace=[StageTrace(1, 2, 3)] * 2,
        )
        message = msgspec.structs.replace(plain, **changes)
        tensors = wire(rows(1, first=7)) if tensors is None else tensors
        assert self.head.pipelines.take_return(sender, message, tensors)


async def _accept(message: OpenSession) -> AnyMessage:
    return SessionOpened(session=message.session)


def _refuse(code: ErrorCode) -> Callable[[OpenSession], Coroutine[Any, Any, AnyMessage]]:
    async def answer(_: OpenSession) -> AnyMessage:
        raise RefusedByPeer(code)

    return answer


async def _never(_: OpenSession) -> AnyMessage:
    await asyncio.sleep(1000)
    raise AssertionError


@asynccontextmanager
async def stages() -> AsyncIterator[Stages]:
    async with Net(3) as nodes:
        yield Stages(nodes)


@in_virtual_time
async def test_each_stage_is_told_its_place() -> None:
    async with stages() as it:
        await it.open()
        by_peer = dict(it.opened)
        assert {(m.plan, m.epoch, m.n_tokens) for m in by_peer.values()} == {(ROUTE.digest, 3, 9)}
        places = [(m.stage_idx, m.previous, m.next) for m in (by_peer[FIRST], by_peer[LAST])]
        assert places == [(0, HEAD, LAST), (1, FIRST, HEAD)]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (ErrorCode.CACHE_FULL, Busy),
        (ErrorCode.TOO_MANY_SESSIONS, Busy),
        (ErrorCode.UNKNOWN_PLAN, NotReady),
        (ErrorCode.WRONG_EPOCH, NotReady),
        (ErrorCode.SHUTTING_DOWN, NotReady),
        (ErrorCode.INTERNAL, NotReady),
    ],
)
@in_virtual_time
async def test_a_refusal_of_one_stage_closes_the_session_on_all(
    code: ErrorCode, error: type[Exception]
) -> None:
    async with stages() as it:
        it.answer(it.last, _refuse(code))
        with pytest.raises(error):
            await it.open()
        await asyncio.sleep(2 * LINK_S)
        assert sorted(it.closed) == sorted([FIRST, LAST])
        assert list(it.head.pipelines) == []


@in_virtual_time
async def test_busy_is_said_only_when_waiting_would_help() -> None:
    async with stages() as it:
        it.answer(it.first, _refuse(ErrorCode.CACHE_FULL))
        it.answer(it.last, _refuse(ErrorCode.UNKNOWN_PLAN))
        with pytest.raises(NotReady):
            await it.open()


@in_virtual_time
async def test_a_stage_that_does_not_answer_is_not_ready() -> None:
    async with stages() as it:
        it.answer(it.last, _never)
        began_at = it.head.clock()
        with pytest.raises(NotReady, match="within 10 s"):
            await it.open()
        assert it.head.clock() - began_at == pytest.approx(OPEN_TIMEOUT_S)
        await asyncio.sleep(2 * LINK_S)
        assert FIRST in it.closed


@in_virtual_time
async def test_a_stage_that_cannot_be_reached_is_not_ready() -> None:
    async with stages() as it:
        del it.head.peers[LAST]
        with pytest.raises(NotReady, match="cannot reach"):
            await it.open()
        await asyncio.sleep(2 * LINK_S)
        assert it.closed == [FIRST]


@pytest.mark.parametrize("answer", [Pong(), SessionOpened(session="another")])
@in_virtual_time
async def test_an_answer_that_opens_nothing_is_not_taken_for_one(answer: AnyMessage) -> None:
    async def lie(_: OpenSession) -> AnyMessage:
        return answer

    async with stages() as it:
        it.answer(it.last, lie)
        with pytest.raises(NotReady):
            await it.open()


@in_virtual_time
async def test_a_cancelled_open_frees_the_stages() -> None:
    async with stages() as it:
        it.answer(it.last, _never)
        opening = asyncio.create_task(it.open())
        await asyncio.sleep(1)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await asyncio.sleep(2 * LINK_S)
        assert sorted(it.closed) == sorted([FIRST, LAST])
        assert list(it.head.pipelines) == []


@in_virtual_time
async def test_two_sessions_of_one_name_are_refused_and_the_first_lives() -> None:
    async with stages() as it:
        first = await it.open()
        with pytest.raises(ValueError, match="open already"):
            await it.open()
        assert list(it.head.pipelines) == [first]


@in_virtual_time
async def test_steps_are_numbered_and_answers_find_them() -> None:
    async with stages() as it:
        await it.open()
        first = await it.send(rows(3), n_return=0)
        second = await it.send(rows(2), position=3, n_return=2)
        await asyncio.sleep(2 * LINK_S)
        assert [(m.step, m.position, m.n_return, m.stage_idx) for m in it.forwards] == [
            (0, 0, 0, 0),
            (1, 3, 2, 0),
        ]
        it.give_back({}, n_return=0)
        it.give_back(wire(rows(2, first=7)), step=1, position=3, n_return=2)
        assert (await first).hidden is None
        result = await second
        assert np.array_equal(result.hidden, rows(2, first=7))
        assert result.returned_bytes == 2 * HIDDEN * 4
        assert result.trace == [StageTrace(1, 2, 3)] * 2


NAN = np.full((1, HIDDEN), np.nan, np.float32)
WRONG_RETURNS: dict[str, tuple[dict[str, Any], ErrorCode]] = {
    "sender": ({"sender": FIRST}, ErrorCode.NOT_A_MEMBER),
    "stranger": ({"sender": STRANGER}, ErrorCode.NOT_A_MEMBER),
    "epoch": ({"epoch": 4}, ErrorCode.WRONG_EPOCH),
    "trace": ({"trace": []}, ErrorCode.MALFORMED_FRAME),
    "step": ({"step": 1}, ErrorCode.WRONG_POSITION),
    "position": ({"position": 1}, ErrorCode.WRONG_POSITION),
    "codec": ({"codec": "fp16"}, ErrorCode.WRONG_TENSOR),
    "n_return": ({"n_return": 2}, ErrorCode.WRONG_TENSOR),
    "no tensor": ({"tensors": {}}, ErrorCode.WRONG_TENSOR),
    "too many rows": ({"tensors": wire(rows(2))}, ErrorCode.WRONG_TENSOR),
    "width": (
        {"tensors": {"hidden": Tensor("fp32", (1, HIDDEN + 1), bytes(4 * (HIDDEN + 1)))}},
        ErrorCode.WRONG_TENSOR,
    ),
    "dtype": (
        {"tensors": {"hidden": Tensor("fp16", (1, HIDDEN), bytes(2 * HIDDEN))}},
        ErrorCode.WRONG_TENSOR,
    ),
    "NaN": ({"tensors": wire(NAN)}, ErrorCode.WRONG_TENSOR),
}


@pytest.mark.parametrize("what", WRONG_RETURNS)
@in_virtual_time
async def test_a_wrong_return_is_coded_and_nothing_of_it_is_used(what: str) -> None:
    changes, code = WRONG_RETURNS[what]
    async with stages() as it:
        await it.open()
        future = await it.send(rows(1))
        with pytest.raises((WrongFrame, WrongTensor)) as caught:
            it.give_back(**changes)
        assert caught.value.code is code
        assert not future.done()
        it.give_back()
        assert np.array_equal((await future).hidden, rows(1, first=7))


@in_virtual_time
async def test_too_few_rows_and_rows_that_nobody_asked_for_are_wrong() -> None:
    async with stages() as it:
        await it.open()
        await it.send(rows(2), n_return=2)
        await it.send(rows(1), position=2, n_return=0)
        with pytest.raises(WrongTensor, match="fewer"):
            it.give_back(n_return=2)
        with pytest.raises(WrongTensor, match="nobody asked"):
            it.give_back(step=1, position=2, n_return=0)


@in_virtual_time
async def test_a_step_is_returned_once() -> None:
    async with stages() as it:
        await it.open()
        await it.send(rows(1))
        it.give_back()
        with pytest.raises(WrongFrame) as caught:
            it.give_back()
        assert caught.value.code is ErrorCode.WRONG_POSITION


@in_virtual_time
async def test_what_was_on_its_way_when_the_session_failed_is_no_offence() -> None:
    async with stages() as it:
        await it.open()
        await it.send(rows(1))
        [session] = it.head.pipelines
        session.fail(ErrorCode.INTERNAL, "for the test")
        it.give_back()


@in_virtual_time
async def test_frames_that_are_not_for_a_session_of_this_head_are_passed_on() -> None:
    async with stages() as it:
        message = Forward(session="t", epoch=3, stage_idx=2, step=0, position=0, n_return=0)
        assert not it.head.pipelines.take_return(LAST, message, {})
        await it.open("t")
        inward = msgspec.structs.replace(message, stage_idx=0)
        assert not it.head.pipelines.take_return(LAST, inward, {})


@in_virtual_time
async def test_all_in_flight_fail_at_once_when_a_stage_gives_up() -> None:
    async with stages() as it:
        session = await it.open()
        futures = [await it.send(rows(1), position=n) for n in range(3)]
        began_at = it.head.clock()
        lie = Failed(session="s", stage_idx=0, code=ErrorCode.INTERNAL)
        await it.last.switch.send(HEAD, lie)
        for future in futures:
            with pytest.raises(SessionFailed, match="stage 1") as caught:
                await session.wait(future)
            assert caught.value.code == "internal"
        assert it.head.clock() - began_at < 2 * LINK_S
        with pytest.raises(SessionFailed):
            await it.send(rows(1))


@in_virtual_time
async def test_a_stranger_cannot_fail_a_session() -> None:
    async with stages() as it:
        await it.open()
        message = Failed(session="s", stage_idx=0, code=ErrorCode.INTERNAL)
        it.head.pipelines._stage_failed(STRANGER, message, {})
        await it.send(rows(1))


@pytest.mark.parametrize("peer", [FIRST, LAST])
@in_virtual_time
async def test_a_lost_stage_fails_the_step_at_once(peer: str) -> None:
    async with stages() as it:
        session = await it.open()
        future = await it.send(rows(1))
        it.head.links[peer].break_()
        began_at = it.head.clock()
        with pytest.raises(SessionFailed) as caught:
            await session.wait(future)
        assert caught.value.code == "peer_lost"
        assert it.head.clock() == began_at


@in_virtual_time
async def test_sending_over_a_lost_link_fails_the_session_with_one_reason() -> None:
    async with stages() as it:
        session = await it.open()
        del it.head.peers[FIRST]
        with pytest.raises(SessionFailed) as caught:
            await it.send(rows(1))
        assert caught.value.code == "peer_lost"
        with pytest.raises(SessionFailed) as again:
            await step(session, rows(1), position=0, n_return=1)
        assert again.value is caught.value


@in_virtual_time
async def test_values_beyond_the_codec_fail_the_session_and_no_frame_is_sent() -> None:
    async with stages() as it:
        route = route_of(FIRST, LAST, codec="fp16")
        session = await it.head.pipelines.open("s", route, hidden_size=HIDDEN, n_tokens=9)
        with pytest.raises(SessionFailed, match="fp16"):
            await step(session, rows(1, first=1e6), position=0, n_return=1)
        await asyncio.sleep(2 * LINK_S)
        assert it.forwards == []


@in_virtual_time
async def test_a_step_has_a_deadline_and_its_late_answer_harms_nothing() -> None:
    async with stages() as it:
        session = await it.open()
        for peer in it.head.peers.values():
            peer.hold()
        began_at = it.head.clock()
        with pytest.raises(SessionFailed) as caught:
            await step(session, rows(1), position=0, n_return=1)
        assert caught.value.code == "deadline_exceeded"
        assert it.head.clock() - began_at == pytest.approx(STEP_TIMEOUT_S)
        it.give_back()


@in_virtual_time
async def test_closing_fails_what_waits_and_tells_each_stage_once() -> None:
    async with stages() as it:
        session = await it.open()
        future = await it.send(rows(1))
        it.head.pipelines.close(session)
        it.head.pipelines.close(session)
        with pytest.raises(SessionFailed):
            await session.wait(future)
        await asyncio.sleep(2 * LINK_S)
        assert sorted(it.closed) == sorted([FIRST, LAST])


@in_virtual_time
async def test_closing_an_ended_session_leaves_the_next_of_its_name_alone() -> None:
    async with stages() as it:
        first = await it.open()
        it.head.pipelines.close(first)
        second = await it.open()
        it.head.pipelines.close(first)
        assert list(it.head.pipelines) == [second]


@in_virtual_time
async def test_a_stopping_head_says_so_and_tells_the_stages() -> None:
    async with stages() as it:
        session = await it.open()
        future = await it.send(rows(1))
        await it.head.pipelines.aclose()
        with pytest.raises(SessionFailed) as caught:
            await session.wait(future)
        assert caught.value.code == "shutting_down"
        await asyncio.sleep(2 * LINK_S)
        assert sorted(it.closed) == sorted([FIRST, LAST])


@in_virtual_time
async def test_only_the_sessions_over_a_lost_peer_fail() -> None:
    async with Net(3) as (head, first, last):
        both, alone = route_of(FIRST, LAST), route_of(FIRST)
        for node in (first, last):
            node.load(both)
        first.load(alone)
        over_both = await head.pipelines.open("both", both, hidden_size=HIDDEN, n_tokens=4)
        over_first = await head.pipelines.open("first", alone, hidden_size=HIDDEN, n_tokens=4)
        head.links[LAST].break_()
        await settled()
        with pytest.raises(SessionFailed):
            await step(over_both, rows(1), position=0, n_return=1)
        result = await step(over_first, rows(1), position=0, n_return=1)
        assert result.hidden is not None
        assert np.array_equal(result.hidden, rows(1, first=1))
