"""The log of one author: what a replica holds of it, in the order it was written.

A log is a base and what follows it without gaps: the base is the author's latest snapshot, or
nothing (0) where there was none. Envelopes that came too early wait in a bounded buffer, and
anti-entropy fetches them again if they are dropped. Envelopes given to this module are already
verified; it knows no keys and no disk.
"""

from __future__ import annotations

from dataclasses import dataclass

from .document import Document, HalfApplied
from .envelope import Envelope, Kind, decode
from .errors import RejectReason, UpdateRejected

# An author compacts its own log far below these (`replica.COMPACT_AFTER_*`), so that whoever
# reaches them is broken or hostile, and would fill every other member's memory and disk.
MAX_LOG_ENVELOPES = 4096
MAX_LOG_BYTES = 2 * 1024 * 1024

MAX_WAITING_ENVELOPES = 64
MAX_WAITING_BYTES = 512 * 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """An envelope and the very bytes it came in."""

    envelope: Envelope
    data: bytes


class AuthorLog:
    """Envelopes of one author, from its latest snapshot on, and the document they add up to."""

    def __init__(self) -> None:
        self.document = Document()
        self.base = 0  # sequence of the snapshot it begins with; 0: it begins with nothing
        self.last = 0
        self.nbytes = 0  # of all envelopes held, the snapshot included
        self._data: list[bytes] = []  # sequences max(base, 1)..last
        self._waiting: dict[int, Entry] = {}

    def __len__(self) -> int:
        """How many envelopes are held, without those that wait."""
        return len(self._data)

    @property
    def base_nbytes(self) -> int:
        """Size of the snapshot it begins with; 0 if there is none."""
        return len(self._data[0]) if self.base else 0

    @property
    def newest(self) -> int:
        """The highest sequence seen, held or waiting."""
        return max(self._waiting, default=self.last)

    def has(self, sequence: int, data: bytes) -> bool:
        """Whether this very envelope is held, or waits."""
        waiting = self._waiting.get(sequence)
        return self._held(sequence) == data or (waiting is not None and waiting.data == data)

    def is_superseded(self, sequence: int) -> bool:
        """Whether a snapshot held here came after `sequence`."""
        return sequence < self.base

    def follows(self, envelope: Envelope) -> bool:
        """Whether the envelope can be appended now; a snapshot needs nothing before it."""
        if envelope.kind is Kind.SNAPSHOT:
            return envelope.sequence > self.last
        return envelope.sequence == self.last + 1

    def since(self, sequence: int) -> list[bytes]:
        """The envelopes that a replica which holds all up to `sequence` lacks, in order."""
        first = max(self.base, 1)
        return self._data[max(sequence + 1 - first, 0) :]

    def append(self, entry: Entry) -> frozenset[str]:
        """Take in an envelope that `follows`; return the keys whose values changed.

        Raises:
            UpdateRejected: `unreadable` payload, or the log is full (`too_large`); nothing changed.
        """
        envelope = entry.envelope
        if envelope.kind is Kind.SNAPSHOT:
            return self.restart(entry, Document.from_snapshot(envelope.payload))
        is_full = (
            len(self._data) >= MAX_LOG_ENVELOPES or self.nbytes + len(entry.data) > MAX_LOG_BYTES
        )
        if is_full:
            raise UpdateRejected(RejectReason.TOO_LARGE, "the author's log is full")
        try:
            changed = self.document.apply(envelope.payload)
        except HalfApplied:
            self.rebuild()
            raise
        self.record(entry)
        return changed

    def record(self, entry: Entry) -> None:
        """Append an envelope whose payload the document has in it already."""
        self._data.append(entry.data)
        self.last = entry.envelope.sequence
        self.nbytes += len(entry.data)

    def restart(self, entry: Entry, document: Document) -> frozenset[str]:
        """Begin anew with a snapshot and its document; return the keys whose values changed."""
        old, new = self.document.values, document.values
        changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
        self.document = document
        self.base = self.last = entry.envelope.sequence
        self._data = [entry.data]
        self.nbytes = len(entry.data)
        self._waiting = {at: late for at, late in self._waiting.items() if at > self.last}
        return frozenset(changed)

    def rebuild(self) -> None:
        """Make the document again from the log, after a change to it failed half way."""
        document = Document()
        for data in self._data:
            document.apply(decode(data).payload)
        self.document = document

    def wait(self, entry: Entry) -> bool:
        """Keep an early envelope until those before it came; False if there is no room for it.

        Room is made by dropping envelopes that are later still.

        Raises:
            UpdateRejected: `replayed`, if another one waits for this place.
        """
        sequence = entry.envelope.sequence
        if sequence in self._waiting:
            raise UpdateRejected(RejectReason.REPLAYED, f"two envelopes for {sequence}")
        self._waiting[sequence] = entry
        while (
            len(self._waiting) > MAX_WAITING_ENVELOPES
            or sum(len(late.data) for late in self._waiting.values()) > MAX_WAITING_BYTES
        ):
            del self._waiting[max(self._waiting)]
        return sequence in self._waiting

    def next_waiting(self) -> Entry | None:
        """Take the waiting envelope that follows now out of the buffer, if there is one."""
        return self._waiting.pop(self.last + 1, None)

    def _held(self, sequence: int) -> bytes | None:
        idx = sequence - max(self.base, 1)
        return self._data[idx] if 0 <= idx < len(self._data) else None
