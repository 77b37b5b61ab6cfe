"""Links inside one process, with delay, loss and breakage drawn from a seed.

For tests and simulations: works under a loop with virtual time and passes the conformance suite of
real links. Frames go through the codec, so what a real link would refuse is refused here. Links are
reliable: a lost frame is sent again later, and those behind it wait, as in TCP.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from dataclasses import dataclass

from .codec import decode_frame, encode_frame
from .errors import LinkBroken, LinkClosed, ProtocolViolation, TransportError
from .frame import Frame
from .link import LinkKind

SEND_BUFFER_BYTES = 8 << 20
POST_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a frame meets on its way, each way."""

    delay_s: float = 0.0
    jitter_s: float = 0.0  # up to this much more, evenly spread
    loss: float = 0.0  # probability that one transmission of a frame is lost
    retransmit_s: float = 0.2  # until it is sent again


@dataclass(frozen=True, slots=True)
class _Sent:
    """A frame on its way."""

    header: bytes
    body: bytes
    is_posted: bool

    @property
    def nbytes(self) -> int:
        return len(self.header) + len(self.body)

    @property
    def posted(self) -> int:
        return self.nbytes if self.is_posted else 0


class MemoryLink:
    """One end of a pair; made by `memory_link_pair`."""

    kind = LinkKind.MEMORY
    remote = None
    packets = None

    def __init__(
        self, peer_id: str, conditions: Conditions, randomness: random.Random, *, is_dialer: bool
    ) -> None:
        self.peer_id = peer_id
        self.is_dialer = is_dialer
        self.bytes_sent = 0
        self.bytes_received = 0
        self._conditions = conditions
        self._random = randomness
        self._loop = asyncio.get_running_loop()
        self._other: MemoryLink = self  # until paired
        self._error: TransportError | None = None
        self._is_stalled = False
        self._arrives_at = 0.0  # of the last frame sent
        self._on_the_way: deque[_Sent | None] = deque()  # None: the end
        self._unread_bytes = 0  # sent to us and not yet received by our owner
        self._posted_bytes = 0  # of these, what was posted
        self._received: deque[tuple[Frame, int, int]] = deque()
        self._changed: asyncio.Future[None] = self._loop.create_future()

    async def send(self, frame: Frame) -> None:
        """See `Link.send`."""
        while self._other._unread_bytes > SEND_BUFFER_BYTES and self._error is None:
            await asyncio.shield(self._changed)
        self._transmit(frame, is_posted=False)

    def post(self, frame: Frame) -> None:
        """See `Link.post`."""
        if self._other._posted_bytes > POST_BUFFER_BYTES:
            self.abort(LinkBroken("the peer does not read its answers"))
        self._transmit(frame, is_posted=True)

    async def receive(self) -> Frame:
        """See `Link.receive`."""
        while not self._received:
            if self._error is not None:
                raise self._error
            await asyncio.shield(self._changed)
        frame, nbytes, posted = self._received.popleft()
        self._unread_bytes -= nbytes
        self._posted_bytes -= posted
        self._other._notify()
        return frame

    def suspect(self) -> None:
        """See `Link.suspect`."""
        self.abort(LinkBroken("the peer has fallen silent"))

    def abort(self, error: TransportError) -> None:
        """See `Link.abort`."""
        self._received.clear()
        self._end(error)
        self._other._end(LinkBroken("the connection to the peer was lost"))

    async def aclose(self) -> None:
        """See `Link.aclose`; what was sent before still arrives."""
        if self._error is None:
            self._end(LinkClosed(by_peer=False))
            self._dispatch(None)

    def break_(self) -> None:
        """Cut the link: both ends see it broken at once, and what is on the way is lost."""
        self.abort(LinkBroken("the connection to the peer was lost"))

    def stall(self) -> None:
        """Deliver nothing more either way, and tell nobody: a stopped process, a pulled cable."""
        self._is_stalled = self._other._is_stalled = True

    def _transmit(self, frame: Frame, *, is_posted: bool) -> None:
        if self._error is not None:
            raise self._error
        header, buffers = encode_frame(frame)
        sent = _Sent(header, b"".join(buffers), is_posted)
        self.bytes_sent += sent.nbytes
        self._other._unread_bytes += sent.nbytes
        self._other._posted_bytes += sent.posted
        self._dispatch(sent)

    def _dispatch(self, sent: _Sent | None) -> None:
        conditions = self._conditions
        delay_s = conditions.delay_s + conditions.jitter_s * self._random.random()
        while self._random.random() < conditions.loss:
            delay_s += conditions.retransmit_s
        self._arrives_at = max(self._arrives_at, self._loop.time() + delay_s)
        self._on_the_way.append(sent)
        self._loop.call_at(self._arrives_at, self._arrive)

    def _arrive(self) -> None:
        # Timers of one instant may run in any order; the queue keeps the frames in theirs.
        sent = self._on_the_way.popleft()
        if not self._is_stalled:
            self._other._take(sent)

    def _take(self, sent: _Sent | None) -> None:
        if self._error is not None:
            return
        if sent is None:
            self._end(LinkClosed(by_peer=True))
            return
        self.bytes_received += sent.nbytes
        try:
            frame = decode_frame(sent.header, bytearray(sent.body))
            self._received.append((frame, sent.nbytes, sent.posted))
        except ProtocolViolation as error:
            self.abort(error)
        self._notify()

    def _end(self, error: TransportError) -> None:
        if self._error is None:
            self._error = error
            self._notify()
            self._other._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, self._loop.create_future()
        changed.set_result(None)


def memory_link_pair(
    a: str, b: str, *, conditions: Conditions | None = None, seed: int = 0
) -> tuple[MemoryLink, MemoryLink]:
    """The end that peer `a` holds (it leads to `b`), and the end that `b` holds."""
    randomness = random.Random(seed)  # noqa: S311 - weather, not a secret
    at_a = MemoryLink(b, conditions or Conditions(), randomness, is_dialer=True)
    at_b = MemoryLink(a, conditions or Conditions(), randomness, is_dialer=False)
    at_a._other, at_b._other = at_b, at_a
    return at_a, at_b
