"""A lane on a stream of bytes: each message behind its length, in one buffer that is used again.

length 4, big-endian | that many bytes
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Sequence

from covey.transport.frame import Buffer

from .errors import LaneBroken, LaneTimeout
from .lane import MAX_MESSAGE, LaneKind
from .waiting import SPIN_S, Readiness, wait_room
from .wire import PIECE_BYTES, Wire

SEND_TIMEOUT_S = 5.0  # how long the peer may take nothing while we have something for it

_LENGTH = struct.Struct("!I")
_FIRST_BYTES = 2 * PIECE_BYTES  # of the buffer; it grows with what has come, not with what is said
_KEPT_BYTES = 8 << 20  # a longer buffer is given back when it is empty
_JOIN_BYTES = 2 * PIECE_BYTES  # up to this, copying is cheaper than a second system call


class StreamLane:
    """A `Lane` on a `Wire`: TLS, or a socket within one machine."""

    def __init__(self, wire: Wire, peer_id: str, kind: LaneKind, *, spin_s: float = SPIN_S) -> None:
        """Owns the wire from here."""
        self.peer_id = peer_id
        self.kind: LaneKind = kind
        self._wire = wire
        self._file = wire.fileno()
        self._readiness = Readiness((self._file,), spin_s=spin_s)
        self._broken: LaneBroken | None = None
        self._in_use = threading.Lock()  # held by the thread that sends or receives
        self._is_closed = False
        # Bytes [start, end) of the buffer are here and not yet received.
        self._buffer = memoryview(bytearray(_FIRST_BYTES))
        self._start = self._end = 0
        self._is_seen = False  # whether `poll` has looked at all that is in memory

    def fileno(self) -> int:
        """See `Lane.fileno`."""
        return self._file

    # --- sending ----------------------------------------------------------------------------------

    def send(self, *parts: Buffer) -> None:
        """See `Lane.send`."""
        nbytes = 0
        for part in parts:
            nbytes += memoryview(part).nbytes
        if nbytes > MAX_MESSAGE:
            raise ValueError(f"a message of {nbytes} bytes, over {MAX_MESSAGE}")
        pieces: Sequence[Buffer] = (_LENGTH.pack(nbytes), *parts)
        if nbytes <= _JOIN_BYTES:
            pieces = (b"".join(pieces),)
        try:
            with self._in_use:
                self._raise_if_broken()
                for piece in pieces:
                    self._send(memoryview(piece).cast("B"))
        except LaneBroken as error:
            self._break(error)
            raise
        finally:
            if self._is_closed:
                self._free()

    def _send(self, data: memoryview) -> None:
        for start in range(0, len(data), PIECE_BYTES):
            left = self._wire.send(data[start : start + PIECE_BYTES])
            if left:
                self._flush(left)

    def _flush(self, left: int) -> None:
        """Until the piece is out; meanwhile take in what the peer sends, which may do the same."""
        deadline = time.perf_counter() + SEND_TIMEOUT_S
        while left:
            wait_s = deadline - time.perf_counter()
            if wait_s <= 0:
                raise LaneBroken(f"the peer took nothing for {SEND_TIMEOUT_S:g} s")
            has_room = self._end - self._start < MAX_MESSAGE
            if wait_room(self._file, also_readable=has_room, timeout_s=wait_s) and has_room:
                self._take(is_last_read=False)
                self._is_seen = False
            before, left = left, self._wire.flush()
            if left < before:
                deadline = time.perf_counter() + SEND_TIMEOUT_S

    # --- receiving --------------------------------------------------------------------------------

    def receive(self, timeout_s: float) -> memoryview:
        """See `Lane.receive`."""
        message = self.poll()
        if message is not None:
            return message
        deadline = time.perf_counter() + timeout_s
        while True:
            left_s = deadline - time.perf_counter()
            if left_s <= 0:
                raise LaneTimeout(timeout_s)
            self._readiness.wait(left_s)
            message = self.poll()
            if message is not None:
                return message

    def poll(self) -> memoryview | None:
        """See `Lane.poll`."""
        try:
            with self._in_use:
                self._raise_if_broken()
                message = self._cut()
                while message is None and self._take(is_last_read=True):
                    message = self._cut()
                self._is_seen = message is None
        except LaneBroken as error:
            self._break(error)
            raise
        finally:
            if self._is_closed:
                self._free()
        return message

    def has_unseen(self) -> bool:
        """See `Lane.has_unseen`: behind a message there may be another in memory."""
        if self._broken is not None:
            return True  # its file may be somebody else's by now
        return not self._is_seen and (self._start != self._end or self._wire.has_unread())

    def _cut(self) -> memoryview | None:
        """The first message of the buffer, if it is whole; it stays where it is."""
        have = self._end - self._start
        if have < _LENGTH.size:
            return None
        (nbytes,) = _LENGTH.unpack_from(self._buffer, self._start)
        if nbytes > MAX_MESSAGE:
            raise LaneBroken(f"the peer announced a message of {nbytes} bytes")
        if have < _LENGTH.size + nbytes:
            return None
        begin = self._start + _LENGTH.size
        self._start = begin + nbytes
        return self._buffer[begin : self._start]

    def _take(self, *, is_last_read: bool) -> bool:
        """Take in what has come; whether that was anything.

        `is_last_read` says that the last message that was received is no longer in use.
        """
        if self._start == self._end and is_last_read:
            self._start = self._end = 0
            if len(self._buffer) > _KEPT_BYTES:
                self._buffer = memoryview(bytearray(_FIRST_BYTES))
        elif self._end == len(self._buffer):
            self._make_room()
        nbytes = self._wire.read_into(self._buffer[self._end :])
        if nbytes is None:
            return False
        self._end += nbytes
        return True

    def _make_room(self) -> None:
        """Another buffer, since the last message may be in use still; twice as long if full."""
        rest = self._buffer[self._start : self._end]
        size = len(self._buffer) * (2 if 2 * len(rest) > len(self._buffer) else 1)
        buffer = memoryview(bytearray(size))
        buffer[: len(rest)] = rest
        self._buffer = buffer
        self._start, self._end = 0, len(rest)

    # --- ending -----------------------------------------------------------------------------------

    def close(self) -> None:
        """See `Lane.close`."""
        self._is_closed = True
        if self._broken is None:
            self._broken = LaneBroken("it was closed")
        self._wire.shut()
        self._free()

    def _raise_if_broken(self) -> None:
        if self._broken is not None:
            raise LaneBroken(self._broken.reason)

    def _break(self, error: LaneBroken) -> None:
        """The first reason stays; the peer learns of it."""
        if self._broken is None:
            self._broken = error
        self._wire.shut()

    def _free(self) -> None:
        """Free the socket, unless a thread is using it, which does so when it is done."""
        if self._in_use.acquire(blocking=False):
            try:
                self._wire.close()
            finally:
                self._in_use.release()
