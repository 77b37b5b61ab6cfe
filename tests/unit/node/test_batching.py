"""Which steps of several sessions are run together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import pytest

from covey.errors import CoveyError
from covey.node.batching import WAIT_SHARE, Batcher
from covey.node.worker import Worker, WorkerClosed
from support.node_core import InlineWorker, in_virtual_time, settled


class Doubler:
    """Doubles numbers and writes batches down; a number below zero is an error."""

    def __init__(self, worker: Worker, n_groups: int = 1) -> None:
        self.batches: list[list[int]] = []
        loop = asyncio.get_running_loop()
        self.batcher = Batcher(worker, self._run, n_groups=n_groups, clock=loop.time)

    def _run(self, values: Sequence[int]) -> list[int | CoveyError]:
        self.batches.append(list(values))
        if 1000 in values:
            raise CoveyError("the engine broke")
        return [2 * value if value >= 0 else CoveyError("below zero") for value in values]

    async def alone(self, session: str, value: int) -> int:
        return (await self.batcher.submit(session, value)).value


@pytest.fixture
def thread() -> Iterator[Worker]:
    worker = Worker("test-batches")
    yield worker
    worker.close()


@in_virtual_time
async def test_what_comes_in_one_turn_of_the_loop_is_one_batch() -> None:
    it = Doubler(InlineWorker())
    results = await asyncio.gather(*(it.alone(name, n) for n, name in enumerate("abc", 1)))
    assert results == [2, 4, 6]
    assert it.batches == [[1, 2, 3]]


@in_virtual_time
async def test_what_comes_while_the_worker_is_busy_joins_the_batch_that_waits_for_it() -> None:
    worker = InlineWorker()
    worker.is_held = True
    it = Doubler(worker)
    first = it.batcher.submit("a", 1)
    await settled()
    second = it.batcher.submit("b", 2)
    worker.release()
    assert [(await first).value, (await second).value] == [2, 4]
    assert it.batches == [[1, 2]]


@in_virtual_time
async def test_a_step_waits_a_little_for_the_other_sessions_of_the_moment() -> None:
    it = Doubler(InlineWorker())
    await asyncio.gather(it.alone("a", 1), it.alone("b", 2))
    step_s = 0.002  # what an InlineWorker says that a job takes
    early = it.batcher.submit("a", 3)
    await asyncio.sleep(WAIT_SHARE * step_s / 2)
    assert not early.done()
    assert await it.alone("b", 4) == 8
    assert it.batches == [[1, 2], [3, 4]]
    early = it.batcher.submit("a", 5)
    await asyncio.sleep(WAIT_SHARE * step_s)
    await settled()
    assert early.done()
    assert it.batches[2:] == [[5]]


@in_virtual_time
async def test_nobody_waits_for_a_session_that_has_ended() -> None:
    it = Doubler(InlineWorker())
    await asyncio.gather(it.alone("a", 1), it.alone("b", 2))
    it.batcher.forget("b")
    last = it.batcher.submit("a", 3)
    await settled()
    assert last.done()


@in_virtual_time
async def test_the_sessions_of_a_pipeline_form_a_group_for_each_stage() -> None:
    it = Doubler(InlineWorker(), n_groups=2)
    await asyncio.gather(it.alone("a", 1), it.alone("b", 2))
    half = it.batcher.submit("a", 3)
    await settled()
    assert half.done()


@in_virtual_time
async def test_an_error_of_one_step_is_its_own() -> None:
    it = Doubler(InlineWorker())
    results = await asyncio.gather(
        it.alone("a", 1), it.alone("b", -1), it.alone("c", 3), return_exceptions=True
    )
    assert [results[0], results[2]] == [2, 6]
    assert isinstance(results[1], CoveyError)


@in_virtual_time
async def test_an_error_of_the_engine_is_that_of_the_whole_batch_and_of_no_other() -> None:
    it = Doubler(InlineWorker())
    results = await asyncio.gather(it.alone("a", 1000), it.alone("b", 1), return_exceptions=True)
    assert [str(result) for result in results] == ["the engine broke"] * 2
    assert await it.alone("b", 2) == 4


@in_virtual_time
async def test_a_step_that_was_cancelled_is_not_run() -> None:
    worker = InlineWorker()
    worker.is_held = True
    it = Doubler(worker)
    futures = [it.batcher.submit(name, n) for n, name in enumerate("ab", 1)]
    await settled()
    futures[0].cancel()
    worker.release()
    assert (await futures[1]).value == 4
    assert it.batches == [[2]]


async def test_a_short_step_alone_runs_where_it_was_asked_for(thread: Worker) -> None:
    it = Doubler(thread)
    assert (await it.batcher.submit("a", 1, is_short=True)).value == 2  # nobody knows it yet
    future = it.batcher.submit("a", 2, is_short=True)
    assert future.done()
    assert future.result().value == 4
    many_rows = it.batcher.submit("a", 3)
    assert not many_rows.done()
    assert (await many_rows).value == 6


async def test_a_short_step_waits_for_the_worker_if_it_is_busy(thread: Worker) -> None:
    it = Doubler(thread)
    await it.batcher.submit("a", 1, is_short=True)
    job = thread.run(lambda: None)
    second = it.batcher.submit("a", 2, is_short=True)
    assert not second.done()
    await job
    assert (await second).value == 4


async def test_steps_fail_when_the_worker_is_closed(thread: Worker) -> None:
    it = Doubler(thread)
    thread.close()
    with pytest.raises(WorkerClosed):
        await it.alone("a", 1)
    with pytest.raises(WorkerClosed):
        await it.alone("a", 2)


@in_virtual_time
async def test_what_joins_a_batch_that_has_begun_has_waited_for_no_time() -> None:
    worker = InlineWorker()
    worker.is_held = True
    it = Doubler(worker)
    first = it.batcher.submit("a", 1)
    await asyncio.sleep(0.01)  # its job says later that it began before this
    second = it.batcher.submit("b", 2)
    worker.release()
    assert (await first).queue_s > 0
    assert (await second).queue_s == 0
