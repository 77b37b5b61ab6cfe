"""Messages find their handlers, here or over a link; errors become codes and nothing else."""

from __future__ import annotations

import asyncio

import pytest

from covey.errors import CoveyError
from covey.node.engine.errors import CacheFull
from covey.node.switch import Switch, code_of
from covey.transport.codec import encode_frame
from covey.transport.errors import (
    ErrorCode,
    LinkTimeout,
    PeerUnreachable,
    RefusedByPeer,
)
from covey.transport.frame import Frame
from covey.transport.messages import (
    AnyMessage,
    CloseSession,
    Failure,
    OpenSession,
    SessionOpened,
)
from support.node_core import (
    LINK_S,
    PEERS,
    CoreNode,
    Net,
    in_virtual_time,
    rows,
    settled,
    wire,
)

A, B = PEERS[:2]
OPEN = OpenSession(session="s", plan="0" * 64, epoch=0, stage_idx=0, n_tokens=1, previous=A, next=A)
OPENED = SessionOpened(session="s")


def close(n: int) -> CloseSession:
    return CloseSession(session=str(n))


def noted(node: CoreNode) -> list[tuple[str, str, int]]:
    """(sender, session, tensors) of each CloseSession from now on."""
    seen: list[tuple[str, str, int]] = []
    node.switch.on_message(
        CloseSession,
        lambda sender, message, tensors: seen.append((sender, message.session, len(tensors))),
    )
    return seen


@pytest.mark.parametrize("to", [A, B])
@in_virtual_time
async def test_one_way_messages_reach_their_handler_in_order(to: str) -> None:
    async with Net(2) as (a, b):
        seen = noted({A: a, B: b}[to])
        for n in range(5):
            await a.switch.send(to, close(n), wire(rows(1)) if n == 4 else None)
        await asyncio.sleep(2 * LINK_S)
        assert seen == [(A, str(n), int(n == 4)) for n in range(5)]


@pytest.mark.parametrize("to", [A, B])
@in_virtual_time
async def test_a_request_is_answered(to: str) -> None:
    async def answer(sender: str, message: OpenSession) -> AnyMessage:
        assert (sender, message) == (A, OPEN)
        await asyncio.sleep(1)
        return OPENED

    async with Net(2) as (a, b):
        {A: a, B: b}[to].switch.on_request(OpenSession, answer)
        assert await a.switch.request(to, OPEN, timeout_s=2) == OPENED


@pytest.mark.parametrize("to", [A, B])
@pytest.mark.parametrize("is_plain", [True, False])
@in_virtual_time
async def test_an_error_becomes_its_code_and_nothing_else(to: str, is_plain: bool) -> None:
    async def answer(_: str, __: OpenSession) -> AnyMessage:
        raise CacheFull(needed_bytes=123456, free_bytes=0)

    def plain(_: str, __: OpenSession) -> object:
        raise CacheFull(needed_bytes=123456, free_bytes=0)

    async with Net(2) as (a, b):
        node = {A: a, B: b}[to]
        node.switch.on_request(OpenSession, plain if is_plain else answer)  # type: ignore[arg-type]
        with pytest.raises(RefusedByPeer) as caught:
            await a.switch.request(to, OPEN, timeout_s=1)
        assert caught.value.code is ErrorCode.CACHE_FULL
        assert "123456" not in str(caught.value)
        assert a.lost == b.lost == []


@in_virtual_time
async def test_a_bug_in_a_handler_is_answered_at_once_and_costs_nothing_else() -> None:
    async def bug(_: str, __: OpenSession) -> AnyMessage:
        raise ValueError("a secret")

    async with Net(2) as (a, b):
        b.switch.on_request(OpenSession, bug)
        with pytest.raises(RefusedByPeer) as caught:
            await a.switch.request(B, OPEN, timeout_s=1)
        assert caught.value.code is ErrorCode.INTERNAL
        assert a.clock() < 3 * LINK_S
        b.switch.on_request(OpenSession, _opened)
        assert await a.switch.request(B, OPEN, timeout_s=1) == OPENED


async def _opened(_: str, __: OpenSession) -> AnyMessage:
    return OPENED


