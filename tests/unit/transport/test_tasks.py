"""Short tasks with an owner."""

from __future__ import annotations

import asyncio
import logging

import pytest

from covey.transport.tasks import Tasks
from support.node_core import in_virtual_time


@in_virtual_time
async def test_one_that_fails_is_logged_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tasks, ended = Tasks(), asyncio.Event()

    async def fail() -> None:
        raise ValueError("a bug")

    async def live() -> None:
        await asyncio.sleep(1)
        ended.set()

    tasks.spawn(fail(), "the one that fails")
    tasks.spawn(live(), "the other")
    await ended.wait()
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert "the one that fails" in record.getMessage()
    assert record.exc_info is not None


@in_virtual_time
async def test_joining_waits_for_the_end_but_not_for_ever() -> None:
    tasks = Tasks()
    now = asyncio.get_running_loop().time
    slow = tasks.spawn(asyncio.sleep(10), "slow")
    await tasks.join(timeout_s=1)
    assert (now(), slow.done()) == (1, False)
    await tasks.join(timeout_s=100)
    assert (now(), slow.done()) == (10, True)
    await tasks.join(timeout_s=100)
    assert now() == 10


@in_virtual_time
async def test_closing_ends_even_those_that_start_others_on_their_way() -> None:
    tasks, ended = Tasks(), []

    async def stubborn(depth: int) -> None:
        try:
            await asyncio.sleep(100)
        finally:
            if depth:
                tasks.spawn(stubborn(depth - 1), "child")
            await asyncio.sleep(1)
            ended.append(depth)

    tasks.spawn(stubborn(2), "first")
    await asyncio.sleep(1)
    await tasks.aclose()
    # The children were spawned by a set that is closed: they never began.
    assert ended == [2]
    assert asyncio.all_tasks() == {asyncio.current_task()}


@in_virtual_time
async def test_what_is_spawned_after_the_close_never_begins() -> None:
    tasks = Tasks()
    await tasks.aclose()
    began = []

    async def work() -> None:
        began.append(True)

    task = tasks.spawn(work(), "late")
    await asyncio.wait({task})
    assert task.cancelled()
    assert began == []
