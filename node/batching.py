"""Steps of several sessions, run together: the weights are read once for all of them.

Whatever waits when the worker comes to it is one batch. Sessions whose steps come a little apart
would never meet in one, each taking its turn alone, so a batch that lacks sessions of the moment
waits for them for a part of the time that a batch takes. A short step that is alone runs at once
where it was asked for, without two changes of thread.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from covey.errors import CoveyError

from .worker import Done, Worker

T = TypeVar("T")
R = TypeVar("R")

WAIT_SHARE = 0.5  # of the last batch's time: the longest wait for sessions of the moment
RECENT_BATCHES = 4  # a session counts as one of the moment for so many times the batch's time
MAX_BATCH = 128  # items of one batch: the rest is next
SHORT_S = 0.003  # the longest step that may keep the event loop waiting


@dataclass(slots=True, eq=False)
class _Item(Generic[T, R]):
    value: T
    future: asyncio.Future[Done[R]]
    submitted_at: float
    is_short: bool


_Outcomes = Sequence[tuple[_Item[T, R], R | CoveyError]]


class Batcher(Generic[T, R]):
    """Collects items and runs them on the worker.

    Args:
        worker: whose thread computes.
        run: called there with the values of a batch; one outcome for each, in order.
        n_groups: into how many groups sessions fall by themselves: one per stage of a pipeline,
            since each stage works on another group at a time.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        worker: Worker,
        run: Callable[[Sequence[T]], Sequence[R | CoveyError]],
        *,
        n_groups: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._worker = worker
        self._run = run
        self._n_groups = n_groups
        self._clock = clock
        # Filled by the loop, emptied by the worker; both ends of a deque are safe for that.
        self._waiting: deque[_Item[T, R]] = deque()
        self._is_busy = False  # a job is queued, running, or not yet settled
        self._is_looking = False  # `_look` will be called in this turn of the loop
        self._timer: asyncio.TimerHandle | None = None
        self._seen_at: dict[str, float] = {}  # when a session's last item came
        self._batch_s = 0.0  # what the last batch took
        self._short_s = math.inf  # what the last short one took
        self._ended_at = -math.inf

    def submit(self, session: str, value: T, *, is_short: bool = False) -> asyncio.Future[Done[R]]:
        """Add an item; `is_short` says that it is one row and not many.

        Returns:
            A future that raises what `run` returned or raised, or WorkerClosed; it may be done
            already.
        """
        loop = asyncio.get_running_loop()
        item: _Item[T, R] = _Item(value, loop.create_future(), self._clock(), is_short)
        self._seen_at[session] = item.submitted_at
        self._waiting.append(item)
        if self._may_run_here(item):
            self._run_here()
        elif not self._is_busy and not self._is_looking:
            # What else comes in this turn of the loop comes too.
            self._is_looking = True
            loop.call_soon(self._look)
        return item.future

    def forget(self, session: str) -> None:
        """The session has ended: nobody waits for it."""
        self._seen_at.pop(session, None)

    def _may_run_here(self, item: _Item[T, R]) -> bool:
        return (
            item.is_short
            and self._short_s <= SHORT_S
            and len(self._waiting) == 1
            and not self._is_busy
            and self._worker.is_idle
            and self._n_expected(item.submitted_at) == 1
        )

    def _run_here(self) -> None:
        taken: list[_Item[T, R]] = []
        now = self._clock()
        try:
            self._hand_out(self._worker.run_here(lambda: self._compute(taken)), now)
        except CoveyError as error:
            self._fail(taken, error)

    def _look(self) -> None:
        self._is_looking = False
        if self._is_busy or not self._waiting:
            return
        now = self._clock()
        late_at = self._ended_at + WAIT_SHARE * self._batch_s
        if len(self._waiting) >= self._n_expected(now) or now >= late_at:
            self._queue()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(late_at - now, self._wait_is_over)

    def _wait_is_over(self) -> None:
        self._timer = None
        if self._waiting and not self._is_busy:
            self._queue()

    def _n_expected(self, now: float) -> int:
        """How many items a batch of the sessions of the moment has."""
        if len(self._seen_at) == 1:  # the common case
            return 1
        since = now - RECENT_BATCHES * self._n_groups * self._batch_s
        n_recent = sum(seen_at >= since for seen_at in self._seen_at.values())
        return math.ceil(n_recent / self._n_groups)

    def _queue(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._is_busy = True
        taken: list[_Item[T, R]] = []
        now = self._clock()
        self._worker.run(lambda: self._compute(taken)).add_done_callback(
            lambda done: self._settle(taken, done, now)
        )

    def _compute(self, taken: list[_Item[T, R]]) -> _Outcomes[T, R]:
        """On the worker's thread."""
        while self._waiting and len(taken) < MAX_BATCH:
            taken.append(self._waiting.popleft())
        items = [item for item in taken if not item.future.cancelled()]
        outcomes = self._run([item.value for item in items]) if items else []
        return list(zip(items, outcomes, strict=True))

    def _settle(
        self,
        taken: list[_Item[T, R]],
        done: asyncio.Future[Done[_Outcomes[T, R]]],
        queued_at: float,
    ) -> None:
        """On the loop: hand out what came of a job, or why none did."""
        self._is_busy = False
        error = done.exception()
        if error is not None:
            if not taken:  # the job never began: no other will
                taken.extend(self._waiting)
                self._waiting.clear()
            self._fail(taken, error)
        else:
            self._hand_out(done.result(), queued_at)
        self._look()

    def _fail(self, items: Sequence[_Item[T, R]], error: BaseException) -> None:
        for item in items:
            if not item.future.done():
                item.future.set_exception(error)

    def _hand_out(self, done: Done[_Outcomes[T, R]], queued_at: float) -> None:
        self._batch_s, self._ended_at = done.compute_s, self._clock()
        if len(done.value) == 1 and done.value[0][0].is_short:
            self._short_s = done.compute_s
        for item, outcome in done.value:
            if item.future.done():
                continue
            if isinstance(outcome, CoveyError):
                item.future.set_exception(outcome)
            else:
                # Below zero for one that came while the job was already taking its items.
                queue_s = max(0.0, done.queue_s + queued_at - item.submitted_at)
                item.future.set_result(Done(outcome, queue_s, done.compute_s))
