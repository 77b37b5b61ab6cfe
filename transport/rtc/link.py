"""A link over one ordered, reliable data channel.

A message on the channel is one byte that says what it is, and:

    0  up to `MESSAGE_BYTES` of the link's stream of segments, see `framing`
    1  8 bytes, big-endian: how many bytes of its stream the other end may have sent in all

The second is what a TCP window does for other links: the library hands over whatever comes, so a
reader that cannot keep up must be able to hold the sender back. At first it is `WINDOW_BYTES`.
An end on purpose is the stream's end word, and the other end answers it with its own: then all
that was sent has arrived, and the transport may go.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from contextlib import suppress
from typing import Protocol

from covey.transport.codec import decode_frame, encode_frame
from covey.transport.errors import (
    LinkBroken,
    LinkClosed,
    MalformedFrame,
    ProtocolViolation,
    TransportError,
)
from covey.transport.frame import Frame
from covey.transport.framing import END, FrameDecoder, FrameQueue, stream_of
from covey.transport.link import LinkKind
from covey.transport.messages import Failure

SEND_BUFFER_BYTES = 8 << 20  # `send` waits beyond this; one frame may always be queued
POST_BUFFER_BYTES = 1 << 20
RECEIVE_BUFFER_BYTES = 8 << 20  # the window stands still beyond this, and moves at half of it
RECEIVE_BUFFER_FRAMES = 1024
WINDOW_BYTES = 4 << 20  # on the way: 20 MB/s over a round trip of 200 ms
CLOSE_DEADLINE_S = 2.0  # to flush some of what was sent, and for the other end's goodbye
FLUSH_STEPS = 4  # how often some of it is enough: the library does a few MB/s
MESSAGE_BYTES = 32 << 10
CHANNEL_HIGH_BYTES = 256 << 10  # what a heartbeat may wait for inside the library
CHANNEL_LOW_BYTES = 128 << 10
_SEGMENT_BYTES = 64 << 10
_GRANT_BYTES = WINDOW_BYTES // 4  # the window moves in steps of at least this

_DATA, _GRANT = b"\x00", b"\x01"
_TOTAL = struct.Struct("!Q")


class Channel(Protocol):
    """What carries the messages."""

    @property
    def buffered_bytes(self) -> int:
        """Bytes that wait in the library."""

    def send(self, message: bytes) -> None:
        """Queue a message; one that cannot be sent any more is lost."""

    async def aclose(self) -> None:
        """End it now, in bounded time; the other end notices."""


class RtcLink:
    """A `Link` on a data channel; made by `open_rtc_link`."""

    kind = LinkKind.WEBRTC
    remote = None  # there may be a router in between for UDP only
    packets = None  # the library does not say

    def __init__(self, channel: Channel, *, peer_id: str, is_dialer: bool) -> None:
        self.peer_id = peer_id
        self.is_dialer = is_dialer
        self.bytes_sent = 0
        self.bytes_received = 0
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._lost: asyncio.Future[None] = self._loop.create_future()  # the carrier is gone
        self._over: asyncio.Future[None] = self._loop.create_future()  # both have said so, or lost
        self._error: TransportError | None = None  # why the link ended
        self._closing: asyncio.Task[None] | None = None
        # Out
        self._queue = FrameQueue(segment_bytes=_SEGMENT_BYTES)
        self._segment = memoryview(b"")  # what is left of the one under way
        self._sent_limit = WINDOW_BYTES
        self._senders: deque[asyncio.Future[None]] = deque()  # first come, first served
        self._flushed: asyncio.Future[None] | None = None
        # In
        self._decoder = FrameDecoder()
        self._received: deque[tuple[Frame, int]] = deque()
        self._received_bytes = 0
        self._received_limit = WINDOW_BYTES
        self._receiver: asyncio.Future[None] | None = None
        self._is_reading = True

    # --- Link ------------------------------------------------------------------------------

    async def send(self, frame: Frame) -> None:
        """See `Link.send`."""
        if self._senders or self._queue.nbytes > SEND_BUFFER_BYTES:
            await self._turn()
        self._enqueue(frame)
        self._wake_next_sender()

    def post(self, frame: Frame) -> None:
        """See `Link.post`."""
        if self._queue.posted_nbytes > POST_BUFFER_BYTES:
            self.abort(LinkBroken("the peer does not read its answers"))
        self._enqueue(frame, is_posted=True)

    async def receive(self) -> Frame:
        """See `Link.receive`."""
        while not self._received:
            if self._error is not None:
                raise self._error
            self._receiver = self._loop.create_future()
            try:
                await self._receiver
            finally:
                self._receiver = None
        frame, nbytes = self._received.popleft()
        self._received_bytes -= nbytes
        if not self._is_reading and self._received_bytes <= RECEIVE_BUFFER_BYTES // 2:
            self._is_reading = True
            self._grant()
        return frame

    def suspect(self) -> None:
        """See `Link.suspect`."""
        self.abort(LinkBroken("the peer has fallen silent"))

    def abort(self, error: TransportError) -> None:
        """See `Link.abort`."""
        self._received.clear()
        self._end(error)
        self._close(grace_s=0)

    async def aclose(self) -> None:
        """See `Link.aclose`."""
        try:
            await self._flush()
            self._hang_up(LinkClosed(by_peer=False))
        finally:
            self._end(LinkClosed(by_peer=False))
            self._close(grace_s=CLOSE_DEADLINE_S)
            if self._closing is not None:
                await asyncio.shield(self._closing)

    def raise_if_ended(self) -> None:
        """Raise why the link has ended already, if it has."""
        if self._error is not None:
            raise self._error

    # --- what the channel says -----------------------------------------------------------------

    def message_received(self, message: bytes | str) -> None:
        """A message came."""
        try:
            self._read(message)
        except ProtocolViolation as error:
            self._close_with(error)

    def buffer_low(self) -> None:
        """The library has room again."""
        self._pump()

    def channel_lost(self) -> None:
        """The channel or what carries it is gone."""
        self._end(LinkBroken("the connection to the peer was lost"))
        for ended in (self._lost, self._over):
            if not ended.done():
                ended.set_result(None)
        self._close(grace_s=0)

    # --- inside ------------------------------------------------------------------------------

    def _read(self, message: bytes | str) -> None:
        if isinstance(message, bytes):
            if message[:1] == _DATA and len(message) > 1:
                return self._take(memoryview(message)[1:])
            if message[:1] == _GRANT and len(message) == 1 + _TOTAL.size:
                return self._granted(_TOTAL.unpack_from(message, 1)[0])
        raise MalformedFrame("not a message of a link")

    def _take(self, data: memoryview) -> None:
        self.bytes_received += len(data)
        if self._error is not None:
            if data == END and not self._over.done():
                self._over.set_result(None)  # the other end's answer to our own end word
            return
        if self.bytes_received > self._received_limit + len(END):
            raise MalformedFrame("the peer sent more than it may")
        for raw in self._decoder.feed(data):
            size = len(raw.header) + len(raw.body)
            self._received.append((decode_frame(raw.header, raw.body), size))
            self._received_bytes += size
        if self._decoder.is_ended:
            self._hung_up()
        if self._receiver is not None and self._received and not self._receiver.done():
            self._receiver.set_result(None)
        is_full = self._received_bytes > RECEIVE_BUFFER_BYTES
        if is_full or len(self._received) > RECEIVE_BUFFER_FRAMES:
            self._is_reading = False
        self._grant()

    def _grant(self) -> None:
        """Move the other end's window, if it is worth a message."""
        limit = self.bytes_received + WINDOW_BYTES
        if (
            self._is_reading
            and self._error is None
            and limit - self._received_limit >= _GRANT_BYTES
        ):
            self._received_limit = limit
            self._channel.send(_GRANT + _TOTAL.pack(limit))

    def _granted(self, limit: int) -> None:
        if not self._sent_limit < limit <= self.bytes_sent + WINDOW_BYTES:
            raise MalformedFrame("a window that was not used up")
        self._sent_limit = limit
        self._pump()

    def _enqueue(self, frame: Frame, *, is_posted: bool = False) -> None:
        if self._error is not None:
            raise self._error
        header, buffers = encode_frame(frame)
        self._queue.push(stream_of(frame), header, buffers, is_posted=is_posted)
        self._pump()

    def _pump(self) -> None:
        while self._error is None and self._channel.buffered_bytes < CHANNEL_HIGH_BYTES:
            if not self._segment:
                pieces = self._queue.next_segment()
                if pieces is None:
                    break
                self._segment = memoryview(b"".join(pieces))
            length = min(len(self._segment), MESSAGE_BYTES, self._sent_limit - self.bytes_sent)
            if length <= 0:
                break
            self._channel.send(_DATA + self._segment[:length])
            self._segment = self._segment[length:]
            self.bytes_sent += length
        self._wake_next_sender()
        if self._flushed is not None and not self._unsent and not self._flushed.done():
            self._flushed.set_result(None)

    @property
    def _unsent(self) -> int:
        return self._queue.nbytes + len(self._segment)

    async def _turn(self) -> None:
        """Wait until the buffer has room, first come, first served."""
        turn: asyncio.Future[None] = self._loop.create_future()
        self._senders.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn in self._senders:
                self._senders.remove(turn)
            else:
                self._wake_next_sender()  # our turn goes to the next in line
            raise

    def _wake_next_sender(self) -> None:
        # One at a time: its frame may fill the buffer again. It wakes the next one itself.
        if self._queue.nbytes <= SEND_BUFFER_BYTES:
            while self._senders:
                turn = self._senders.popleft()
                if not turn.done():
                    turn.set_result(None)
                    return

    async def _flush(self) -> None:
        """Until all that was sent is with the library; given up if that stands still."""
        if self._error is None and self._unsent:
            if self._flushed is None:
                self._flushed = self._loop.create_future()
            for _ in range(FLUSH_STEPS):
                sent = self.bytes_sent
                await asyncio.wait({self._flushed}, timeout=CLOSE_DEADLINE_S)
                if self._flushed.done() or self.bytes_sent == sent:
                    return

    def _close_with(self, error: ProtocolViolation) -> None:
        """Tell the peer what it did wrong, and end."""
        if self._error is None:
            self._queue.clear()
            self._segment = memoryview(b"")
            with suppress(TransportError):
                self._enqueue(Frame(message=Failure(code=error.code)))
        self._hang_up(error)
        self._close(grace_s=CLOSE_DEADLINE_S)

    def _hang_up(self, error: TransportError) -> None:
        """End on purpose, if the link has not ended yet."""
        if self._error is None:
            self._channel.send(_DATA + END)
        self._end(error)

    def _hung_up(self) -> None:
        """The peer ended the link on purpose: say that all has come, and wait for it to go."""
        if self._decoder.n_incomplete:
            self._end(LinkBroken("the peer hung up within a frame"))
            self._close(grace_s=0)
        else:
            self._channel.send(_DATA + END)
            self._end(LinkClosed(by_peer=True))
            self._close(grace_s=CLOSE_DEADLINE_S)

    def _close(self, *, grace_s: float) -> None:
        """Let the carrier go: at once, or once the other end has said or done so."""
        if self._closing is None:
            self._closing = self._loop.create_task(self._let_go(grace_s), name="close a link")
        elif grace_s == 0 and not self._over.done():
            self._over.set_result(None)
            if not self._lost.done():
                self._lost.set_result(None)

    async def _let_go(self, grace_s: float) -> None:
        awaited = self._lost if self._decoder.is_ended else self._over
        await asyncio.wait({awaited}, timeout=grace_s)
        await self._channel.aclose()

    def _end(self, error: TransportError) -> None:
        """Every waiter learns why; the first reason stays."""
        if self._error is not None:
            return
        self._error = error
        self._queue.clear()
        self._segment = memoryview(b"")
        waiters = (*self._senders, self._receiver, self._flushed)
        self._senders.clear()
        for waiter in waiters:
            if waiter is not None and not waiter.done():
                waiter.set_result(None)
