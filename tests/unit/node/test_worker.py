"""The engine's thread: order, errors, cancelling and closing."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from covey.node.worker import Worker, WorkerClosed


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker("test-engine")
    yield made
    made.close()


def gate() -> tuple[threading.Event, threading.Event, Callable[[], None]]:
    """A job that says when it began and ends when it may."""
    began, may_end = threading.Event(), threading.Event()

    def job() -> None:
        began.set()
        assert may_end.wait(10)

    return began, may_end, job


async def test_jobs_run_on_one_other_thread_in_the_order_of_submission(worker: Worker) -> None:
    ran: list[int] = []
    threads: set[int] = set()

    def job(n: int) -> int:
        ran.append(n)
        threads.add(threading.get_ident())
        return n

    futures = [worker.run(lambda n=n: job(n)) for n in range(50)]  # type: ignore[misc]
    assert [(await future).value for future in reversed(futures)] == list(range(49, -1, -1))
    assert ran == list(range(50))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_a_job_reports_how_long_it_waited_and_ran(worker: Worker) -> None:
    began, may_end, first_job = gate()
    first, second = worker.run(first_job), worker.run(lambda: None)
    await asyncio.to_thread(began.wait)
    may_end.set()
    ran, waited = await first, await second
    assert 0 <= ran.queue_s <= waited.queue_s
    assert waited.queue_s >= ran.compute_s > 0


async def test_what_a_job_raises_is_raised_here_and_the_next_one_runs(worker: Worker) -> None:
    failing = worker.run(lambda: 1 // 0)
    after = worker.run(lambda: "still here")
    with pytest.raises(ZeroDivisionError):
        await failing
    assert (await after).value == "still here"


async def test_a_cancelled_job_is_dropped_if_it_has_not_begun(worker: Worker) -> None:
    began, may_end, first_job = gate()
    ran: list[str] = []
    first = worker.run(first_job)
    second = asyncio.ensure_future(worker.run(lambda: ran.append("second")))
    third = worker.run(lambda: ran.append("third"))
    await asyncio.to_thread(began.wait)
    second.cancel()
    may_end.set()
    await first
    await third
    assert ran == ["third"]


async def test_a_job_that_has_begun_ends_though_nobody_waits(worker: Worker) -> None:
    began, may_end, job = gate()
    ended = threading.Event()

    def whole() -> None:
        job()
        ended.set()

    future = worker.run(whole)
    await asyncio.to_thread(began.wait)
    future.cancel()
    may_end.set()
    await worker.run(lambda: None)
    assert ended.is_set()


async def test_closing_ends_the_running_job_and_refuses_the_rest(worker: Worker) -> None:
    began, may_end, job = gate()
    ran: list[str] = []
    running = worker.run(job)
    queued = worker.run(lambda: ran.append("queued"))
    await asyncio.to_thread(began.wait)
    closing = asyncio.create_task(asyncio.to_thread(worker.close))
    while not worker._is_closed:  # noqa: ASYNC110 - set by the closing thread
        await asyncio.sleep(0)
    may_end.set()
    await closing
    await running
    with pytest.raises(WorkerClosed):
        await queued
    with pytest.raises(WorkerClosed):
        await worker.run(lambda: ran.append("too late"))
    assert ran == []


async def test_closing_waits_no_longer_than_it_was_told(worker: Worker) -> None:
    began, may_end, job = gate()
    running = worker.run(job)
    await asyncio.to_thread(began.wait)
    worker.close(timeout_s=0.01)
    may_end.set()
    await running


def test_a_job_that_outlives_its_loop_harms_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crashes: list[object] = []
    monkeypatch.setattr(threading, "excepthook", crashes.append)
    worker = Worker("test-engine")
    began, may_end, job = gate()

    async def leave() -> None:
        worker.run(job)
        await asyncio.to_thread(began.wait)

    asyncio.run(leave())
    may_end.set()
    worker.close()
    assert crashes == []


async def test_an_idle_worker_keeps_nothing_of_its_last_job_alive(worker: Worker) -> None:
    # A closed session's job holds its engine, and that holds gigabytes of weights.
    class Weights:
        pass

    weights, gone = Weights(), asyncio.Event()
    loop = asyncio.get_running_loop()
    weakref.finalize(weights, lambda: loop.call_soon_threadsafe(gone.set))
    await worker.run(lambda weights=weights: None)  # type: ignore[misc]
    del weights
    with suppress(TimeoutError):
        await asyncio.wait_for(gone.wait(), 5)
    assert gone.is_set()
