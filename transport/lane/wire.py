"""What a lane of bytes runs on: a connected socket, plain or with TLS above it.

Neither ever waits. TLS works in memory (`ssl.MemoryBIO`), so that one system call takes in all that
has come, however many records that is, and so that a thread which closes the socket cannot make
another one, in the middle of a call, speak in clear.
"""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from typing import Protocol

from .errors import LaneBroken

PIECE_BYTES = 64 << 10  # handed to the socket at once
# Two ends that send to each other at the same time, each a few pieces ahead of what the other has
# read, must not wait for each other; the kernel grants what its limits allow.
SOCKET_BUFFER_BYTES = 1 << 20


class Wire(Protocol):
    """A stream of bytes that never waits."""

    def fileno(self) -> int:
        """The socket's."""

    def read_into(self, view: memoryview) -> int | None:
        """How many bytes came; None if nothing is there yet.

        Raises:
            LaneBroken: the other side hung up, or the stream is damaged.
        """

    def has_unread(self) -> bool:
        """Whether bytes have left the socket that `read_into` has not handed over."""

    def send(self, piece: memoryview) -> int:
        """Send a piece as far as there is room; how many bytes are left, for `flush`.

        Nothing of the one before must be left.

        Raises:
            LaneBroken: the other side hung up, or the stream has ended.
        """

    def flush(self) -> int:
        """Send what is left, as far as there is room; how many bytes are left then.

        Raises:
            LaneBroken: the other side hung up.
        """

    def shut(self) -> None:
        """End the connection, while another thread may be using it: its calls raise LaneBroken."""

    def close(self) -> None:
        """Free the socket; nobody uses it any more."""


class PlainWire:
    """A stream socket as it is; for two ends of one machine."""

    def __init__(self, connection: socket.socket) -> None:
        """Owns the socket from here."""
        connection.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            # TCP sizes its own buffers, and better; a Unix socket's are small and stay so.
            if connection.family != socket.AF_INET and connection.family != socket.AF_INET6:
                connection.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        self._socket = connection
        self._unsent = memoryview(b"")

    def fileno(self) -> int:
        """See `Wire.fileno`."""
        return self._socket.fileno()

    def read_into(self, view: memoryview) -> int | None:
        """See `Wire.read_into`."""
        try:
            nbytes = self._socket.recv_into(view)
        except BlockingIOError:
            return None
        except OSError as error:
            raise LaneBroken("the connection was lost") from error
        if nbytes == 0:
            raise LaneBroken("the peer hung up")
        return nbytes

    def has_unread(self) -> bool:
        """See `Wire.has_unread`."""
        return False

    def send(self, piece: memoryview) -> int:
        """See `Wire.send`."""
        self._unsent = piece
        return self.flush()

    def flush(self) -> int:
        """See `Wire.flush`."""
        unsent = self._unsent
        try:
            sent = self._socket.send(unsent)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise LaneBroken("the connection was lost") from error
        left = len(unsent) - sent
        if left:
            self._unsent = unsent[sent:]
        return left

    def shut(self) -> None:
        """See `Wire.shut`."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """See `Wire.close`."""
        self._socket.close()


class TlsWire(PlainWire):
    """TLS above a socket, after its handshake; made by `secure.py`."""

    def __init__(
        self,
        connection: socket.socket,
        tls: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
    ) -> None:
        """Owns the socket from here; `tls` reads from `incoming` and writes to `outgoing`."""
        super().__init__(connection)
        self._tls = tls
        self._incoming = incoming
        self._outgoing = outgoing
        self._sealed = memoryview(bytearray(4 * PIECE_BYTES))

    def read_into(self, view: memoryview) -> int | None:
        """See `Wire.read_into`."""
        try:
            while True:
                if self._incoming.pending or self._tls.pending():
                    try:
                        # With a buffer to fill, it returns how many bytes that were.
                        return int(self._tls.read(len(view), view))
                    except ssl.SSLWantReadError:  # the rest of a record is still on its way
                        pass
                nbytes = super().read_into(self._sealed)
                if nbytes is None:
                    return None
                self._incoming.write(self._sealed[:nbytes])
        except ssl.SSLError as error:  # also how TLS says goodbye
            raise LaneBroken("the peer ended TLS, or it was damaged") from error

    def has_unread(self) -> bool:
        """See `Wire.has_unread`."""
        return self._incoming.pending > 0 or self._tls.pending() > 0

    def send(self, piece: memoryview) -> int:
        """See `Wire.send`."""
        try:
            self._tls.write(piece)
        except ssl.SSLError as error:
            raise LaneBroken("TLS has ended") from error
        return super().send(memoryview(self._outgoing.read()))
