"""A member's copy of everything every member published, and the pen for its own part.

Each author writes one document of its own, in signed envelopes; all replicas that hold the same
envelopes show the same records. Bytes in, bytes out: knows no network and no keys, only `sign` and
`verify`. Not thread-safe; each write and each `apply` makes one small disk transaction.

An author that signs two different envelopes with one sequence splits the replicas between the two,
until its next snapshot: it can harm its own records only.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .author_log import AuthorLog, Entry
from .disk import Disk
from .envelope import IsMember, Kind, Sign, Verify, decode, encode, seal
from .errors import RejectReason, StoreCorrupt, UpdateRejected
from .state_vector import MAX_AUTHORS, Held, decode_vector, encode_vector
from .values import decode_value, encode_value, is_key

# Overwritten keys leave about 13 bytes each in a document for ever, and each envelope about 200 in
# the log. Half a thousand of them is still one sync message.
COMPACT_AFTER_ENVELOPES = 512
COMPACT_AFTER_BYTES = 256 * 1024

_NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What an accepted envelope did.

    `is_new` is False for what was held already or has been replaced by a snapshot: gossip brings
    everything more than once, and only new envelopes are worth passing on. A new envelope that
    came too early changes no key yet.
    """

    author: str
    is_new: bool
    changed: frozenset[str] = _NOTHING


class Edit:
    """Collects writes for one envelope; the last word on a key counts."""

    def __init__(self) -> None:
        self.changes: dict[str, bytes | None] = {}

    def set(self, key: str, value: Mapping[str, object]) -> None:
        """Publish `value` under `key`; errors as for `Replica.set`."""
        if not is_key(key):
            raise ValueError(f"{key!r} is no key: 1 to 256 printable ASCII characters, no space")
        self.changes[key] = encode_value(value)

    def delete(self, key: str) -> None:
        """Take `key` back; nothing happens if it is not there."""
        self.changes[key] = None


