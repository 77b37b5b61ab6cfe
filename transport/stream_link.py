"""A link over one TCP connection with TLS 1.3, at the speed of the event loop's own protocols.

Works on asyncio's and uvloop's loops alike. It starts from a connected socket whose preamble has
passed, so that it need not know whether the socket was dialled, accepted, punched or relayed.
Nothing a peer sends is looked at before its identity was checked.

Bytes move without copies where the loop allows: tensors go out as memoryviews in segments, and the
body of a large frame is decrypted straight into the memory its tensors are views of.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import cast

from .codec import decode_frame, encode_frame
from .errors import LinkBroken, LinkClosed, NotAMember, ProtocolViolation, TransportError
from .frame import Frame
from .framing import END, FrameDecoder, FrameQueue, single_segment, stream_of
from .link import LinkKind, Packets
from .messages import Failure
from .tcp_info import tcp_packets

SEND_BUFFER_BYTES = 8 << 20  # `send` waits beyond this; one frame may always be queued
POST_BUFFER_BYTES = 1 << 20
RECEIVE_BUFFER_BYTES = 8 << 20  # reading pauses beyond this, and resumes at half of it
RECEIVE_BUFFER_FRAMES = 1024
CLOSE_DEADLINE_S = 2.0  # to flush what was sent, and as long again for TLS to say goodbye
# What the kernel and the loop may hold of what cannot be sent yet: a small frame waits for it, and
# for the segment under way. At 5 Mbit/s beside a 4 MB frame a round trip takes 0.7 s so, and 2.1 s
# with 512 KB each; on loopback neither costs throughput.
UNSENT_BYTES = 128 << 10
LOOP_BUFFER_BYTES = 64 << 10

Authenticate = Callable[[ssl.SSLObject], str]


class StreamLink(asyncio.BufferedProtocol):
    """A `Link` on a byte stream; made by `open_stream_link`."""

    def __init__(self, kind: LinkKind, authenticate: Authenticate, *, is_dialer: bool) -> None:
        self.kind = kind
        self.is_dialer = is_dialer
        self.peer_id = ""
        self.remote: tuple[str, int] | None = None
        self.bytes_sent = 0
        self.bytes_received = 0
        self._authenticate = authenticate
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._lost: asyncio.Future[None] = self._loop.create_future()
        self._error: TransportError | None = None  # why the link ended
        # Out
        self._queue = FrameQueue()
        self._is_paused = False
        self._senders: deque[asyncio.Future[None]] = deque()  # first come, first served
        self._flushed: asyncio.Future[None] | None = None
        # In
        self._decoder = FrameDecoder()
        self._received: deque[tuple[Frame, int]] = deque()
        self._received_bytes = 0
        self._receiver: asyncio.Future[None] | None = None
        self._is_reading = True

    # --- Link ------------------------------------------------------------------------------

    @property
    def packets(self) -> Packets | None:
        """See `Link.packets`; of the whole way, or with a relay of the way to it."""
        if self._transport is None or self._error is not None:
            return None
        return tcp_packets(self._transport.get_extra_info("socket"))

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
            if self._transport is not None and self._error is None:
                self._transport.resume_reading()
        return frame

    def suspect(self) -> None:
        """See `Link.suspect`."""
        self.abort(LinkBroken("the peer has fallen silent"))

    def abort(self, error: TransportError) -> None:
        """See `Link.abort`."""
        self._received.clear()
        self._end(error)
        if self._transport is not None:
            self._transport.abort()

    async def aclose(self) -> None:
        """See `Link.aclose`."""
        transport = self._transport
        if transport is None:
            self._end(LinkClosed(by_peer=False))
            return
        try:
            await self._flush()
            self._hang_up(LinkClosed(by_peer=False))
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_DEADLINE_S):
                    await asyncio.shield(self._lost)
        finally:
            self._end(LinkClosed(by_peer=False))
            transport.abort()

    def raise_if_ended(self) -> None:
        """Raise why the link has ended already, if it has."""
        if self._error is not None:
            raise self._error

    # --- asyncio.BufferedProtocol ------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """TLS is up: find out who is there before anything is read."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=LOOP_BUFFER_BYTES)
        name = transport.get_extra_info("peername")
        if name is not None and self.kind is not LinkKind.RELAYED:  # there it is the relay's
            self.remote = (str(name[0]), int(name[1]))
        try:
            self.peer_id = self._authenticate(transport.get_extra_info("ssl_object"))
        except NotAMember as error:
            self._close_with(error)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._decoder.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes came."""
        self.bytes_received += nbytes
        if self._error is not None:
            return
        try:
            for raw in self._decoder.advance(nbytes):
                size = len(raw.header) + len(raw.body)
                self._received.append((decode_frame(raw.header, raw.body), size))
                self._received_bytes += size
            if self._decoder.is_ended:
                self._hung_up()
        except ProtocolViolation as error:
            self._close_with(error)
        if self._receiver is not None and self._received and not self._receiver.done():
            self._receiver.set_result(None)
        if self._is_reading and (
            self._received_bytes > RECEIVE_BUFFER_BYTES
            or len(self._received) > RECEIVE_BUFFER_FRAMES
        ):
            self._is_reading = False
            if self._transport is not None:
                self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        error = LinkBroken("the connection to the peer was lost")
        error.__cause__ = exc
        self._end(error)
        self._transport = None
        if not self._lost.done():
            self._lost.set_result(None)

    def pause_writing(self) -> None:
        """The loop's own buffer is full."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """The loop's own buffer has room again."""
        self._is_paused = False
        self._pump()

    # --- inside ------------------------------------------------------------------------------

    def _enqueue(self, frame: Frame, *, is_posted: bool = False) -> None:
        if self._error is not None:
            raise self._error
        header, buffers = encode_frame(frame)
        stream = stream_of(frame)
        if not self._is_paused and not self._queue.nbytes and self._transport is not None:
            pieces = single_segment(stream, header, buffers)
            if pieces is not None:
                self.bytes_sent += sum(map(len, pieces))
                self._transport.writelines(pieces)
                return
        self._queue.push(stream, header, buffers, is_posted=is_posted)
        self._pump()

    def _pump(self) -> None:
        while not self._is_paused and self._error is None and self._transport is not None:
            pieces = self._queue.next_segment()
            if pieces is None:
                break
            self.bytes_sent += sum(map(len, pieces))
            self._transport.writelines(pieces)
        self._wake_next_sender()
        if self._flushed is not None and not self._queue.nbytes and not self._flushed.done():
            self._flushed.set_result(None)

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
        """Until all that was sent is with the loop's transport, or the deadline."""
        if self._error is None and self._queue.nbytes:
            if self._flushed is None:
                self._flushed = self._loop.create_future()
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_DEADLINE_S):
                    await asyncio.shield(self._flushed)

    def _close_with(self, error: ProtocolViolation) -> None:
        """Tell the peer what it did wrong, and end."""
        if self._transport is not None and self._error is None:
            self._queue.clear()
            with suppress(TransportError):
                self._enqueue(Frame(message=Failure(code=error.code)))
        self._hang_up(error)

    def _hang_up(self, error: TransportError) -> None:
        """End on purpose, if the link has not ended yet.

        The peer closes the connection when it has read the end. Closing it here could cut off what
        the peer has not read yet, since anything it still sends would be answered by a reset.
        """
        if self._transport is not None and self._error is None:
            self._transport.write(END)
            self._loop.call_later(CLOSE_DEADLINE_S, self._transport.abort)
        self._end(error)

    def _hung_up(self) -> None:
        """The peer ended the link on purpose."""
        if self._decoder.n_incomplete:
            self._end(LinkBroken("the peer hung up within a frame"))
        else:
            self._end(LinkClosed(by_peer=True))
        if self._transport is not None:
            self._transport.close()

    def _end(self, error: TransportError) -> None:
        """Every waiter learns why; the first reason stays."""
        if self._error is not None:
            return
        self._error = error
        self._queue.clear()
        waiters = (*self._senders, self._receiver, self._flushed)
        self._senders.clear()
        for waiter in waiters:
            if waiter is not None and not waiter.done():
                waiter.set_result(None)


