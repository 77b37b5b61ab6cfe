"""Anti-entropy over one link: two replicas tell each other what they hold and send the rest.

Sans-IO: bytes in, bytes out, no clock. A *summary* is a digest of what its sender holds; whoever
holds something else says hello. A *hello* carries a state vector. Whoever gets one sends
*batches* of the envelopes that the other lacks and, where it lacks something itself, a hello of its
own; whoever got something new from a batch marked last says hello again. That ends when there is
nothing new. Any message may be lost, doubled or late, if the summary is repeated now and then.

A message is a version byte and a tagged msgpack array, at most 256 KiB; the work for one is
bounded by 128 envelopes received, or 1 MiB sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from .envelope import MAX_ENVELOPE_BYTES, versioned_body
from .errors import RejectReason, UpdateRejected
from .replica import Replica
from .state_vector import MAX_VECTOR_BYTES

FORMAT_VERSION = 1
DIGEST_BYTES = 16
MAX_MESSAGE_BYTES = 256 * 1024
MAX_ENVELOPES_PER_BATCH = 128  # 30 ms: 230 us each to verify, apply and store (2-core x86)
MAX_REPLY_BYTES = 1024 * 1024  # sent for one hello; more needs another

# Version, length of the array, tag; and the head of the one field that a summary has.
_SUMMARY_HEAD = bytes([FORMAT_VERSION]) + b"\x92\xa7summary\xc4" + bytes([DIGEST_BYTES])
_SUMMARY_BYTES = len(_SUMMARY_HEAD) + DIGEST_BYTES
_BATCH_HEAD = bytes([FORMAT_VERSION]) + b"\x93\xa5batch"
_BATCH_OVERHEAD_BYTES = 32
_ENVELOPE_OVERHEAD_BYTES = 5  # msgpack head of a byte string

_EnvelopeBytes: TypeAlias = Annotated[bytes, Meta(max_length=MAX_ENVELOPE_BYTES)]


class Summary(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="summary"
):
    """A digest of the sender's state vector, which itself takes seventy bytes a member."""

    digest: Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class Hello(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="hello"):
    """What the sender holds; an answer is not answered with another hello."""

    vector: Annotated[bytes, Meta(max_length=MAX_VECTOR_BYTES)]
    is_answer: bool


class Batch(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="batch"):
    """Envelopes that the receiver lacked when it said hello."""

    envelopes: Annotated[tuple[_EnvelopeBytes, ...], Meta(max_length=MAX_ENVELOPES_PER_BATCH)]
    is_last: bool  # of those sent for one hello


class SyncSession:
    """One end of the exchange with one peer."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._got_new = False  # since the last batch marked as last
        self._turn = 0

    def summary(self) -> bytes:
        """The message to begin with, and to repeat from time to time."""
        return _encode(Summary(_digest(self._replica.state_vector())))

    def hello(self) -> bytes:
        """What we hold, in full; `receive` says it where that is needed."""
        return _encode(Hello(self._replica.state_vector(), is_answer=False))

    def receive(self, message: bytes) -> list[bytes]:
        """Take in any bytes from the peer; return the messages to send back, in order.

        Envelopes that are refused are counted by the replica and do not stop the rest.

        Raises:
            UpdateRejected: the message itself is too large, malformed or of another version.
            StoreError: the replica could not be written to disk.
        """
        match _decode(message):
            case Summary(digest=digest):
                vector = self._replica.state_vector()
                return [] if digest == _digest(vector) else [self.hello()]
            case Hello() as hello:
                return list(self._answer(hello))
            case Batch() as batch:
                return self._take_in(batch)

    def _answer(self, hello: Hello) -> Iterator[bytes]:
        self._turn += 1
        missing = self._replica.missing_for(
            hello.vector, max_bytes=MAX_REPLY_BYTES, turn=self._turn
        )
        yield from map(_encode, _batches(missing))
        if not hello.is_answer and self._replica.lacks(hello.vector):
            yield self._answering_hello()

    def _take_in(self, batch: Batch) -> list[bytes]:
        for envelope_bytes in batch.envelopes:
            try:
                self._got_new |= self._replica.apply(envelope_bytes).is_new
            except UpdateRejected:
                continue
        if not (batch.is_last and self._got_new):
            return []
        self._got_new = False
        return [self._answering_hello()]

    def _answering_hello(self) -> bytes:
        return _encode(Hello(self._replica.state_vector(), is_answer=True))


def is_summary(message: bytes) -> bool:
    """Whether a message is a summary, which `receive` then never refuses."""
    return message.startswith(_SUMMARY_HEAD) and len(message) == _SUMMARY_BYTES


def is_batch(message: bytes) -> bool:
    """Whether a message is, or claims to be, a batch."""
    return message.startswith(_BATCH_HEAD)


def _batches(envelopes: Iterable[bytes]) -> list[Batch]:
    chunks: list[list[bytes]] = []
    room = 0
    for data in envelopes:
        nbytes = len(data) + _ENVELOPE_OVERHEAD_BYTES
        if not chunks or nbytes > room or len(chunks[-1]) == MAX_ENVELOPES_PER_BATCH:
            chunks.append([])
            room = MAX_MESSAGE_BYTES - _BATCH_OVERHEAD_BYTES
        chunks[-1].append(data)
        room -= nbytes
    return [
        Batch(tuple(chunk), is_last=number == len(chunks))
        for number, chunk in enumerate(chunks, start=1)
    ]


def _digest(vector: bytes) -> bytes:
    return hashlib.sha256(vector).digest()[:DIGEST_BYTES]


def _encode(message: Summary | Hello | Batch) -> bytes:
    return bytes([FORMAT_VERSION]) + msgspec.msgpack.encode(message)


def _decode(data: bytes) -> Summary | Hello | Batch:
    body = versioned_body(data, version=FORMAT_VERSION, max_bytes=MAX_MESSAGE_BYTES)
    try:
        return msgspec.msgpack.decode(body, type=Summary | Hello | Batch)
    except ValueError as error:
        raise UpdateRejected(RejectReason.MALFORMED, "not a sync message") from error
