"""Frames cut into segments and put together again, so that large and small ones share a link.

Sans-IO. On the wire a link is a row of segments: a 4-byte word (stream number 8 bits, length 24
bits, big-endian) and that many bytes. The first segment of a frame begins with a prefix {protocol
version 1 byte, header length 4, body length 4}; header and body follow, across as many segments
as it takes. Segments of one stream never interleave, so its frames stay in order; those of
different streams do, so a heartbeat passes between two segments of a long prefill. A word of zeros
ends the link: bytes that stop without it were cut off.

Invariant of the decoder: at most `MAX_OPEN_FRAMES` frames are incomplete, and every length is
checked before memory is taken for it.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

from .codec import check_lengths
from .errors import MalformedFrame, UnsupportedVersion
from .frame import Buffer, Frame
from .messages import PROTOCOL_VERSION, Ack, Failure, Goodbye, Ping, Pong

SEGMENT_BYTES = 256 << 10  # 0.4 s at 5 Mbit/s: what a heartbeat may wait for on the slowest link
MAX_SEGMENT_BYTES = 1 << 20
MAX_OPEN_FRAMES = 4
MAX_STREAM = 63

URGENT_STREAM = 0  # heartbeats and farewells: before everything else
_SHARED_STREAM = 1
_PROBE_STREAM = 2
_N_SESSION_STREAMS = MAX_STREAM - _PROBE_STREAM

_WORD = struct.Struct("!I")
END = bytes(_WORD.size)  # the last bytes of a link that ends on purpose
_PREFIX = struct.Struct("!BII")
_WORD_AND_PREFIX = struct.Struct("!IBII")
_TLS_RECORD_BYTES = 16 << 10
_SCRATCH_BYTES = 64 << 10


def stream_of(frame: Frame) -> int:
    """The stream a frame belongs to: one for all frames of a session."""
    session = getattr(frame.message, "session", None)
    if session is not None:
        return 1 + _PROBE_STREAM + crc32(session.encode()) % _N_SESSION_STREAMS
    match frame.message:
        case Ping() if frame.tensors:
            return _PROBE_STREAM
        case Ping() | Pong() | Ack() | Goodbye():
            return URGENT_STREAM
        case Failure() if frame.reply_to is None:
            return URGENT_STREAM
        case _:
            return _SHARED_STREAM


def single_segment(
    stream: int, header: bytes, buffers: Sequence[memoryview]
) -> list[Buffer] | None:
    """A frame that fits one segment, ready to be written; None if it does not fit."""
    body_bytes = sum(map(len, buffers))
    length = _PREFIX.size + len(header) + body_bytes
    if length > SEGMENT_BYTES:
        return None
    word = _WORD.pack(stream << 24 | length)
    prefix = _PREFIX.pack(PROTOCOL_VERSION, len(header), body_bytes)
    if length <= _TLS_RECORD_BYTES - _WORD.size:  # one record; copying is cheaper than a second
        return [b"".join((word, prefix, header, *buffers))]
    return [word + prefix + header, *buffers]


class _Outgoing:
    """A frame on its way into segments; it gives up its buffers as it goes."""

    def __init__(
        self, stream: int, header: bytes, buffers: Sequence[memoryview], *, is_posted: bool
    ) -> None:
        body_bytes = sum(map(len, buffers))
        prefix = _PREFIX.pack(PROTOCOL_VERSION, len(header), body_bytes)
        self.stream = stream
        self.is_posted = is_posted
        self.left = len(prefix) + len(header) + body_bytes
        self.is_started = False
        self._parts: deque[memoryview] = deque((memoryview(prefix + header), *buffers))

    def segment(self, most: int) -> list[Buffer]:
        room = length = min(self.left, most)
        pieces: list[Buffer] = [_WORD.pack(self.stream << 24 | length)]
        while room:
            part = self._parts.popleft()
            if len(part) > room:
                self._parts.appendleft(part[room:])
                part = part[:room]
            pieces.append(part)
            room -= len(part)
        self.left -= length
        self.is_started = True
        return pieces


class FrameQueue:
    """Frames that wait to be sent, and the order in which their segments go.

    The urgent stream first, the others in turn, one segment each.
    """

    def __init__(self, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._segment_bytes = segment_bytes
        self.nbytes = 0  # not yet handed out
        self.posted_nbytes = 0  # of these, what was queued by code that could not wait
        self._streams: dict[int, deque[_Outgoing]] = {}
        self._turns: deque[int] = deque()  # streams with frames, the next one first
        self._n_open = 0

    def push(
        self,
        stream: int,
        header: bytes,
        buffers: Sequence[memoryview],
        *,
        is_posted: bool = False,
    ) -> None:
        """Append a frame to its stream."""
        frame = _Outgoing(stream, header, buffers, is_posted=is_posted)
        self.nbytes += frame.left
        if is_posted:
            self.posted_nbytes += frame.left
        waiting = self._streams.get(stream)
        if waiting is None:
            self._streams[stream] = deque((frame,))
            if stream == URGENT_STREAM:
                self._turns.appendleft(stream)
            else:
                self._turns.append(stream)
        else:
            waiting.append(frame)

    def next_segment(self) -> list[Buffer] | None:
        """The buffers of the next segment; None when all has been handed out."""
        for _ in range(len(self._turns)):
            stream = self._turns.popleft()
            frame = self._streams[stream][0]
            is_short = frame.left <= self._segment_bytes
            if frame.is_started or is_short or self._n_open < MAX_OPEN_FRAMES:
                return self._advance(stream, frame)
            self._turns.append(stream)
        return None

    def clear(self) -> None:
        """Forget everything, when the link has ended."""
        self._streams.clear()
        self._turns.clear()
        self.nbytes = self.posted_nbytes = self._n_open = 0

    def _advance(self, stream: int, frame: _Outgoing) -> list[Buffer]:
        was_open, left = frame.is_started, frame.left
        pieces = frame.segment(self._segment_bytes)
        self.nbytes -= left - frame.left
        if frame.is_posted:
            self.posted_nbytes -= left - frame.left
        self._n_open += (frame.left > 0) - was_open
        waiting = self._streams[stream]
        if frame.left == 0:
            waiting.popleft()
        if not waiting:
            del self._streams[stream]
        elif stream == URGENT_STREAM:
            self._turns.appendleft(stream)
        else:
            self._turns.append(stream)
        return pieces


@dataclass(frozen=True, slots=True)
class RawFrame:
    """The two parts of a frame as they arrived; `codec.decode_frame` reads them."""

    header: bytearray
    body: bytearray


class _Incoming:
    """A frame that is being put together in memory of its final size."""

    def __init__(self, header_bytes: int, body_bytes: int) -> None:
        self.raw = RawFrame(bytearray(header_bytes), bytearray(body_bytes))
        self.left = header_bytes + body_bytes
        self._header_filled = self._body_filled = 0

    def target(self, limit: int) -> memoryview:
        """Where its next bytes go, at most `limit`."""
        if self._header_filled < len(self.raw.header):
            at = self._header_filled
            return memoryview(self.raw.header)[at : at + limit]
        at = self._body_filled
        return memoryview(self.raw.body)[at : at + limit]

    def filled(self, nbytes: int) -> None:
        if self._header_filled < len(self.raw.header):
            self._header_filled += nbytes
        else:
            self._body_filled += nbytes
        self.left -= nbytes


class FrameDecoder:
    """Bytes in, split anywhere; frames out.

    Two ways in: `feed(data)`, or `buffer()` to receive into and `advance(n)` after it, which lets
    the body of a large frame arrive where it stays. After an error the decoder is of no more use.
    """

    def __init__(self) -> None:
        self.is_ended = False  # the peer said that this was all
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._head = bytearray()  # of a segment: its word, and the prefix if a frame starts
        self._open: dict[int, _Incoming] = {}
        self._stream = 0
        self._segment_left = 0  # bytes of the current segment that have not come yet
        self._current: _Incoming | None = None
        self._is_direct = False

    @property
    def n_incomplete(self) -> int:
        """How many frames have begun and not ended."""
        return len(self._open)

    def buffer(self) -> memoryview:
        """Memory for the next bytes, never empty."""
        current = self._current
        if current is not None:
            target = current.target(self._segment_left)
            if len(target) >= _SCRATCH_BYTES // 4:
                self._is_direct = True
                return target
        self._is_direct = False
        return self._scratch

    def advance(self, nbytes: int) -> list[RawFrame]:
        """Take the first `nbytes` of what `buffer` returned; the frames they complete.

        Raises:
            FrameTooLarge, MalformedFrame, UnsupportedVersion: the peer is wrong.
        """
        if self._current is None or not self._is_direct:
            return self.feed(self._scratch[:nbytes])
        done: list[RawFrame] = []
        self._took(self._current, nbytes, done)
        return done

    def feed(self, data: Buffer) -> list[RawFrame]:
        """Take `data`; the frames it completes. Raises as `advance` does."""
        view = memoryview(data)
        done: list[RawFrame] = []
        while len(view):
            current = self._current
            if current is None:
                view = view[self._read_whole(view, done) or self._read_head(view) :]
                continue
            target = current.target(self._segment_left)
            count = min(len(target), len(view))
            target[:count] = view[:count]
            view = view[count:]
            self._took(current, count, done)
        return done

    def _took(self, current: _Incoming, nbytes: int, done: list[RawFrame]) -> None:
        current.filled(nbytes)
        self._segment_left -= nbytes
        if self._segment_left:
            return
        self._current = None
        if current.left == 0:
            self._open.pop(self._stream, None)
            done.append(current.raw)
        elif self._stream not in self._open:
            if len(self._open) >= MAX_OPEN_FRAMES:
                raise MalformedFrame("too many frames at once")
            self._open[self._stream] = current

    def _read_whole(self, view: memoryview, done: list[RawFrame]) -> int:
        """Take a valid frame that lies in `view` from end to end; 0 if there is none.

        A short cut for what is most common and most urgent: the frames of single tokens.
        """
        start = _WORD_AND_PREFIX.size
        if self._head or self.is_ended or len(view) <= start:
            return 0
        word, version, header_bytes, body_bytes = _WORD_AND_PREFIX.unpack_from(view)
        body_start: int = start + header_bytes
        end: int = body_start + body_bytes
        is_valid = (
            word & 0xFFFFFF == end - _WORD.size <= MAX_SEGMENT_BYTES
            and word >> 24 <= MAX_STREAM
            and word >> 24 not in self._open
            and version == PROTOCOL_VERSION
            and header_bytes > 0
        )
        if not is_valid or len(view) < end:
            return 0
        check_lengths(header_bytes, body_bytes)
        done.append(RawFrame(bytearray(view[start:body_start]), bytearray(view[body_start:end])))
        return end

    def _read_head(self, view: memoryview) -> int:
        """Read at most the head of a segment from `view`; how many bytes of it were used."""
        head = self._head
        needed = _WORD.size
        if len(head) >= needed:
            needed += _PREFIX.size
        count = min(needed - len(head), len(view))
        head += view[:count]
        if len(head) < needed:
            return count
        if needed == _WORD.size:
            self._begin_segment(_WORD.unpack(head)[0])
        else:
            self._begin_frame(*_PREFIX.unpack_from(head, _WORD.size))
        return count

    def _begin_segment(self, word: int) -> None:
        if self.is_ended:
            raise MalformedFrame("the link goes on after its end")
        if word == 0:
            self.is_ended = True
            self._head.clear()
            return
        self._stream, length = word >> 24, word & 0xFFFFFF
        if self._stream > MAX_STREAM or not 0 < length <= MAX_SEGMENT_BYTES:
            raise MalformedFrame("not the start of a segment")
        self._segment_left = length
        current = self._open.get(self._stream)
        if current is None:
            if length <= _PREFIX.size:
                raise MalformedFrame("a segment too short to begin a frame")
            return  # the head goes on with a prefix
        if length > current.left:
            raise MalformedFrame("a segment reaches beyond its frame")
        self._current = current
        self._head.clear()

    def _begin_frame(self, version: int, header_bytes: int, body_bytes: int) -> None:
        if version != PROTOCOL_VERSION:
            raise UnsupportedVersion(f"the peer speaks version {version} of the protocol")
        check_lengths(header_bytes, body_bytes)
        self._segment_left -= _PREFIX.size
        if header_bytes == 0 or self._segment_left > header_bytes + body_bytes:
            raise MalformedFrame("a segment reaches beyond its frame")
        self._current = _Incoming(header_bytes, body_bytes)
        self._head.clear()
