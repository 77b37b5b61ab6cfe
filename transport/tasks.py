"""Tasks with an owner: none is forgotten, and none outlives whoever started it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from covey.errors import CoveyError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Tasks:
    """The tasks of one component; unlike a `TaskGroup`, one that fails leaves the others alone.

    What a peer provokes must not end the node: an error that nobody foresaw is logged, with its
    traceback, and costs only its own task. Covey's own errors are for whoever awaits the task.
    """

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Start a task that `aclose` cancels; once the set is closed, it never begins."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        if self._is_closed:
            task.cancel()
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def join(self, timeout_s: float) -> None:
        """Let the running tasks end by themselves, at most for `timeout_s`."""
        if self._running:
            await asyncio.wait(self._running, timeout=timeout_s)

    async def aclose(self) -> None:
        """Cancel every task and wait until all have ended."""
        self._is_closed = True
        while self._running:
            for task in self._running:
                task.cancel()
            await asyncio.wait(self._running)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, CoveyError):
            logger.error("task %s failed", task.get_name(), exc_info=error)
