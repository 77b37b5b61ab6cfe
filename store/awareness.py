"""Who is alive, and in what state: signed beats that are forgotten after a while.

Kept out of the documents, which never forget an overwrite. Sans-IO: `now` is any clock that only
goes forward, in seconds. A beat counts from when it arrives, so that clocks need not agree; each
has a higher number than its author's beat before. A node that has just started cannot tell an old
beat, replayed by a hostile member, from a fresh one, for one TTL each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from .envelope import AuthorId, IsMember, Sign, Signature, Verify, versioned_body
from .errors import RecordMalformed, RejectReason, UpdateRejected
from .values import decode_value, encode_value

FORMAT_VERSION = 1
MAX_STATE_BYTES = 1024
MAX_BEAT_BYTES = MAX_STATE_BYTES + 256

_DOMAIN = b"covey/store/beat\x00"


class Beat(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One sign of life; `clock` numbers the beats of an author, upwards."""

    author: AuthorId
    clock: Annotated[int, Meta(ge=0, le=2**53)]
    state: Annotated[bytes, Meta(max_length=MAX_STATE_BYTES)]  # canonical JSON
    signature: Signature


@dataclass(frozen=True, slots=True)
class _Life:
    state: dict[str, Any]
    expires_at: float


class Awareness:
    """The members heard of within the last `ttl_s` seconds, and this node by its own beats."""

    def __init__(
        self,
        author: str,
        *,
        swarm: str,
        sign: Sign,
        verify: Verify,
        is_member: IsMember,
        ttl_s: float,
        started_ms: int,
    ) -> None:
        """Begin a life of this node.

        Args:
            author: this node's peer id.
            started_ms: wall clock in milliseconds; where our beats start to count. Later than all
                beats of our last life, as long as it made less than one each millisecond.
        """
        self.rejected: Counter[RejectReason] = Counter()
        self._author = author
        self._swarm = swarm
        self._sign = sign
        self._verify = verify
        self._is_member = is_member
        self._ttl_s = ttl_s
        self._clock = started_ms
        # Outlives the TTL, so that an old beat cannot bring a dead peer back.
        self._clocks: dict[str, int] = {}
        self._own_life: _Life | None = None
        self._lives: dict[str, _Life] = {}  # peers, soonest to expire first: all live equally long

    def beat(self, now: float, state: Mapping[str, object]) -> bytes:
        """A sign of life to send to some peers, with up to 1 KiB of JSON.

        Raises:
            ValueError: the state is not made of JSON types.
            StoreFull: it is too long.
        """
        encoded = encode_value(state, max_bytes=MAX_STATE_BYTES)
        self._clock += 1
        self._own_life = _Life(decode_value(encoded), now + self._ttl_s)
        signature = self._sign(self._signed_bytes(self._author, self._clock, encoded))
        return _encode(Beat(self._author, self._clock, encoded, signature))

    def receive(self, data: bytes, now: float) -> bool:
        """Take in a beat; True if it is new, so worth passing on as it is.

        An older beat than the author's last is no news; it is counted as `replayed`.

        Raises:
            UpdateRejected: it is malformed, forged or not a member's; counted in `rejected`.
        """
        try:
            return self._receive(data, now)
        except UpdateRejected as error:
            self.rejected[error.reason] += 1
            raise

    def live(self, now: float) -> dict[str, dict[str, Any]]:
        """Peer id -> state in its last beat, sorted by peer id; this node is among them."""
        lives = dict(self._lives)
        if self._own_life is not None:
            lives[self._author] = self._own_life
        return {peer: lives[peer].state for peer in sorted(lives) if lives[peer].expires_at > now}

    def expire(self, now: float) -> list[str]:
        """Drop the peers not heard of for the TTL; return them, longest silent first.

        This node is never among them.
        """
        gone = [peer for peer, life in self._lives.items() if life.expires_at <= now]
        for peer in gone:
            del self._lives[peer]
        return gone

    def forget(self, peer: str) -> None:
        """Drop a removed member at once; `is_member` must refuse it from now on."""
        self._lives.pop(peer, None)
        self._clocks.pop(peer, None)

    def next_deadline(self) -> float | None:
        """When to call `expire` next; None while nobody is alive."""
        return next((life.expires_at for life in self._lives.values()), None)

    def _receive(self, data: bytes, now: float) -> bool:
        beat = _decode(data)
        author = beat.author
        if author == self._author:
            return False
        if not self._is_member(author):
            raise UpdateRejected(RejectReason.UNKNOWN_AUTHOR, "the author is no member")
        signed = self._signed_bytes(author, beat.clock, beat.state)
        if not self._verify(author, beat.signature, signed):
            raise UpdateRejected(RejectReason.BAD_SIGNATURE, "not signed by its author")
        last = self._clocks.get(author, -1)
        if beat.clock < last:
            self.rejected[RejectReason.REPLAYED] += 1
        if beat.clock <= last:
            return False
        try:
            state = decode_value(beat.state, max_bytes=MAX_STATE_BYTES)
        except RecordMalformed as error:
            raise UpdateRejected(RejectReason.UNREADABLE, "its state is not JSON") from error
        self._clocks[author] = beat.clock
        self._lives.pop(author, None)
        self._lives[author] = _Life(state, now + self._ttl_s)
        return True

    def _signed_bytes(self, author: str, clock: int, state: bytes) -> bytes:
        return _DOMAIN + msgspec.msgpack.encode([FORMAT_VERSION, self._swarm, author, clock, state])


def _encode(beat: Beat) -> bytes:
    return bytes([FORMAT_VERSION]) + msgspec.msgpack.encode(beat)


def _decode(data: bytes) -> Beat:
    body = versioned_body(data, version=FORMAT_VERSION, max_bytes=MAX_BEAT_BYTES)
    try:
        beat = msgspec.msgpack.decode(body, type=Beat)
    except ValueError as error:
        raise UpdateRejected(RejectReason.MALFORMED, "not a beat") from error
    if _encode(beat) != data:
        raise UpdateRejected(RejectReason.MALFORMED, "not the canonical encoding")
    return beat
