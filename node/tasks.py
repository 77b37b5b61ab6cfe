"""Short tasks with an owner: nothing runs on after the owner has closed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)


class Tasks:
    """A set of running tasks. Unlike a `TaskGroup`, one that fails does not end the others.

    A failure that nobody foresaw is logged with its traceback; it is a bug, not an event.
    """

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Start a task that this set owns; once the set is closed, it never begins."""
        task = asyncio.create_task(work, name=name)
        if self._is_closed:
            task.cancel()
        self._running.add(task)
        task.add_done_callback(self._finished)
        return task

    async def join(self, timeout_s: float) -> None:
        """Let the running tasks end by themselves, at most for `timeout_s`."""
        if self._running:
            await asyncio.wait(self._running, timeout=timeout_s)

    async def aclose(self) -> None:
        """Cancel what runs and wait until it has ended."""
        self._is_closed = True
        while self._running:
            for task in self._running:
                task.cancel()
            await asyncio.wait(self._running)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("task %s failed", task.get_name(), exc_info=error)