class Replica:
    """All members' documents as this node has them; writes go to `author`'s own."""

    def __init__(
        self,
        author: str,
        *,
        swarm: str,
        sign: Sign,
        verify: Verify,
        is_member: IsMember,
        disk: Disk | None,
        started_ms: int,
    ) -> None:
        """Start from what `disk` holds; without one, nothing survives this object.

        Records of authors that are no longer members are restored too, until `forget` is called:
        `is_member` may itself depend on what is stored here.

        Args:
            author: this node's peer id.
            swarm: the swarm's id; envelopes of another swarm are refused.
            sign: signs as `author`.
            verify: checks an author's signature.
            is_member: whether an author's envelopes are taken in and passed on.
            disk: where envelopes survive a restart.
            started_ms: wall clock in milliseconds. The first write of each life is a snapshot with
                at least this number: should the store be lost, or restored from an old backup, the
                numbers that others saw already are not used again.

        Raises:
            StoreCorrupt: the file holds what this code never wrote.
            StoreError: the file belongs to another swarm or author.
        """
        self.author = author
        self.rejected: Counter[RejectReason] = Counter()
        self._swarm = swarm
        self._sign = sign
        self._verify = verify
        self._is_member = is_member
        self._disk = disk
        self._own = AuthorLog()
        self._logs = {author: self._own}
        self._started_ms = started_ms
        self._has_written = False  # in this life
        self._local_listeners: list[Callable[[bytes], object]] = []
        self._change_listeners: list[Callable[[str, frozenset[str]], object]] = []
        if disk is not None:
            disk.claim(f"{swarm}/{author}")
            self._restore(disk)

    # Reading

    def get(self, author: str, key: str) -> dict[str, Any] | None:
        """The value that `author` has under `key`, the caller's own copy; None if there is none."""
        log = self._logs.get(author)
        data = log.document.values.get(key) if log else None
        return None if data is None else decode_value(data)

    def items(self, prefix: str = "") -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Every (author, key, value) with the prefix, sorted by author, then key."""
        for author in self.authors():
            values = self._logs[author].document.values
            for key in sorted(key for key in values if key.startswith(prefix)):
                yield author, key, decode_value(values[key])

    def authors(self) -> list[str]:
        """Those who have published something, sorted."""
        return sorted(author for author, log in self._logs.items() if log.last)

    def subscribe(self, callback: Callable[[str, frozenset[str]], object]) -> Callable[[], None]:
        """Call back with (author, changed keys) after each change; returns what ends that."""
        self._change_listeners.append(callback)
        return lambda: self._change_listeners.remove(callback)

    # Writing

    def on_local(self, listener: Callable[[bytes], object]) -> Callable[[], None]:
        """Hand every envelope of our own to `listener`, for gossip; returns what ends that."""
        self._local_listeners.append(listener)
        return lambda: self._local_listeners.remove(listener)

    def set(self, key: str, value: Mapping[str, object]) -> None:
        """Publish `value` under `key`; costs nothing if it is there already.

        Raises:
            ValueError: no valid key, or a value that is not made of JSON types.
            StoreFull: the value, or all we publish, would be too large.
            StoreError: it could not be stored. In each case nothing was published.
        """
        with self.edit() as edit:
            edit.set(key, value)

    def delete(self, key: str) -> None:
        """Take `key` back; nothing happens if it is not there."""
        with self.edit() as edit:
            edit.delete(key)

    @contextlib.contextmanager
    def edit(self) -> Iterator[Edit]:
        """Several writes in one envelope, made when the block ends without an exception."""
        edit = Edit()
        yield edit
        values = self._own.document.values
        changes = {key: new for key, new in edit.changes.items() if new != values.get(key)}
        if changes:
            self._write(changes)

    def compact(self) -> None:
        """Replace our log by one signed snapshot; happens by itself when the log grows long."""
        if self._own.last > self._own.base:
            self._publish_snapshot(sequence=self._own.last + 1)

    # Exchange

    def apply(self, envelope_bytes: bytes) -> Applied:
        """Take in an envelope from anybody.

        Raises:
            UpdateRejected: it is not acceptable; counted in `rejected`, and nothing changed.
            StoreError: it was taken in, but could not be stored on disk.
        """
        try:
            return self._apply(envelope_bytes)
        except UpdateRejected as error:
            self.rejected[error.reason] += 1
            raise

    def state_vector(self) -> bytes:
        """What is held of each author, for another replica's `missing_for`."""
        held = {author: Held(log.base, log.last) for author, log in self._logs.items() if log.last}
        return encode_vector(held)

    def missing_for(
        self, remote_state_vector: bytes, *, max_bytes: int, turn: int = 0
    ) -> list[bytes]:
        """The envelopes that the other replica lacks, in an order that applies.

        Authors take turns, beginning with another one for each `turn`, so that one whose envelopes
        the other will not have cannot keep the rest from arriving.

        Args:
            remote_state_vector: any bytes, from the other's `state_vector`.
            max_bytes: how much to return at most; one envelope is returned even if larger.

        Raises:
            UpdateRejected: the vector is malformed.
        """
        remote = decode_vector(remote_state_vector)
        queues = []
        for author in self.authors():
            log, held = self._logs[author], remote.get(author, Held(0, 0))
            if held.last < log.last and self._may_write(author):
                queues.append(iter(log.since(held.last)))
        start = turn % len(queues) if queues else 0
        return _take_turns(queues[start:] + queues[:start], max_bytes=max_bytes)

    def lacks(self, remote_state_vector: bytes) -> bool:
        """Whether the other replica holds something of a member that we do not.

        Raises:
            UpdateRejected: the vector is malformed.
        """
        for author, held in decode_vector(remote_state_vector).items():
            log = self._logs.get(author)
            if held.last > (log.last if log else 0) and self._may_write(author):
                return True
        return False

    def forget(self, author: str) -> None:
        """Drop all that a removed member published; `is_member` must refuse it from now on.

        Raises:
            ValueError: `author` is this node.
            StoreError: the disk could not be written; nothing was dropped.
        """
        if author == self.author:
            raise ValueError("a node cannot forget itself")
        log = self._logs.get(author)
        if log is None:
            return
        if self._disk is not None:
            self._disk.drop(author)
        del self._logs[author]
        self._notify(author, frozenset(log.document.values))

    # Inside

    def _may_write(self, author: str) -> bool:
        return author == self.author or self._is_member(author)

    def _apply(self, data: bytes) -> Applied:
        envelope = decode(data)
        author, sequence = envelope.author, envelope.sequence
        log = self._logs.get(author)
        if log is not None and log.has(sequence, data):
            return Applied(author=author, is_new=False)
        if not self._may_write(author):
            raise UpdateRejected(RejectReason.UNKNOWN_AUTHOR, "the author is no member")
        if not self._verify(author, envelope.signature, envelope.signed_bytes(self._swarm)):
            raise UpdateRejected(RejectReason.BAD_SIGNATURE, "not signed by its author")
        if log is None:
            if len(self._logs) >= MAX_AUTHORS:
                raise UpdateRejected(RejectReason.TOO_LARGE, "too many authors")
            log = AuthorLog()
        if log.is_superseded(sequence):
            return Applied(author=author, is_new=False)
        if author == self.author and self._has_written:
            return self._leave_behind(sequence)
        if sequence <= log.last:
            raise UpdateRejected(RejectReason.REPLAYED, f"another envelope has number {sequence}")
        return self._admit(log, Entry(envelope, data))

    def _admit(self, log: AuthorLog, entry: Entry) -> Applied:
        author = entry.envelope.author
        if not log.follows(entry.envelope):
            is_new = log.wait(entry)
            self._logs[author] = log
            return Applied(author=author, is_new=is_new)
        changed = set(log.append(entry))
        self._logs[author] = log
        taken = [entry]
        while (late := log.next_waiting()) is not None:
            try:
                changed |= log.append(late)
            except UpdateRejected as error:
                self.rejected[error.reason] += 1
                break
            taken.append(late)
        try:
            self._store(taken)
        finally:
            self._notify(author, frozenset(changed))
        return Applied(author=author, is_new=True, changed=frozenset(changed))

    def _leave_behind(self, sequence: int) -> Applied:
        """Make our records win over an envelope of our own that we know nothing of.

        It is from an earlier life of this identity, and the clock was wrong in one of the two.
        Others may hold it, so our numbers must go on after it, and from a fresh base. Before the
        first write, such envelopes are simply taken in.
        """
        self._publish_snapshot(sequence=max(self._own.last, sequence) + 1)
        return Applied(author=self.author, is_new=False)

    def _write(self, changes: Mapping[str, bytes | None]) -> None:
        own = self._own
        payload = own.document.write(changes)
        try:
            if self._has_written:
                self._publish_update(payload)
            else:
                self._publish_snapshot(sequence=max(own.newest + 1, self._started_ms))
        except BaseException:
            own.rebuild()
            raise
        self._notify(self.author, frozenset(changes))
        n_bytes_after_base = own.nbytes - own.base_nbytes
        if len(own) > COMPACT_AFTER_ENVELOPES or n_bytes_after_base > COMPACT_AFTER_BYTES:
            self.compact()

    def _publish_update(self, payload: bytes) -> None:
        sequence = self._own.last + 1
        entry = self._seal(sequence, Kind.UPDATE, payload)
        if self._disk is not None:
            self._disk.append(self.author, sequence, entry.data, is_durable=True)
        self._own.record(entry)
        self._announce(entry)

    def _publish_snapshot(self, *, sequence: int) -> None:
        document, payload = self._own.document.compacted()
        entry = self._seal(sequence, Kind.SNAPSHOT, payload)
        if self._disk is not None:
            self._disk.restart(self.author, sequence, entry.data, is_durable=True)
        self._own.restart(entry, document)
        self._has_written = True
        self._announce(entry)

    def _seal(self, sequence: int, kind: Kind, payload: bytes) -> Entry:
        envelope = seal(self._swarm, self.author, sequence, kind, payload, sign=self._sign)
        return Entry(envelope, encode(envelope))

    def _store(self, entries: Iterable[Entry]) -> None:
        if self._disk is None:
            return
        for entry in entries:
            envelope = entry.envelope
            add = self._disk.restart if envelope.kind is Kind.SNAPSHOT else self._disk.append
            add(envelope.author, envelope.sequence, entry.data, is_durable=False)

    def _restore(self, disk: Disk) -> None:
        damaged = StoreCorrupt(
            f"{disk.path} holds records that Covey never wrote; move it away and start again"
        )
        broken_off: set[str] = set()
        for author, sequence, data in disk.load():
            log = self._logs.setdefault(author, AuthorLog())
            try:
                envelope = decode(data)
                if (envelope.author, envelope.sequence) != (author, sequence):
                    raise damaged
                if log.follows(envelope):
                    log.append(Entry(envelope, data))
                else:  # the one before could not be stored, the disk was full, say
                    broken_off.add(author)
            except UpdateRejected as error:
                raise damaged from error
        for author in broken_off:  # anti-entropy brings the rest again
            disk.drop(author, after=self._logs[author].last)

    def _announce(self, entry: Entry) -> None:
        for listener in tuple(self._local_listeners):
            listener(entry.data)

    def _notify(self, author: str, changed: frozenset[str]) -> None:
        if changed:
            for callback in tuple(self._change_listeners):
                callback(author, changed)


def _take_turns(queues: list[Iterator[bytes]], *, max_bytes: int) -> list[bytes]:
    taken: list[bytes] = []
    room = max_bytes
    while queues:
        still = []
        for queue in queues:
            data = next(queue, None)
            if data is not None and (len(data) <= room or not taken):
                taken.append(data)
                room -= len(data)
                still.append(queue)
        queues = still
    return taken
