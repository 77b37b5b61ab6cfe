"""One generation over HTTP: the shell between a `Service` generator and an ASGI connection.

The generator is opened, advanced and closed in one task, so its own timeouts and task groups may
span its yields. It is closed at once when the client goes away, when the client takes nothing for
`WRITE_STALL_S`, or when the node stops. Up to the first event an error still has a status of
its own; after that it is the last event of the stream, and `[DONE]` does not follow.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from covey.errors import CoveyError
from covey.node.errors import NotReady, SessionFailed
from covey.node.service import Delta, Event, Finished, GenerationRequest, Service, Started

from .errors import reply_to
from .metrics import Metrics
from .render import DONE, KEEP_ALIVE, Renderer, sse

logger = logging.getLogger(__name__)

WRITE_STALL_S = 60.0  # a client that takes no byte for so long holds a session for nothing

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
]


class Generations:
    """The generations in flight, so that a stopping node can end them with a reason."""

    def __init__(self) -> None:
        self._deadlines: set[asyncio.Timeout] = set()
        self._is_stopping = False

    def stop(self) -> None:
        """End every generation now, and refuse new ones."""
        if self._is_stopping:
            return
        self._is_stopping = True
        for deadline in self._deadlines:
            deadline.reschedule(0.0)  # any instant in the past

    @asynccontextmanager
    async def track(self, model: str) -> AsyncIterator[None]:
        """Run a generation's body.

        Raises:
            NotReady: the node is stopping.
            SessionFailed: the node stopped meanwhile; the body was cancelled.
        """
        if self._is_stopping:
            raise NotReady(model, "the node is stopping")
        deadline = asyncio.timeout(None)
        try:
            async with deadline:
                self._deadlines.add(deadline)
                yield
        except TimeoutError:
            if not deadline.expired():
                raise
            raise SessionFailed("shutting_down", "the node is stopping") from None
        finally:
            self._deadlines.discard(deadline)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a generation's answer needs."""

    service: Service
    metrics: Metrics
    generations: Generations
    request: GenerationRequest
    prompt_field: str  # what the route calls the prompt
    renderer: Callable[[Started], Renderer]
    is_stream: bool
    keepalive_s: float


class GenerationResponse(Response):
    """The answer to a request for text, streamed or whole."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self._task = task

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, until done or the client is gone."""
        writer = _Writer(send)
        async with asyncio.TaskGroup() as group:
            answer = group.create_task(self._answer(writer, scope, receive))
            gone = group.create_task(_disconnected(receive))
            stalled = group.create_task(writer.stalled())
            beat = group.create_task(writer.keep_alive(self._task.keepalive_s))
            await asyncio.wait((answer, gone, stalled), return_when=asyncio.FIRST_COMPLETED)
            for task in (answer, gone, stalled, beat):
                task.cancel()

    async def _answer(self, writer: _Writer, scope: Scope, receive: Receive) -> None:
        task, outcome = self._task, "cancelled"
        task.metrics.active.inc()
        try:
            outcome = await self._generate(writer)
        except CoveyError as error:
            reply = reply_to(error, prompt_field=task.prompt_field)
            if reply.status == 500:  # nobody promised it, so somebody should look
                logger.exception("generation failed unexpectedly")
            outcome = "failed" if reply.status >= 500 else "refused"
            if writer.is_started:
                await writer.write(sse(reply.body()))
                await writer.end()
            else:
                refusal = JSONResponse(reply.body(), reply.status, reply.headers())
                await refusal(scope, receive, writer.send)
        finally:
            task.metrics.active.dec()
            task.metrics.generations.labels(outcome).inc()

    async def _generate(self, writer: _Writer) -> str:
        """Run it and write the answer; returns why it ended."""
        task = self._task
        deltas: list[Delta] = []
        async with (
            task.generations.track(task.request.model),
            aclosing(task.service.generate(task.request)) as events,
        ):
            renderer = await self._admitted(events)
            if task.is_stream:
                await writer.start(STREAM_HEADERS)
                await writer.write(b"".join(map(sse, renderer.opening())))
            async for event in events:
                if isinstance(event, Finished):
                    finished = event
                    break
                delta = self._counted(event)
                if not task.is_stream:
                    deltas.append(delta)
                elif chunks := renderer.delta(delta):
                    await writer.write(b"".join(map(sse, chunks)))
            else:
                raise RuntimeError("a generation ended without saying why")
        # Closed before the last words: whoever asks again at once finds the place free.
        task.metrics.observe(finished)
        if task.is_stream:
            await writer.write(b"".join(map(sse, renderer.closing(finished))) + DONE)
        else:
            whole = JSONResponse(renderer.whole(deltas, finished))
            await writer.start(whole.raw_headers)
            await writer.write(bytes(whole.body))
        await writer.end()
        return finished.reason

    async def _admitted(self, events: AsyncGenerator[Event, None]) -> Renderer:
        event = await anext(events)
        if not isinstance(event, Started):
            raise TypeError(f"a generation began with {type(event).__name__}")
        self._task.metrics.prompt_tokens.inc(event.prompt_tokens)
        return self._task.renderer(event)

    def _counted(self, event: Event) -> Delta:
        if not isinstance(event, Delta):
            raise TypeError(f"a generation went on with {type(event).__name__}")
        self._task.metrics.tokens.inc()
        return event


class _Writer:
    """The sending half of an ASGI connection, with the clock of its silences."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self.is_started = False
        self._began = asyncio.Event()  # a body may follow
        self._is_ended = False
        self._lock = asyncio.Lock()
        self._stalled = asyncio.Event()
        self._written_at = 0.0  # loop time

    async def start(self, headers: list[tuple[bytes, bytes]]) -> None:
        self.is_started = True
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        self._began.set()

    async def write(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        self._is_ended = True

    async def stalled(self) -> None:
        """Return when the client took nothing for `WRITE_STALL_S`."""
        await self._stalled.wait()

    async def keep_alive(self, interval_s: float) -> None:
        """Write a comment whenever nothing was written for `interval_s`; ends with the answer."""
        await self._began.wait()
        now = asyncio.get_running_loop().time
        while not self._is_ended:
            idle_s = now() - self._written_at
            if idle_s < interval_s:
                await asyncio.sleep(interval_s - idle_s)
            else:
                await self.write(KEEP_ALIVE)

    async def _send(self, message: Message) -> None:
        loop = asyncio.get_running_loop()
        async with self._lock:
            if self._is_ended:  # while a keep-alive waited
                return
            timer = loop.call_later(WRITE_STALL_S, self._stalled.set)
            try:
                await self.send(message)
            finally:
                timer.cancel()
        self._written_at = loop.time()


async def _disconnected(receive: Receive) -> None:
    """Return when the client is gone; the request's body was read before."""
    while (await receive())["type"] != "http.disconnect":
        pass
