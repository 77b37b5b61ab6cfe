"""Who is alive, and in what state: signed beats that are forgotten after a while.

Kept out of the documents, which never forget an overwrite. Sans-IO: `now` is any clock that only
goes forward, in seconds. A beat says itself for how long it is good, and counts from when it was
made as far as those say who passed it on; no two clocks are compared. Each has a higher number
than its author's beat before. A suspicion (as in SWIM, Das et al. 2002) names the last beat that
was heard of a member and leaves it a moment to make a newer one; it is not signed, and all that a
false one costs is that beat. A node that has just started cannot tell an old beat, replayed by a
hostile member, from a fresh one, for as long as that beat is good.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from .envelope import AuthorId, IsMember, Sign, Signature, Verify, versioned_body
from .errors import RecordMalformed, RejectReason, UpdateRejected
from .state_vector import MAX_AUTHORS
from .values import decode_value, encode_value

FORMAT_VERSION = 2
MAX_TTL_S = 3600
MAX_STATE_BYTES = 1024
MAX_BEAT_BYTES = MAX_STATE_BYTES + 256
MAX_NEWS_BYTES = 4096
MAX_BEATS = 32  # in one piece of news
MAX_SUSPICIONS = 32

_DOMAIN = b"covey/store/beat\x00"

_BeatClock: TypeAlias = Annotated[int, Meta(ge=0, le=2**53)]
_Seconds: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_TTL_S)]


class Beat(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One sign of life; `clock` numbers the beats of an author, upwards."""

    author: AuthorId
    clock: _BeatClock
    ttl_s: _Seconds  # 0: the author's last
    state: Annotated[bytes, Meta(max_length=MAX_STATE_BYTES)]  # canonical JSON
    signature: Signature


