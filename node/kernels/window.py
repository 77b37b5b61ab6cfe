"""A window on weights that are larger than memory: read for each pass, a little ahead of their use.

Parts of files are read one after the other, and behind the last the first again, into a few places
in memory: while one part is computed with, the next comes in, so that a pass takes as long as the
slower of disk and engine. Knows nothing of what is in the parts. They are as good as the files were
when they were opened and checked; a file stays ours whatever becomes of its name.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

from covey.node.disk import ColdFile, read_memory, room_for

from .errors import WeightsUnreadable
from .library import Bytes

N_PLACES = 2  # of a window: one part in use, one on its way


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [offset, offset + n_bytes) of a file of packed weights."""

    file: ColdFile
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """What was read from disk so far, and what that cost whoever computes."""

    n_passes: int
    read_bytes: int
    read_s: float  # that the disk worked
    stall_s: float  # that the engine waited

    @property
    def bytes_per_s(self) -> float:
        """Speed of the disk while it was read."""
        return self.read_bytes / self.read_s if self.read_s else 0.0


class Window:
    """Extents in memory when their turn comes; used by one thread, read by another.

    Args:
        extents: in the order of use.
        n_places: how many are in memory at once, the one in use included.
    """

    def __init__(self, extents: Sequence[Extent], n_places: int = N_PLACES) -> None:
        n_places = min(n_places, len(extents))
        room = room_for(max(extent.n_bytes for extent in extents))
        places = [read_memory(room) for _ in range(n_places)]
        self.memory_bytes = sum(place.nbytes for place in places)
        self._state = _State(tuple(extents), places)
        threading.Thread(
            target=_read_ahead, args=(self._state,), name="weight window", daemon=True
        ).start()
        # The thread knows only the state, so that it does not keep the window alive.
        self.close = weakref.finalize(self, _stop, self._state)

    def take(self, idx: int) -> Bytes:
        """The bytes of extent `idx`, valid until another is taken or this one released.

        Whoever asks in another order than that of the extents waits for all that lies between.

        Raises:
            WeightsUnreadable: the disk failed, or the window is closed. Asking again tries again.
        """
        state = self._state
        with state.changed:
            state.move_to(idx)
            if state.is_missing:
                state.wait()
            state.is_held = True
            return state.held[state.first % len(state.places)]

    def release(self) -> None:
        """Give up the extent that was taken last, if it is still held: its place is read into."""
        state = self._state
        with state.changed:
            if state.is_held:
                state.advance(1)

    @property
    def facts(self) -> StreamFacts:
        """What was read so far."""
        state = self._state
        with state.changed:
            n_passes = state.first // len(state.extents)
            return StreamFacts(n_passes, state.read_bytes, state.read_s, state.stall_s)


@dataclass(slots=True)
class _State:
    """What user and reader share. Job j, of endlessly many, is extent j modulo their number.

    Jobs [first, next_read) are in memory, each in place j modulo the number of places; the reader
    works on `next_read` if that is less than a window's length away from `first`.
    """

    extents: tuple[Extent, ...]
    places: list[Bytes]
    held: list[Bytes] = field(default_factory=list)  # the bytes in each place,
    contents: list[int | None] = field(default_factory=list)  # and of which extent they are
    first: int = 0
    next_read: int = 0
    is_held: bool = False  # whether `first` is in use
    is_closed: bool = False
    error: WeightsUnreadable | None = None
    read_bytes: int = 0
    read_s: float = 0.0
    stall_s: float = 0.0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        """Nothing was read yet."""
        self.held, self.contents = list(self.places), [None] * len(self.places)

    def move_to(self, idx: int) -> None:
        """Make the next job with extent `idx` the first, and forget those before it."""
        self.advance((idx - self.first) % len(self.extents))

    def advance(self, n_jobs: int) -> None:
        """Forget the next jobs."""
        if n_jobs:
            self.is_held = False
            self.first += n_jobs
            self.changed.notify_all()

    def may_read(self) -> bool:
        """Whether there is room for the next job, and the last one did not fail."""
        n_ahead = max(self.next_read, self.first) - self.first
        return n_ahead < len(self.places) and self.error is None

    @property
    def is_missing(self) -> bool:
        """Whether the first job has yet to be read."""
        return self.next_read <= self.first

    def wait(self) -> None:
        """Until the first job is there; a failure from before somebody waited is tried again."""
        self._try_again()
        began_at = time.perf_counter()
        self.changed.wait_for(lambda: self.is_closed or self.error or not self.is_missing)
        self.stall_s += time.perf_counter() - began_at
        if self.is_missing:
            raise self.error or WeightsUnreadable("the window is closed")

    def _try_again(self) -> None:
        self.error = None
        self.changed.notify_all()


def _read_ahead(state: _State) -> None:
    """The reader's thread."""
    while True:
        with state.changed:
            state.changed.wait_for(lambda: state.is_closed or state.may_read())
            if state.is_closed:
                break
            job = state.next_read = max(state.next_read, state.first)
        idx, place = job % len(state.extents), job % len(state.places)
        if state.contents[place] != idx and not _read(state, idx, place):
            continue
        with state.changed:
            state.next_read = job + 1
            state.changed.notify_all()
    for each in state.extents:
        each.file.close()


def _read(state: _State, idx: int, place: int) -> bool:
    """Read an extent; whether that went well."""
    extent = state.extents[idx]
    state.contents[place] = None  # until it is whole
    began_at = time.perf_counter()
    try:
        data = extent.file.read_into(state.places[place], extent.offset, extent.n_bytes)
    except OSError as error:
        with state.changed:
            state.error = WeightsUnreadable(f"{extent.file.path}: {error.strerror or error}")
            state.changed.notify_all()
        return False
    with state.changed:
        state.held[place], state.contents[place] = data, idx
        state.read_bytes += extent.n_bytes
        state.read_s += time.perf_counter() - began_at
    return True


def _stop(state: _State) -> None:
    with state.changed:
        state.is_closed = True
        state.changed.notify_all()
