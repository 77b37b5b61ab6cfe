"""The one thread that runs the engine, so that the event loop never waits for a matrix.

Jobs run strictly one after the other in the order of submission; each reports how long it
waited and how long it ran. Torch's own threads are set once, before the first job.
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
            if future.cancelled():
                return
            if self._is_closed:
                _post(loop, future, WorkerClosed())
                return
            started = time.perf_counter()
            try:
                value = job()
            except BaseException as error:  # noqa: BLE001  re-raised in the waiting task
                _post(loop, future, error)
                return
            ended = time.perf_counter()
            _post(loop, future, Done(value, started - submitted, ended - started))

        self._jobs.put(call)
        return future

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop after the running job; waits at most `timeout_s` for it."""
        self._is_closed = True
        self._jobs.put(None)
        self._thread.join(timeout_s)

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