async def open_stream_link(
    connection: socket.socket,
    *,
    context: ssl.SSLContext,
    is_dialer: bool,
    authenticate: Authenticate,
    kind: LinkKind = LinkKind.DIRECT,
    handshake_s: float,
) -> StreamLink:
    """TLS over a connected socket whose preamble has passed; the link owns the socket from here.

    Raises:
        NotAMember: `authenticate` said so.
        LinkBroken: the handshake failed: another secret, or the connection went.
    """
    loop = asyncio.get_running_loop()
    try:
        _tune(connection)
    except OSError as error:
        connection.close()
        raise LinkBroken("the connection is gone") from error
    link = StreamLink(kind, authenticate, is_dialer=is_dialer)
    try:
        if is_dialer:
            await loop.create_connection(
                lambda: link,
                sock=connection,
                ssl=context,
                server_hostname="",  # no name goes over the wire; `authenticate` knows whom we want
                ssl_handshake_timeout=handshake_s,
                ssl_shutdown_timeout=CLOSE_DEADLINE_S,
            )
        else:
            await loop.connect_accepted_socket(
                lambda: link,
                connection,
                ssl=context,
                ssl_handshake_timeout=handshake_s,
                ssl_shutdown_timeout=CLOSE_DEADLINE_S,
            )
    except OSError as error:  # ssl.SSLError and TimeoutError are among its kinds
        raise LinkBroken("the TLS handshake failed") from error
    link.raise_if_ended()
    return link


def _tune(connection: socket.socket) -> None:
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # Linux, macOS
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
