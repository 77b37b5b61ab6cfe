"""A peer as the rest of the node sees it: requests and answers, heartbeats, and what comes unasked.

Knows no kind of link and no session. Frames are handed to the handler one after the other, in the
order they came, by the one task that reads the link: the handler is a plain function, must not
block, and starts a task of its own for anything that waits. Answers and Pings never wait for it.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import count

from .errors import (
    LinkBroken,
    LinkClosed,
    LinkTimeout,
    PeerLeft,
    ProtocolViolation,
    RefusedByPeer,
    TransportError,
)
from .frame import Frame, Tensor
from .link import Link, LinkKind, Packets
from .liveness import Action, Liveness, LivenessRules
from .messages import AnyMessage, Failure, Goodbye, Ping, Pong

Handler = Callable[["Peer", Frame], None]

_MIN_RTT_PROBES, _MAX_RTT_PROBES = 5, 15
_RTT_PROBES_S = 0.1  # after so long the least number is enough
_PROBE_BYTES = (32 << 10, 256 << 10, 1 << 20, 4 << 20)
# A probe that took this long has left slow start behind: it takes some round trips, too.
_PROBE_ENOUGH_S, _PROBE_ENOUGH_ROUND_TRIPS = 0.25, 8
_MEASURE_DEADLINE_S = 10.0
_CHECK_S, _CHECK_UNKNOWN_S = 0.5, 1.0  # beside some round trips; where none was measured
_CHECK_ROUND_TRIPS = 4
_LAG_S = 0.25  # woken later than this, it was we who stood still


class Peer:
    """One live peer; `Mesh` makes it, runs it and forgets it when its link has ended."""

    def __init__(
        self,
        link: Link,
        handler: Handler,
        *,
        rules: LivenessRules | None = None,
        clock: Callable[[], float] = time.perf_counter,  # uvloop's own counts milliseconds
    ) -> None:
        self.peer_id = link.peer_id
        self.error: TransportError | None = None  # why it ended
        self._link = link
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._liveness = Liveness(now=self._loop.time(), rules=rules)
        self._seen_bytes = 0
        self._holds = 0
        self._woken = asyncio.Event()
        self._numbers = count(1)
        self._waiting: dict[int, asyncio.Future[Frame]] = {}
        self._pings: dict[int, float] = {}  # heartbeats on their way: number -> sent at

    @property
    def kind(self) -> LinkKind:
        """What carries the link now."""
        return self._link.kind

    @property
    def remote_host(self) -> str | None:
        """The IP address that the peer, or its router, has to us; None where a relay is between."""
        remote = self._link.remote
        return None if remote is None else remote[0]

    @property
    def dialled_address(self) -> tuple[str, int] | None:
        """Where we dialled the peer and found it; None if it dialled us, or by way of a relay."""
        return self._link.remote if self._link.is_dialer else None

    @property
    def rtt_s(self) -> float | None:
        """Smoothed round-trip time; None before the first answer."""
        return self._liveness.srtt_s

    @property
    def least_rtt_s(self) -> float | None:
        """The quickest of the last round trips; None before the first answer."""
        return self._liveness.least_rtt_s

    @property
    def busy(self) -> bool:
        """Whether a session depends on this link."""
        return self._holds > 0

    @property
    def is_needed(self) -> bool:
        """Whether a session depends on this link here, or something does at the peer."""
        return self._liveness.is_needed(now=self._loop.time())

    @property
    def bytes_sent(self) -> int:
        """Bytes sent on the link so far."""
        return self._link.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Bytes received on the link so far."""
        return self._link.bytes_received

    @property
    def packets(self) -> Packets | None:
        """Packets of the link's carrier, and how many of them were lost, where that is known."""
        return self._link.packets

    def moved(self) -> None:
        """The link has another carrier: what was measured of the old one says nothing of it."""
        self._pings.clear()
        self._liveness.moved(now=self._loop.time())
        self._woken.set()

    async def check(self) -> None:
        """Ask for a sign of life; without one soon, look for another way to the peer."""
        timeout_s = _CHECK_UNKNOWN_S
        if self.rtt_s is not None:
            timeout_s = _CHECK_S + _CHECK_ROUND_TRIPS * self.rtt_s
        try:
            await self.ping(timeout_s=timeout_s)
        except LinkTimeout:
            self._link.suspect()
        except TransportError:
            pass  # it has ended

    def hold(self) -> None:
        """A session begins to depend on the link: heartbeats each second, no closing when idle."""
        self._holds += 1
        self._liveness.set_busy(is_busy=True, now=self._loop.time())
        self._woken.set()

    def release(self) -> None:
        """The session that called `hold` has ended."""
        if self._holds == 0:
            raise ValueError("release without hold")
        self._holds -= 1
        self._liveness.set_busy(is_busy=self.busy, now=self._loop.time())

    async def send(self, message: AnyMessage, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Send a message that wants no answer; waits while the send buffer is full.

        Raises:
            LinkClosed, LinkBroken: the link ended; the message may or may not have arrived.
            FrameTooLarge: beyond a limit of the protocol.
        """
        self._liveness.used(now=self._loop.time())
        await self._link.send(Frame(message=message, tensors=tensors or {}))

    def post(self, message: AnyMessage) -> None:
        """As `send`, but without waiting: for small messages, from code that must not wait."""
        self._liveness.used(now=self._loop.time())
        self._link.post(Frame(message=message))

    def reply(self, frame: Frame, message: AnyMessage) -> None:
        """Answer a request; does not wait, so a handler may call it. Nothing if the link ended."""
        if frame.request is None:
            raise ValueError("the frame wants no answer")
        with suppress(TransportError):
            self._link.post(Frame(message=message, reply_to=frame.request))

    async def request(
        self,
        message: AnyMessage,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        timeout_s: float,
    ) -> Frame:
        """Send a message and wait for its answer.

        Raises:
            RefusedByPeer: the answer was a Failure.
            LinkTimeout: no answer within `timeout_s`; one that comes later is dropped.
            LinkClosed, LinkBroken, FrameTooLarge: as `send`.
        """
        if self.error is not None:
            raise self.error
        number = next(self._numbers)
        answer: asyncio.Future[Frame] = self._loop.create_future()
        self._waiting[number] = answer
        self._liveness.used(now=self._loop.time())
        try:
            async with asyncio.timeout(timeout_s):
                await self._link.send(Frame(message=message, tensors=tensors or {}, request=number))
                reply = await answer
        except TimeoutError as error:
            raise LinkTimeout(type(message).__name__, timeout_s) from error
        finally:
            self._waiting.pop(number, None)
            answer.cancel()
        if isinstance(reply.message, Failure):
            raise RefusedByPeer(reply.message.code)
        return reply

    async def ping(self, *, timeout_s: float, nbytes: int = 0) -> float:
        """Seconds a Ping with `nbytes` of ballast took to be answered. Raises as `request`."""
        tensors = {"ballast": Tensor("u8", (nbytes,), bytes(nbytes))} if nbytes else None
        started_at = self._clock()
        await self.request(Ping(), tensors, timeout_s=timeout_s)
        rtt_s = self._clock() - started_at
        if not nbytes:
            self._liveness.measured(rtt_s)
        return rtt_s

    async def measure(self) -> tuple[float, float]:
        """Round-trip time (s) and bandwidth towards the peer (bytes/s), by probes of up to 4 MB.

        Ballast goes one way only, and what comes back is small: on a link that is faster in one
        direction this is the direction towards the peer. The peer measures the other one.

        Raises:
            LinkTimeout: not even the smallest probe was answered within ten seconds.
            LinkClosed, LinkBroken: the link ended.
        """
        rtt_s = best = 0.0
        try:
            async with asyncio.timeout(_MEASURE_DEADLINE_S):
                rtt_s = await self._median_rtt_s()
                enough_s = _PROBE_ENOUGH_S + _PROBE_ENOUGH_ROUND_TRIPS * rtt_s
                for nbytes in _PROBE_BYTES:
                    took_s = await self.ping(timeout_s=_MEASURE_DEADLINE_S, nbytes=nbytes)
                    best = max(best, nbytes / max(took_s - rtt_s, 1e-6))
                    if took_s > enough_s:
                        break
        except TimeoutError as error:
            if not best:
                raise LinkTimeout("measurement", _MEASURE_DEADLINE_S) from error
        return rtt_s, best

    async def _median_rtt_s(self) -> float:
        rtts: list[float] = []
        while len(rtts) < _MIN_RTT_PROBES or (
            len(rtts) < _MAX_RTT_PROBES and sum(rtts) < _RTT_PROBES_S
        ):
            rtts.append(await self.ping(timeout_s=_MEASURE_DEADLINE_S))
        return statistics.median(rtts)

    async def run(self) -> TransportError:
        """Read the link until it ends; why it ended. Its owner calls this once, in a task."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._beat())
                error = await self._read()
                self._woken.set()  # the heartbeat ends too
        finally:
            if self.error is None:  # cancelled, or the handler raised
                self.abort(LinkClosed(by_peer=False))
        return error

    async def _read(self) -> TransportError:
        try:
            while True:
                self._dispatch(await self._link.receive())
        except ProtocolViolation as error:
            with suppress(TransportError):
                self._link.post(Frame(message=Failure(code=error.code)))
            await self._link.aclose()
            return self._fail(error)
        except TransportError as error:
            if isinstance(error, PeerLeft | RefusedByPeer):
                await self._link.aclose()
            return self._fail(error)

    def abort(self, error: TransportError) -> None:
        """End the link now; all who wait get `error`."""
        self._fail(error)
        self._link.abort(error)

    async def aclose(self) -> None:
        """Say goodbye, flush (bounded time), end the link."""
        with suppress(TransportError):
            self._link.post(Frame(message=Goodbye()))
        await self._link.aclose()

    def _dispatch(self, frame: Frame) -> None:
        now = self._loop.time()
        self._liveness.heard(now=now)
        self._seen_bytes = self._link.bytes_received
        if frame.reply_to is not None:
            self._answered(frame.reply_to, frame)
            return
        match frame.message:
            case Ping():
                self._liveness.peer_pinged(now=now)
                self._link.post(Frame(message=Pong(), reply_to=frame.request))
            case Pong():
                pass  # answers nothing: harmless
            case Goodbye():
                raise PeerLeft(by_peer=True)
            case Failure(code=code):
                raise RefusedByPeer(code)
            case _:
                self._liveness.used(now=now)
                self._handler(self, frame)

    def _answered(self, number: int, frame: Frame) -> None:
        sent_at = self._pings.pop(number, None)
        if sent_at is not None:
            self._liveness.measured(self._clock() - sent_at)
            return
        answer = self._waiting.pop(number, None)
        if answer is not None and not answer.done():
            answer.set_result(frame)

    def _fail(self, error: TransportError) -> TransportError:
        """Every waiter learns why; the first reason stays and is returned."""
        if self.error is None:
            self.error = error
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(error)
                    answer.exception()  # or one that failed in `send` already would be logged
            self._waiting.clear()
        return self.error

    async def _beat(self) -> None:
        """Do what `Liveness` says until the link ends."""
        while self.error is None:
            deadline = self._liveness.next_deadline()
            self._woken.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self._woken.wait()
            now = self._loop.time()
            if now - deadline > _LAG_S:
                self._liveness.excuse(now - deadline)
            if self._link.bytes_received != self._seen_bytes:  # part of a long frame counts
                self._seen_bytes = self._link.bytes_received
                self._liveness.heard(now=now)
            await self._act(self._liveness.next_action(now=now), now)

    async def _act(self, action: Action, now: float) -> None:
        match action:
            case Action.PING:
                number = next(self._numbers)
                self._pings = dict(list(self._pings.items())[-8:])  # answers may never come
                self._pings[number] = self._clock()
                self._liveness.pinged(now=now)
                with suppress(LinkClosed, LinkBroken):
                    self._link.post(Frame(message=Ping(), request=number))
            case Action.SUSPECT:
                self._liveness.heard(now=now)  # another silence as long, and it asks again
                self._link.suspect()
            case Action.CLOSE:
                await self._link.aclose()
            case Action.WAIT:
                pass
