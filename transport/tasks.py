"""Tasks with an owner: none is forgotten, and none outlives whoever started it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from covey.errors import CoveyError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class TaskSet:
    """The tasks of one component; unlike a task group, one that fails leaves the others alone.

    What a peer provokes must not end the node: an error nobody expected is logged, with its
    traceback, and costs only its own task.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task that `aclose` will cancel if it has not ended by then."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def aclose(self) -> None:
        """Cancel every task and wait until all have ended."""
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, CoveyError):
            logger.error("task failed", exc_info=error, extra={"task": task.get_name()})
