"""Signed envelopes: the only form in which a member's updates travel and are kept.

An envelope is a version byte and a msgpack array [author, sequence, kind, payload, signature]. It
has exactly one encoding, so a copy that verifies is the author's copy, byte for byte. The swarm is
signed but not sent: an envelope of another swarm fails as a bad signature. Knows neither what a
payload means nor how a signature is made.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from .errors import RejectReason, UpdateRejected

Sign: TypeAlias = Callable[[bytes], bytes]  # data -> Ed25519 signature, 64 bytes
Verify: TypeAlias = Callable[[str, bytes, bytes], bool]  # (author, signature, data) -> is it theirs
IsMember: TypeAlias = Callable[[str], bool]

FORMAT_VERSION = 1
SIGNATURE_BYTES = 64
MAX_SEQUENCE = 2**53
MAX_PAYLOAD_BYTES = 224 * 1024
MAX_ENVELOPE_BYTES = MAX_PAYLOAD_BYTES + 256  # author, signature and msgpack heads take below 160

AuthorId: TypeAlias = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9]{1,64}\Z")]
Signature: TypeAlias = Annotated[
    bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)
]

_DOMAIN = b"covey/store/envelope\x00"


class Kind(StrEnum):
    """What a payload is: a change to the author's document, or all of it anew."""

    UPDATE = "update"
    SNAPSHOT = "snapshot"


class Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One update by one author; the author counts its own envelopes from 1, without gaps."""

    author: AuthorId
    sequence: Annotated[int, Meta(ge=1, le=MAX_SEQUENCE)]
    kind: Kind
    payload: Annotated[bytes, Meta(max_length=MAX_PAYLOAD_BYTES)]
    signature: Signature

    def signed_bytes(self, swarm: str) -> bytes:
        """What the signature covers: everything but itself, with domain, version and swarm."""
        return signed_bytes(swarm, self.author, self.sequence, self.kind, self.payload)


def signed_bytes(swarm: str, author: str, sequence: int, kind: Kind, payload: bytes) -> bytes:
    """The bytes to sign for a new envelope; unambiguous, because msgpack frames each part."""
    return _DOMAIN + msgspec.msgpack.encode(
        [FORMAT_VERSION, swarm, author, sequence, kind, payload]
    )


def seal(
    swarm: str, author: str, sequence: int, kind: Kind, payload: bytes, *, sign: Sign
) -> Envelope:
    """Sign a payload as `author`, whose key `sign` uses."""
    signature = sign(signed_bytes(swarm, author, sequence, kind, payload))
    return Envelope(author, sequence, kind, payload, signature)


def encode(envelope: Envelope) -> bytes:
    """The one encoding of an envelope, at most `MAX_ENVELOPE_BYTES` if it was checked."""
    return bytes([FORMAT_VERSION]) + msgspec.msgpack.encode(envelope)


def decode(data: bytes) -> Envelope:
    """Decode any bytes; the signature is *not* checked here.

    Raises:
        UpdateRejected: too large, of another version, or not the canonical encoding of an envelope.
    """
    body = versioned_body(data, version=FORMAT_VERSION, max_bytes=MAX_ENVELOPE_BYTES)
    try:
        envelope = msgspec.msgpack.decode(body, type=Envelope)
    except ValueError as error:  # also msgspec's errors and bad UTF-8
        raise UpdateRejected(RejectReason.MALFORMED, "not an envelope") from error
    if encode(envelope) != data:
        # Otherwise anyone could re-encode an envelope, and the author would seem to contradict
        # itself with two different byte strings for one sequence.
        raise UpdateRejected(RejectReason.MALFORMED, "not the canonical encoding")
    return envelope


def versioned_body(data: bytes, *, version: int, max_bytes: int) -> memoryview:
    """Check size and leading version byte; return the rest without a copy.

    Raises:
        UpdateRejected: longer than `max_bytes`, empty, or of another version.
    """
    if len(data) > max_bytes:
        raise UpdateRejected(RejectReason.TOO_LARGE, f"{len(data)} bytes, limit {max_bytes}")
    if not data:
        raise UpdateRejected(RejectReason.MALFORMED, "empty")
    if data[0] != version:
        raise UpdateRejected(RejectReason.WRONG_VERSION, f"format {data[0]}, we speak {version}")
    return memoryview(data)[1:]
