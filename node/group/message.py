"""The messages of a group on its lanes: a fixed header, and a vector or a word of the hub's.

    version 1 | kind 1 | codec 1 | rank 1 | epoch 4 | number 4 | rows 4 | columns 4
    | rings 8 | busy 4 | part 4            little-endian, 36 bytes

`rank` is the sender's, `number` counts the calls within an epoch. `rings` are the sizes for which
the hub wants a ring from the next call on; it counts only from the hub, in what all members hear.
`busy` is how many microseconds the sender had between its last call and this one; `part` says which
piece of a ring this is.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from .codec import SumCodec, encoded_bytes

VERSION = 1
MAX_RANK = 255
MAX_EPOCH = (1 << 32) - 1
MAX_BUSY_US = (1 << 32) - 1

_LAYOUT = struct.Struct("<BBBBIIIIQII")
HEADER_BYTES = _LAYOUT.size
_NOTHING = 0x80  # beside the codec: the sender adds nothing, no values follow
_CODECS: tuple[SumCodec, ...] = ("exact", "fp16", "int8")
_NUMBERS = {codec: number for number, codec in enumerate(_CODECS)}


class Kind(IntEnum):
    """What a message is."""

    PART = 1  # to whoever adds
    SUM = 2  # from the hub
    SHARE = 3  # a piece of the vector on its way round a ring
    VECTOR = 4  # from the hub, to all
    WORD = 5  # from the hub, to all; opaque here
    ABORT = 6  # this epoch is over


class Header(NamedTuple):
    """What precedes the values; `codec` is None if there are none and nothing is to be added."""

    kind: int
    codec: SumCodec | None
    rank: int
    epoch: int
    number: int
    rows: int = 0
    columns: int = 0
    rings: int = 0
    busy_us: int = 0
    part: int = 0

    def pack(self) -> bytes:
        """The bytes."""
        codec = _NOTHING if self.codec is None else _NUMBERS[self.codec]
        return _LAYOUT.pack(
            VERSION,
            self.kind,
            codec,
            self.rank,
            self.epoch,
            self.number,
            self.rows,
            self.columns,
            self.rings,
            self.busy_us,
            self.part,
        )


def read_header(message: memoryview) -> Header | None:
    """The header of a message; None if it is none of this version."""
    if len(message) < HEADER_BYTES:
        return None
    version, kind, codec, *rest = _LAYOUT.unpack_from(message)
    if version != VERSION or not (codec == _NOTHING or codec < len(_CODECS)):
        return None
    return Header(kind, None if codec == _NOTHING else _CODECS[codec], *rest)


def fits(header: Header, message: memoryview, n_values: int) -> bool:
    """Whether a message is as long as its header and so many values."""
    body = 0 if header.codec is None else encoded_bytes(header.codec, n_values)
    return len(message) == HEADER_BYTES + body
