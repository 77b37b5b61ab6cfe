"""Lanes whose messages are handed over in memory: between two threads, or by the event loop.

`MemoryLane` is for tests and simulations; `LinkLane` carries a lane over the peer's link where no
connection of its own can be made, at the price of two hand-overs between threads for each message.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

from covey.transport.errors import TransportError
from covey.transport.frame import Buffer

from .errors import LaneBroken, LaneTimeout
from .lane import MAX_MESSAGE, LaneKind
from .stream import SEND_TIMEOUT_S
from .waiting import SPIN_S, Readiness

MAX_WAITING_BYTES = 2 * MAX_MESSAGE  # in an inbox; a peer that sends more loses the lane


class Inbox:
    """Messages that have come, and a file that is readable while there are any, or it has ended.

    Any thread may put, one takes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._messages: deque[Buffer] = deque()
        self._nbytes = 0
        self._broken: LaneBroken | None = None
        self._is_marked = False
        self._near, self._far = socket.socketpair()
        for end in (self._near, self._far):
            end.setblocking(False)

    def fileno(self) -> int:
        """The file."""
        return self._near.fileno()

    def put(self, message: Buffer) -> None:
        """Add a message; an inbox that runs over ends."""
        with self._lock:
            if self._broken is not None:
                return
            self._messages.append(message)
            self._nbytes += len(message)
            if self._nbytes > MAX_WAITING_BYTES:
                self._end(LaneBroken("the peer sends more than is taken"), keep=False)
            self._mark()

    def take(self) -> memoryview | None:
        """The oldest message; None if there is none yet. Raises LaneBroken."""
        with self._lock:
            if not self._messages:
                if self._broken is not None:
                    raise LaneBroken(self._broken.reason)
                return None
            message = self._messages.popleft()
            self._nbytes -= len(message)
            if not self._messages and self._broken is None:
                self._near.recv(1)
                self._is_marked = False
            return memoryview(message)

    def end(self, reason: str, *, keep: bool) -> None:
        """No more will come; `keep` leaves what is here to be taken."""
        with self._lock:
            self._end(LaneBroken(reason), keep=keep)

    def raise_if_ended(self) -> None:
        """Raise LaneBroken if no more will come."""
        if self._broken is not None:
            raise LaneBroken(self._broken.reason)

    def free(self) -> None:
        """Nobody waits for the file any more."""
        self._near.close()
        self._far.close()

    def _end(self, error: LaneBroken, *, keep: bool) -> None:
        if self._broken is None:
            self._broken = error
            self._mark()
        if not keep:
            self._messages.clear()
            self._nbytes = 0

    def _mark(self) -> None:
        if not self._is_marked:
            self._is_marked = True
            self._far.send(b"\0")


class _InboxLane:
    """What the two have in common: receiving."""

    def __init__(self, peer_id: str, kind: LaneKind, *, spin_s: float) -> None:
        self.peer_id = peer_id
        self.kind: LaneKind = kind
        self.inbox = Inbox()
        self._file = self.inbox.fileno()
        self._readiness = Readiness((self._file,), spin_s=spin_s)

    def fileno(self) -> int:
        """See `Lane.fileno`."""
        return self._file

    def receive(self, timeout_s: float) -> memoryview:
        """See `Lane.receive`."""
        message = self.inbox.take()
        if message is None:
            self._readiness.wait(timeout_s)
            message = self.inbox.take()
        if message is None:
            raise LaneTimeout(timeout_s)
        return message

    def poll(self) -> memoryview | None:
        """See `Lane.poll`."""
        return self.inbox.take()

    def has_unseen(self) -> bool:
        """See `Lane.has_unseen`; its file tells of everything."""
        return False

    def __del__(self) -> None:
        self.inbox.free()


class MemoryLane(_InboxLane):
    """One end of a pair within this process; made by `memory_lane_pair`."""

    def __init__(self, peer_id: str, *, spin_s: float = SPIN_S) -> None:
        """Half a pair."""
        super().__init__(peer_id, "local", spin_s=spin_s)
        self._other = self.inbox  # until paired

    def pair_with(self, other: MemoryLane) -> None:
        """Make the two each other's end."""
        self._other, other._other = other.inbox, self.inbox

    def send(self, *parts: Buffer) -> None:
        """See `Lane.send`."""
        message = _joined(parts)
        self.inbox.raise_if_ended()
        self._other.put(message)

    def close(self) -> None:
        """See `Lane.close`; what was sent before still arrives."""
        self.inbox.end("it was closed", keep=False)
        self._other.end("the peer hung up", keep=True)


def memory_lane_pair(a: str, b: str, *, spin_s: float = SPIN_S) -> tuple[MemoryLane, MemoryLane]:
    """The end that peer `a` holds (it leads to `b`), and the end that `b` holds."""
    at_a, at_b = MemoryLane(b, spin_s=spin_s), MemoryLane(a, spin_s=spin_s)
    at_a.pair_with(at_b)
    return at_a, at_b


class LinkLane(_InboxLane):
    """A lane over the peer's link. `post(message)` sends one on the event loop, `end()` the end."""

    def __init__(
        self,
        peer_id: str,
        *,
        post: Callable[[bytes], Awaitable[None]],
        end: Callable[[], None],
        spin_s: float = SPIN_S,
    ) -> None:
        """Made on the event loop; whoever hears the peer's frames puts them into `inbox`."""
        super().__init__(peer_id, "link", spin_s=spin_s)
        self._loop = asyncio.get_running_loop()
        self._post = post
        self._end = end

    def send(self, *parts: Buffer) -> None:
        """See `Lane.send`."""
        message = _joined(parts)
        self.inbox.raise_if_ended()
        sent = self._on_loop(message)
        try:
            sent.result(SEND_TIMEOUT_S)
        except TimeoutError as error:
            sent.cancel()
            self.close()
            raise LaneBroken(f"the peer took nothing for {SEND_TIMEOUT_S:g} s") from error
        except (TransportError, concurrent.futures.CancelledError) as error:
            self.close()
            raise LaneBroken("the link to the peer ended") from error

    def close(self) -> None:
        """See `Lane.close`."""
        self.inbox.end("it was closed", keep=False)
        with suppress(RuntimeError):  # the loop has ended, and the link with it
            self._loop.call_soon_threadsafe(self._end)

    def _on_loop(self, message: bytes) -> concurrent.futures.Future[None]:
        async def post() -> None:
            await self._post(message)

        work = post()
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError as error:
            work.close()
            raise LaneBroken("this node has stopped") from error


def _joined(parts: tuple[Buffer, ...]) -> bytes:
    """A copy, since the caller goes on with its buffers. Raises ValueError."""
    message = b"".join(parts)
    if len(message) > MAX_MESSAGE:
        raise ValueError(f"a message of {len(message)} bytes, over {MAX_MESSAGE}")
    return message