class Told(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A beat as one member hands it to another."""

    age_s: _Seconds  # since it was made, by the clock of who passes it on
    beat: Annotated[bytes, Meta(max_length=MAX_BEAT_BYTES)]


class Suspicion(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Somebody gets no answer from a member, of whom the last beat that it heard was `clock`."""

    author: AuthorId
    clock: _BeatClock


class News(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a member passes on about the lives of others."""

    beats: Annotated[tuple[Told, ...], Meta(max_length=MAX_BEATS)] = ()
    suspicions: Annotated[tuple[Suspicion, ...], Meta(max_length=MAX_SUSPICIONS)] = ()

    def encode(self) -> bytes:
        """The bytes that travel; beyond MAX_NEWS_BYTES nobody takes them."""
        return bytes([FORMAT_VERSION]) + msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> News:
        """Decode any bytes; the beats in it are not looked at yet.

        Raises:
            UpdateRejected: too large, malformed or of another version.
        """
        body = versioned_body(data, version=FORMAT_VERSION, max_bytes=MAX_NEWS_BYTES)
        try:
            return msgspec.msgpack.decode(body, type=cls)
        except ValueError as error:
            raise UpdateRejected(RejectReason.MALFORMED, "no news of lives") from error


@dataclass(frozen=True, slots=True)
class _Life:
    clock: int
    state: dict[str, Any]
    made_at: float
    expires_at: float
    beat: bytes
    is_suspected: bool = False


class Awareness:
    """The members whose beats are still good, and this node by its own."""

    def __init__(
        self,
        author: str,
        *,
        swarm: str,
        sign: Sign,
        verify: Verify,
        is_member: IsMember,
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
        self._clock = started_ms
        # Outlives the life, so that an old beat cannot bring a dead peer back.
        self._clocks: dict[str, int] = {}
        self._own_life: _Life | None = None
        self._lives: dict[str, _Life] = {}

    def beat(self, now: float, state: Mapping[str, object], *, ttl_s: int) -> Told:
        """A sign of life to send to some peers, with up to 1 KiB of JSON.

        Args:
            ttl_s: for how long it is good, at most an hour; 0 takes leave of everybody at once.

        Raises:
            ValueError: the state is not made of JSON types.
            StoreFull: it is too long.
        """
        encoded = encode_value(state, max_bytes=MAX_STATE_BYTES)
        self._clock += 1
        signed = self._signed_bytes(self._author, self._clock, ttl_s, encoded)
        beat = _encode(Beat(self._author, self._clock, ttl_s, encoded, self._sign(signed)))
        self._own_life = _Life(self._clock, decode_value(encoded), now, now + ttl_s, beat)
        return Told(0, beat)

    def receive(self, told: Told, now: float) -> bool:
        """Take in a beat; True if it is new, so worth passing on as it is.

        An older beat than the author's last is no news; it is counted as `replayed`.

        Raises:
            UpdateRejected: it is malformed, forged or not a member's; counted in `rejected`.
        """
        try:
            return self._receive(told, now)
        except UpdateRejected as error:
            self.rejected[error.reason] += 1
            raise

    def suspect(self, peer: str) -> Suspicion | None:
        """What to tell of a peer that does not answer us; None if nobody believes it alive."""
        life = self._lives.get(peer)
        return None if life is None or life.is_suspected else Suspicion(peer, life.clock)

    def doubt(self, suspicion: Suspicion, now: float, *, within_s: float) -> bool:
        """Take in a suspicion; True if it is new.

        The member is forgotten unless a newer beat of it comes `within_s`. If it is this node that
        is doubted, the answer is True, and asks for such a beat.
        """
        if suspicion.author == self._author:
            return True
        life = self._lives.get(suspicion.author)
        if life is None or life.is_suspected or suspicion.clock < life.clock:
            return False
        self._lives[suspicion.author] = _Life(
            life.clock,
            life.state,
            life.made_at,
            min(life.expires_at, now + within_s),
            life.beat,
            is_suspected=True,
        )
        return True

    def known(self, now: float) -> Iterator[News]:
        """All that we believe alive, ourselves included, for a peer that we have just met."""
        lives = [*self._lives.values(), *([self._own_life] if self._own_life else [])]
        good = [life for life in lives if life.expires_at > now and not life.is_suspected]
        yield from _pieces(Told(int(now - life.made_at), life.beat) for life in good)

    def live(self, now: float) -> dict[str, dict[str, Any]]:
        """Peer id -> state in its last beat, sorted by peer id; this node is among them."""
        lives = dict(self._lives)
        if self._own_life is not None:
            lives[self._author] = self._own_life
        return {peer: lives[peer].state for peer in sorted(lives) if lives[peer].expires_at > now}

    def expire(self, now: float) -> list[str]:
        """Drop the peers whose last beat is no longer good; return them, first ended first.

        This node is never among them.
        """
        gone = [peer for peer, life in self._lives.items() if life.expires_at <= now]
        gone.sort(key=lambda peer: self._lives[peer].expires_at)
        for peer in gone:
            del self._lives[peer]
        return gone

    def forget(self, peer: str) -> None:
        """Drop a removed member at once; `is_member` must refuse it from now on."""
        self._lives.pop(peer, None)
        self._clocks.pop(peer, None)

    def next_deadline(self) -> float | None:
        """When to call `expire` next; None while nobody is alive."""
        return min((life.expires_at for life in self._lives.values()), default=None)

    def _receive(self, told: Told, now: float) -> bool:
        beat = _decode(told.beat)
        author = beat.author
        if author == self._author:
            return False
        last = self._clocks.get(author, -1)
        if beat.clock == last:
            return False  # most are: everybody hears each beat from several sides
        if not self._is_member(author):
            raise UpdateRejected(RejectReason.UNKNOWN_AUTHOR, "the author is no member")
        signed = self._signed_bytes(author, beat.clock, beat.ttl_s, beat.state)
        if not self._verify(author, beat.signature, signed):
            raise UpdateRejected(RejectReason.BAD_SIGNATURE, "not signed by its author")
        if beat.clock < last:
            self.rejected[RejectReason.REPLAYED] += 1
            return False
        try:
            state = decode_value(beat.state, max_bytes=MAX_STATE_BYTES)
        except RecordMalformed as error:
            raise UpdateRejected(RejectReason.UNREADABLE, "its state is not JSON") from error
        if author not in self._clocks and len(self._clocks) >= MAX_AUTHORS:
            raise UpdateRejected(RejectReason.TOO_LARGE, "too many authors")
        self._clocks[author] = beat.clock
        made_at = now - told.age_s
        if made_at + beat.ttl_s > now:
            life = _Life(beat.clock, state, made_at, made_at + beat.ttl_s, told.beat)
            self._lives[author] = life
        else:
            self._lives.pop(author, None)
        return True

    def _signed_bytes(self, author: str, clock: int, ttl_s: int, state: bytes) -> bytes:
        fields = [FORMAT_VERSION, self._swarm, author, clock, ttl_s, state]
        return _DOMAIN + msgspec.msgpack.encode(fields)


def _pieces(told: Iterable[Told]) -> Iterator[News]:
    """As few pieces of news as their limits allow."""
    piece: list[Told] = []
    room = 0
    for one in told:
        nbytes = len(one.beat) + 8  # heads of an array, a number and a byte string
        if piece and (nbytes > room or len(piece) == MAX_BEATS):
            yield News(tuple(piece))
            piece = []
        if not piece:
            room = MAX_NEWS_BYTES - 16
        piece.append(one)
        room -= nbytes
    if piece:
        yield News(tuple(piece))


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
