"""The seam between asyncio and trio: cancellation both ways, crashes, and the end of the thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from covey.transport.control_records import ControlError, RecordRejected
from covey.transport.trio_thread import TrioThread

NAME = "test-seam"


class Resource:
    """Records what happens to the trio side."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.left = threading.Event()
        self.is_closed = False

    async def wait_for_ever(self) -> None:
        self.entered.set()
        try:
            await trio.sleep_forever()
        finally:
            self.left.set()

    async def crash(self) -> None:
        async def burst() -> None:
            raise KeyError("burst pipe")

        trio.lowlevel.spawn_system_task(burst)
        await trio.sleep_forever()


@asynccontextmanager
async def opened(resource: Resource) -> AsyncIterator[Resource]:
    try:
        yield resource
    finally:
        resource.is_closed = True


@asynccontextmanager
async def running() -> AsyncIterator[tuple[TrioThread[Resource], Resource]]:
    resource = Resource()
    thread = TrioThread(NAME, lambda: opened(resource))
    assert await thread.start() is resource
    try:
        yield thread, resource
    finally:
        await thread.aclose()
        assert NAME not in {each.name for each in threading.enumerate()}


async def test_a_call_returns_what_the_trio_side_returns() -> None:
    async def add() -> int:
        await trio.lowlevel.checkpoint()
        return 1 + 1

    async with running() as (thread, _):
        assert await thread.call(add, operation="add", deadline_s=5) == 2


async def test_closing_closes_the_resource_and_ends_the_thread() -> None:
    async with running() as (thread, resource):
        await thread.aclose()
        assert resource.is_closed
        assert await thread.closed is None
        with pytest.raises(ControlError, match="is closed"):
            await thread.call(resource.wait_for_ever, operation="wait", deadline_s=5)


async def test_cancelling_the_call_cancels_the_trio_side() -> None:
    async with running() as (thread, resource):
        call = asyncio.ensure_future(
            thread.call(resource.wait_for_ever, operation="wait", deadline_s=30)
        )
        assert await asyncio.to_thread(resource.entered.wait, 5)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert resource.left.wait(5)


async def test_a_call_beyond_its_deadline_is_cancelled_and_named() -> None:
    async with running() as (thread, resource):
        with pytest.raises(ControlError, match=r"lookup took longer than 0\.05 s"):
            await thread.call(resource.wait_for_ever, operation="lookup", deadline_s=0.05)
        assert resource.left.wait(5)


async def test_closing_fails_the_calls_under_way() -> None:
    async with running() as (thread, resource):
        call = asyncio.ensure_future(
            thread.call(resource.wait_for_ever, operation="wait", deadline_s=30)
        )
        assert await asyncio.to_thread(resource.entered.wait, 5)
        await thread.aclose()
        with pytest.raises(ControlError, match="is closed"):
            await call
        assert resource.left.is_set()


async def test_our_own_errors_pass_as_they_are_and_others_become_the_cause() -> None:
    async def refuse() -> None:
        raise RecordRejected("it has expired")

    async def fall() -> None:
        raise ZeroDivisionError("by zero")

    async with running() as (thread, _):
        with pytest.raises(RecordRejected):
            await thread.call(refuse, operation="refuse", deadline_s=5)
        with pytest.raises(ControlError, match="ZeroDivisionError: by zero") as caught:
            await thread.call(fall, operation="fall", deadline_s=5)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


async def test_a_crash_fails_the_calls_under_way_and_all_later_ones() -> None:
    async with running() as (thread, resource):
        with pytest.raises(ControlError, match="crashed: KeyError: 'burst pipe'"):
            await thread.call(resource.crash, operation="crash", deadline_s=5)
        assert "burst pipe" in str(await thread.closed)
        with pytest.raises(ControlError, match="crashed: KeyError: 'burst pipe'"):
            await thread.call(resource.wait_for_ever, operation="wait", deadline_s=5)


async def test_a_resource_that_cannot_be_opened_says_why() -> None:
    def listen() -> None:
        raise ControlError("the port is taken")

    @asynccontextmanager
    async def taken() -> AsyncIterator[None]:
        async with trio.open_nursery():
            listen()
        yield

    thread = TrioThread(NAME, taken)
    with pytest.raises(ControlError, match="the port is taken"):
        await thread.start()
    await thread.aclose()
    assert NAME not in {each.name for each in threading.enumerate()}


async def test_cancelling_the_start_ends_the_thread() -> None:
    entered = threading.Event()

    @asynccontextmanager
    async def slow() -> AsyncIterator[None]:
        entered.set()
        await trio.Event().wait()
        yield

    thread = TrioThread(NAME, slow)
    start = asyncio.ensure_future(thread.start())
    assert await asyncio.to_thread(entered.wait, 5)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await thread.aclose()
    assert NAME not in {each.name for each in threading.enumerate()}
