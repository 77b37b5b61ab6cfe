"""State vectors: what a replica holds of each author, so that another can send the rest.

Not pycrdt's state vectors, which speak of one document; these speak of signed envelopes. Encoded
as a msgpack array of [author, base, last], sorted by author.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from .envelope import MAX_SEQUENCE, AuthorId
from .errors import RejectReason, UpdateRejected

MAX_AUTHORS = 1024
MAX_VECTOR_BYTES = MAX_AUTHORS * 96  # an id of 64, two numbers of 9 and their heads

_Sequence = Annotated[int, Meta(ge=0, le=MAX_SEQUENCE)]
_Row = tuple[AuthorId, _Sequence, _Sequence]
_Rows = Annotated[list[_Row], Meta(max_length=MAX_AUTHORS)]


class Held(NamedTuple):
    """What is held of one author: its snapshot's sequence (0: none) and the last sequence."""

    base: int
    last: int


def encode_vector(held: Mapping[str, Held]) -> bytes:
    """Encode; equal mappings give equal bytes."""
    return msgspec.msgpack.encode([(author, *held[author]) for author in sorted(held)])


def decode_vector(data: bytes) -> dict[str, Held]:
    """Decode any bytes.

    Raises:
        UpdateRejected: too large or malformed; an author twice or out of order is malformed.
    """
    if len(data) > MAX_VECTOR_BYTES:
        raise UpdateRejected(RejectReason.TOO_LARGE, "a state vector names too many authors")
    try:
        rows = msgspec.msgpack.decode(data, type=_Rows)
    except ValueError as error:
        raise UpdateRejected(RejectReason.MALFORMED, "not a state vector") from error
    held = {author: Held(base, last) for author, base, last in rows}
    if list(held) != sorted(held) or len(held) != len(rows):
        raise UpdateRejected(RejectReason.MALFORMED, "authors are not in order")
    if any(base > last for base, last in held.values()):
        raise UpdateRejected(RejectReason.MALFORMED, "a snapshot after the last sequence")
    return held
