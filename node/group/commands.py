"""What the hub of a group tells its spokes: words on a lane, one for each thing they do together.

    length 4, little-endian | msgpack of that length | for a Run the rows' hidden states, float32

The lengths and patterns written here are checked while a word is read; a spoke takes no other.
"""

from __future__ import annotations

import struct
from typing import Annotated, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from covey.node.errors import NodeError
from covey.transport.frame import Buffer
from covey.transport.messages import MAX_PREFIX_KEYS, MAX_TOKENS, PrefixKey, SessionId, TokenCount

MAX_SESSIONS = 1024  # that a group keeps
MAX_STEPS = 128  # of one Run
MAX_BODY_BYTES = 48 << 20  # of a Run's hidden states: below what a lane's message may have

Floats = npt.NDArray[np.float32]

_LENGTH = struct.Struct("<I")


class WrongWord(NodeError):
    """What the hub said cannot be read; it is broken or of another version."""


class Keep(Struct, frozen=True, tag="keep", forbid_unknown_fields=True):
    """An attempt begins: close every session but these. Answered by what is not here.

    That is a lane of the ring, if there is to be one, and each of the sessions.
    """

    sessions: Annotated[list[SessionId], Meta(max_length=MAX_SESSIONS)]


class Open(Struct, frozen=True, tag="open", forbid_unknown_fields=True):
    """Open a session, as `Shard.open_session`. Answered by how much of its prefix is held."""

    session: SessionId
    n_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    prefix: Annotated[list[PrefixKey], Meta(max_length=MAX_PREFIX_KEYS)] = []


class Close(Struct, frozen=True, tag="close", forbid_unknown_fields=True):
    """Close a session, if it is open."""

    session: SessionId


class Rows(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The next rows of one session, from `position` on."""

    session: SessionId
    position: TokenCount
    n_rows: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]


class Run(Struct, frozen=True, tag="run", forbid_unknown_fields=True):
    """Run all blocks on these rows, each of another session, with a sum after each half."""

    steps: Annotated[list[Rows], Meta(min_length=1, max_length=MAX_STEPS)]

    @property
    def n_rows(self) -> int:
        """Of all steps."""
        return sum(rows.n_rows for rows in self.steps)


Word: TypeAlias = Keep | Open | Close | Run

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Word] = msgspec.msgpack.Decoder(Word)


def pack(word: Word, hidden: Floats | None = None) -> tuple[Buffer, ...]:
    """The parts of a word's message; `hidden` [n_rows, hidden_size] of a Run, not copied."""
    header = _encoder.encode(word)
    parts: tuple[Buffer, ...] = (_LENGTH.pack(len(header)), header)
    return parts if hidden is None else (*parts, np.ascontiguousarray(hidden).data.cast("B"))


def unpack(message: memoryview, hidden_size: int) -> tuple[Word, Floats | None]:
    """A word, and of a Run a copy of its hidden states [n_rows, hidden_size].

    Raises:
        WrongWord: it is none, or its length is not what it says.
    """
    if len(message) < _LENGTH.size:
        raise WrongWord("a word without a length")
    (length,) = _LENGTH.unpack_from(message)
    header, body = message[_LENGTH.size :][:length], message[_LENGTH.size :][length:]
    if len(header) != length:
        raise WrongWord("a word that is cut short")
    try:
        word = _decoder.decode(header)
    except ValueError as error:  # msgspec's errors and UnicodeDecodeError are among its kinds
        raise WrongWord("a word that cannot be read") from error
    expected = 4 * hidden_size * word.n_rows if isinstance(word, Run) else 0
    if len(body) != expected:
        raise WrongWord("a word of another length than it says")
    if not isinstance(word, Run):
        return word, None
    return word, np.frombuffer(body, "<f4").reshape(word.n_rows, hidden_size).copy()
