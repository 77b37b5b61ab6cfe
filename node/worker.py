"""The one thread that runs the engine, so that the event loop never waits long for a matrix.

Jobs run strictly one after the other in the order of submission; each reports how long it
waited and how long it ran. Handing a job over and its result back costs about as much as a small
model's step on a fast machine, so a caller that knows a job to be short may run it itself.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from covey.transport.errors import ErrorCode

from .errors import NodeError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """A job's result and its times in seconds."""

    value: T
    queue_s: float
    compute_s: float


class WorkerClosed(NodeError):
    """The node is stopping: the job was not run."""

    code = ErrorCode.SHUTTING_DOWN

    def __init__(self) -> None:
        super().__init__("this node is stopping")


class Worker:
    """Runs jobs on its own thread; `close` lets the running job end and drops the rest."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._is_closed = False
        self._n_submitted = 0  # written by the loop only
        self._n_ended = 0  # written by the thread only
        # A daemon, so that a job that never ends cannot keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def run(self, job: Callable[[], T]) -> asyncio.Future[Done[T]]:
        """Queue `job` for the thread, here and now, after all that was queued before.

        Returns:
            A future of its outcome. Cancelling it drops the job if it has not begun. It raises
            what `job` raises, or WorkerClosed if the worker was closed before the job began.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Done[T]] = loop.create_future()
        if self._is_closed:
            future.set_exception(WorkerClosed())
            return future
        submitted = time.perf_counter()

        def call() -> None:
            outcome = None if future.cancelled() else self._outcome(job, submitted)
            self._n_ended += 1  # before anybody hears of it and wants to run the next
            if outcome is not None:
                _post(loop, future, outcome)

        self._n_submitted += 1
        self._jobs.put(call)
        return future

    @property
    def is_idle(self) -> bool:
        """Whether no job runs or waits, so that `run_here` may be called."""
        return self._n_submitted == self._n_ended and not self._is_closed

    def run_here(self, job: Callable[[], T]) -> Done[T]:
        """Run a short job on the caller's own thread, the event loop's.

        Raises:
            RuntimeError: the worker is not idle.
        """
        if not self.is_idle:
            raise RuntimeError("the worker is not idle")
        started = time.perf_counter()
        value = job()
        return Done(value, 0.0, time.perf_counter() - started)

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop after the running job; waits at most `timeout_s` for it."""
        self._is_closed = True
        self._jobs.put(None)
        self._thread.join(timeout_s)

    def _outcome(self, job: Callable[[], T], submitted: float) -> Done[T] | BaseException:
        if self._is_closed:
            return WorkerClosed()
        started = time.perf_counter()
        try:
            value = job()
        except BaseException as error:  # noqa: BLE001  re-raised in the waiting task
            return error
        return Done(value, started - submitted, time.perf_counter() - started)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # or the weights that the last job used would live until the next one comes


def _post(
    loop: asyncio.AbstractEventLoop,
    future: asyncio.Future[Done[T]],
    outcome: Done[T] | BaseException,
) -> None:
    def settle() -> None:
        if future.done():
            return
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    # The loop may be gone when the node stops while a job runs; nobody waits then.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(settle)
