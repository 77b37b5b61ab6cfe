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
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """A job's result and its times in seconds."""

    value: T
    queue_s: float
    compute_s: float


class Worker:
    """Runs jobs on its own thread; `close` lets the running job end and drops the rest."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._is_closed = False
        # A daemon, so that a job that never ends cannot keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def run(self, job: Callable[[], T]) -> Done[T]:
        """Run `job` on the thread. Cancelling drops it if it has not begun.

        Raises:
            RuntimeError: the worker is closed.
            Anything that `job` raises.
        """
        if self._is_closed:
            raise RuntimeError("the worker is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Done[T]] = loop.create_future()
        submitted = time.perf_counter()

        def call() -> None:
            if future.cancelled():
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
        return await future

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop after the running job; waits at most `timeout_s` for it."""
        self._is_closed = True
        self._jobs.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


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
    if not loop.is_closed():
        loop.call_soon_threadsafe(settle)