@in_virtual_time
async def test_the_handler_of_a_request_is_called_before_later_frames_are_handed_out() -> None:
    async with Net(2) as (a, b):
        seen = noted(b)

        def handler(sender: str, message: OpenSession) -> object:
            seen.append((sender, message.session, -1))
            return _opened(sender, message)

        b.switch.on_request(OpenSession, handler)  # type: ignore[arg-type]
        request = asyncio.create_task(a.switch.request(B, OPEN, timeout_s=1))
        await asyncio.sleep(0)
        await a.switch.send(B, close(1))
        await request
        assert [n for _, _, n in seen] == [-1, 0]


@pytest.mark.parametrize("to", [A, B])
@in_virtual_time
async def test_a_request_that_nobody_takes_is_refused(to: str) -> None:
    async with Net(2) as (a, b):
        for node in (a, b):
            noted(node)  # as a one-way message it would be taken
        with pytest.raises(RefusedByPeer) as caught:
            await a.switch.request(to, close(1), timeout_s=1)
        assert caught.value.code is ErrorCode.UNKNOWN_MESSAGE


@in_virtual_time
async def test_a_one_way_message_that_nobody_takes_ends_the_link() -> None:
    async with Net(2) as (a, b):
        await a.switch.send(B, OPENED)
        await asyncio.sleep(3 * LINK_S)
        [(_, error)] = a.lost
        assert isinstance(error, RefusedByPeer)
        assert error.code is ErrorCode.UNKNOWN_MESSAGE
        assert len(b.lost) == 1


@pytest.mark.parametrize("to", [A, B])
@in_virtual_time
async def test_no_answer_in_time_is_a_timeout(to: str) -> None:
    was_cancelled = []

    async def slow(_: str, __: OpenSession) -> AnyMessage:
        try:
            await asyncio.sleep(100)
        finally:
            was_cancelled.append(True)
        return OPENED

    async with Net(2) as (a, b):
        {A: a, B: b}[to].switch.on_request(OpenSession, slow)
        with pytest.raises(LinkTimeout):
            await a.switch.request(to, OPEN, timeout_s=1)
        assert a.clock() == 1
        # One's own handler is cancelled with the request; a peer's runs on until its link ends.
        assert bool(was_cancelled) == (to == A)


@in_virtual_time
async def test_a_peer_without_a_path_is_unreachable() -> None:
    async with Net(1) as [a]:
        with pytest.raises(PeerUnreachable):
            await a.switch.send(B, close(1))
        with pytest.raises(PeerUnreachable):
            await a.switch.request(B, OPEN, timeout_s=1)


@in_virtual_time
async def test_closing_answers_what_is_open_with_shutting_down() -> None:
    async def slow(_: str, __: OpenSession) -> AnyMessage:
        await asyncio.sleep(100)
        return OPENED

    async with Net(2) as (a, b):
        b.switch.on_request(OpenSession, slow)
        request = asyncio.create_task(a.switch.request(B, OPEN, timeout_s=10))
        await asyncio.sleep(2 * LINK_S)
        await b.switch.aclose()
        with pytest.raises(RefusedByPeer) as caught:
            await request
        assert caught.value.code is ErrorCode.SHUTTING_DOWN
        assert a.clock() < 4 * LINK_S


@in_virtual_time
async def test_a_request_after_the_close_begins_nothing() -> None:
    # The coroutine that the handler made must be closed too, or Python warns of it.
    async with Net(2) as (a, b):
        await b.switch.aclose()
        b.switch.on_request(OpenSession, _opened)
        with pytest.raises(LinkTimeout):
            await a.switch.request(B, OPEN, timeout_s=1)
        await settled()


def test_an_error_without_a_code_is_internal_and_its_text_stays_here() -> None:
    class Homemade(CoveyError):
        code = "not one of the wire's"

    assert code_of(Homemade("/home/alice")) is ErrorCode.INTERNAL
    header, _ = encode_frame(Frame(message=Failure(code=code_of(Homemade("/home/alice")))))
    assert b"alice" not in header


def test_the_switch_needs_no_peer_to_talk_to_itself() -> None:
    async def never(_: str) -> object:
        raise AssertionError

    async def talk() -> None:
        switch = Switch(A, never)  # type: ignore[arg-type]
        switch.on_request(OpenSession, _opened)
        assert await switch.request(A, OPEN, timeout_s=1) == OPENED

    asyncio.run(talk())
