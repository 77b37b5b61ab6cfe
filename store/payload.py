"""Checks an update of a document byte by byte before the CRDT library may see it.

pycrdt 0.14.13 panics on some malformed updates (a `BaseException` that no handler should catch),
asks for memory that the bytes merely claim, and keeps what it cannot place yet for ever. So only
the form that our own documents produce is let through: one writer, items in one root map, each a
single JSON value, nothing missing in between. Format: Yjs update encoding, version 1 (lib0
variable-length integers). Knows no pycrdt.
"""

from __future__ import annotations

from .errors import RecordMalformed, RejectReason, UpdateRejected
from .values import MAX_KEY_CHARS, MAX_VALUE_BYTES, decode_value, is_key

# Each document has one writer, so that its client id need not tell writers apart: all use the same,
# and a document never gathers the ids of past runs of its author (18 KB for 2000 of them).
CLIENT_ID = 1
ROOT = "r"

_MAX_NUMBER = 2**31  # clocks are 32 bits wide in the library
_HAS_ORIGIN = 0x80
_MAP_ITEM_OF_ANY = 0x28  # an item that has a key (0x20) and holds plain values (8)
_PARENT_IS_ROOT = 1
_BUFFER = 0x74  # lib0's tag of a byte string among plain values


def check_payload(payload: bytes, *, clock: int) -> int:
    """Check that `payload` continues a document whose next item has number `clock`.

    Returns:
        The number of the item after it.

    Raises:
        UpdateRejected: `unreadable`, if it is anything but an update of ours.
    """
    reader = _Reader(payload)
    if reader.number(at_most=1):
        n_items = reader.number(at_least=1)  # the library panics on a writer without items
        reader.expect(CLIENT_ID)
        reader.expect(clock)
        for _ in range(n_items):  # each takes bytes, so their number is bounded by the payload
            _check_item(reader, clock=clock)
            clock += 1
    if reader.number(at_most=1):
        reader.expect(CLIENT_ID)
        for _ in range(reader.number(at_least=1)):
            start = reader.number()
            length = reader.number(at_least=1)
            if start + length > clock:
                raise _unreadable("deletes what does not exist")
    reader.expect_end()
    return clock


def _check_item(reader: _Reader, *, clock: int) -> None:
    info = reader.byte()
    if info & ~_HAS_ORIGIN != _MAP_ITEM_OF_ANY:
        raise _unreadable("an item is no plain map entry")
    if info & _HAS_ORIGIN:  # replaces an entry, whose key it takes over
        reader.expect(CLIENT_ID)
        if reader.number() >= clock:
            raise _unreadable("an item replaces a later one")
    else:
        reader.expect(_PARENT_IS_ROOT)
        if reader.string(max_bytes=len(ROOT)) != ROOT:
            raise _unreadable("an item is outside the map of records")
        if not is_key(reader.string(max_bytes=MAX_KEY_CHARS)):
            raise _unreadable("a key is not printable ASCII")
    reader.expect(1)
    if reader.byte() != _BUFFER:
        raise _unreadable("a value is not a byte string")
    try:
        decode_value(reader.take(reader.number(at_most=MAX_VALUE_BYTES)))
    except RecordMalformed as error:
        raise _unreadable(str(error)) from error


class _Reader:
    """Reads lib0 primitives from bytes; raises rather than run over the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def byte(self) -> int:
        return self.take(1)[0]

    def take(self, n_bytes: int) -> bytes:
        end = self._position + n_bytes
        if end > len(self._data):
            raise _unreadable("it ends too early")
        taken = self._data[self._position : end]
        self._position = end
        return taken

    def number(self, *, at_least: int = 0, at_most: int = _MAX_NUMBER) -> int:
        value = shift = 0
        byte = 0x80
        while byte & 0x80:
            if shift > 28:
                raise _unreadable("a number is too long")
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
        if not at_least <= value <= at_most:
            raise _unreadable("a number is out of range")
        return value

    def string(self, *, max_bytes: int) -> str:
        try:
            return self.take(self.number(at_most=max_bytes)).decode("ascii")
        except UnicodeDecodeError as error:
            raise _unreadable("a name is not ASCII") from error

    def expect(self, value: int) -> None:
        if self.number() != value:
            raise _unreadable("it does not continue the document as its author would")

    def expect_end(self) -> None:
        if self._position != len(self._data):
            raise _unreadable("bytes are left over")


def _unreadable(detail: str) -> UpdateRejected:
    return UpdateRejected(RejectReason.UNREADABLE, detail)
