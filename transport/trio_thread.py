"""A trio program in a thread of its own, called from asyncio; the seam between the two loops.

Knows nothing of what it runs. A call is cancelled on the trio side when its asyncio side is
cancelled or out of time, and every waiter is failed when the trio side ends, so no call outlives
its thread and none hangs. trio is imported in the thread, which keeps it out of everyone's start.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from covey.errors import CoveyError

from .control_records import ControlError

if TYPE_CHECKING:
    import outcome
    import trio

CLOSE_DEADLINE_S = 8.0  # the resource gets 3 s to part from its peers; then trio cancels the rest

T = TypeVar("T")
R = TypeVar("R")


@dataclass(eq=False, slots=True)
class _Job:
    """One call on its way: `done` belongs to the asyncio thread, `scope` to the trio thread."""

    function: Callable[[], Awaitable[Any]]
    done: asyncio.Future[Any]
    scope: trio.CancelScope | None = None

    def finish(self, value: object, error: BaseException | None) -> None:
        """Hand the result to the waiter, if it still waits."""
        if self.done.done():
            return
        if error is None:
            self.done.set_result(value)
        elif isinstance(error, CoveyError):
            self.done.set_exception(error)
        else:
            failure = ControlError(f"the control plane failed: {_describe(error)}")
            failure.__cause__ = error
            self.done.set_exception(failure)


class TrioThread(Generic[T]):
    """Opens one resource under trio and keeps it open until `aclose` or a crash.

    All methods belong to the asyncio loop that called `start`.
    """

    def __init__(self, name: str, opener: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self._opener = opener  # called in the thread, so that it may import there
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[T] = self._loop.create_future()
        self._jobs: set[_Job] = set()
        self._is_stopping = False
        # Written by the trio thread, read by both.
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope: trio.CancelScope | None = None
        self._nursery: trio.Nursery | None = None
        self.closed: asyncio.Future[ControlError | None] = self._loop.create_future()
        """Resolves when the thread has ended: to None after `aclose`, else to what went wrong."""

    async def start(self) -> T:
        """Start the thread and wait for the resource.

        Raises:
            ControlError: the resource could not be opened; the thread has ended.
        """
        self._thread.start()
        try:
            return await asyncio.shield(self._opened)
        finally:
            if not self._opened.done():  # cancelled while opening
                self._stop()

    async def call(
        self, function: Callable[[], Awaitable[R]], *, operation: str, deadline_s: float
    ) -> R:
        """Run `function` in the trio thread and return what it returns.

        Raises:
            ControlError: the thread has ended, ends before the call does, the call takes longer
                than `deadline_s`, or it raised something that is no CoveyError (its `__cause__`).
        """
        if self._token is None or self.closed.done() or self._is_stopping:
            raise self._why_closed()
        job = _Job(function, self._loop.create_future())
        self._jobs.add(job)
        try:
            async with asyncio.timeout(deadline_s):
                with suppress(RuntimeError):  # trio has ended: `_mark_ended` fails the job
                    self._token.run_sync_soon(self._spawn, job)
                result: R = await job.done
                return result
        except TimeoutError as error:
            raise ControlError(f"{operation} took longer than {deadline_s:g} s") from error
        finally:
            self._jobs.discard(job)
            if job.done.cancelled():
                with suppress(RuntimeError):
                    self._token.run_sync_soon(self._cancel, job)

    async def aclose(self) -> None:
        """Close the resource and wait for the thread to end; safe to call twice.

        Raises:
            ControlError: the thread is still there after CLOSE_DEADLINE_S.
        """
        self._stop()
        if self._thread.ident is None:
            return
        try:
            async with asyncio.timeout(CLOSE_DEADLINE_S):
                await asyncio.shield(self.closed)
        except TimeoutError as error:
            raise ControlError("the control plane does not stop; leaving its thread") from error
        self._thread.join(1.0)  # its very last instructions

    def _stop(self) -> None:
        # The thread sets its token before it reads the flag, so one of the two is seen.
        self._is_stopping = True
        if self._token is not None and self._scope is not None:
            with suppress(RuntimeError):
                self._token.run_sync_soon(self._scope.cancel)

    def _why_closed(self) -> ControlError:
        if self.closed.done():
            error = self.closed.result()
            if error is not None:
                failure = ControlError(str(error))
                failure.__cause__ = error
                return failure
        if self._token is None and not self._is_stopping:
            return ControlError("the control plane is not running")
        return ControlError("the control plane is closed")

    def _mark_opened(self, resource: T) -> None:
        if not self._opened.done():
            self._opened.set_result(resource)

    def _mark_ended(self, error: BaseException | None) -> None:
        """Fail every waiter; runs once, on the asyncio loop, as the thread's last act."""
        reason: ControlError | None = None
        if error is not None:
            cause = _first_cause(error)
            if isinstance(cause, ControlError):
                reason = cause
            else:
                reason = ControlError(f"the control plane crashed: {_describe(error)}")
                reason.__cause__ = error
        self.closed.set_result(reason)
        for job in self._jobs:
            if not job.done.done():
                job.done.set_exception(self._why_closed())
        if not self._opened.done():
            self._opened.set_exception(reason or self._why_closed())
            self._opened.exception()  # whoever started may have been cancelled: not "never seen"

    # --- in the trio thread ---------------------------------------------------------------------

    def _run(self) -> None:
        error: BaseException | None = ImportError("trio cannot be imported")
        try:
            import outcome

            result = outcome.capture(self._run_trio)
            error = result.error if isinstance(result, outcome.Error) else None
        finally:
            self._post(self._mark_ended, error)

    def _run_trio(self) -> None:
        import trio

        trio.run(self._main)

    async def _main(self) -> None:
        import trio

        with trio.CancelScope() as self._scope:
            self._token = trio.lowlevel.current_trio_token()
            if self._is_stopping:
                self._scope.cancel()
            async with self._opener() as resource:
                try:
                    async with trio.open_nursery() as self._nursery:
                        self._post(self._mark_opened, resource)
                        await trio.sleep_forever()
                finally:
                    self._nursery = None

    def _spawn(self, job: _Job) -> None:
        import trio

        if self._nursery is not None:  # else `_mark_ended` is about to fail the job
            job.scope = trio.CancelScope()
            self._nursery.start_soon(self._perform, job, job.scope)

    async def _perform(self, job: _Job, scope: trio.CancelScope) -> None:
        import outcome

        result: outcome.Value[Any] | outcome.Error | None = None
        with scope:
            result = await outcome.acapture(job.function)
        if isinstance(result, outcome.Error):
            # What is no Exception is (or holds) trio.Cancelled. To capture it is sound because the
            # task ends here: its waiter has gone, or `_mark_ended` is about to tell it why.
            if isinstance(result.error, Exception):
                self._post(job.finish, None, result.error)
        elif result is not None:
            self._post(job.finish, result.value, None)

    def _cancel(self, job: _Job) -> None:
        if job.scope is not None:
            job.scope.cancel()

    def _post(self, function: Callable[..., None], *args: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *args)


def _first_cause(error: BaseException) -> BaseException:
    """The first leaf of a group, without trio's own wrapping."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif type(error).__name__ == "TrioInternalError" and error.__cause__ is not None:
            error = error.__cause__
        else:
            return error


def _describe(error: BaseException) -> str:
    """One line on what went wrong."""
    cause = _first_cause(error)
    text = str(cause).splitlines()
    return f"{type(cause).__name__}: {text[0]}" if text else type(cause).__name__
