"""One author's document: a map from keys to JSON values, as a pycrdt document.

The only module that imports pycrdt. Knows no signatures and no other author. A document is a
function of the payloads it was given, in order; two copies given the same ones are equal. Not safe
for use by two threads at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pycrdt import Doc, Map, MapEvent, TransactionEvent

from .errors import RejectReason, StoreFull, UpdateRejected
from .payload import CLIENT_ID, ROOT, check_payload

# The keys and values of a document, so that its snapshot fits one envelope (224 KiB).
MAX_DOCUMENT_BYTES = 208 * 1024
_ENTRY_OVERHEAD_BYTES = 32  # item heads, lengths and the root's name take at most 17


class HalfApplied(UpdateRejected):
    """The library failed on an update that looked right: make the document again from its log."""

    def __init__(self) -> None:
        super().__init__(RejectReason.UNREADABLE, "not an update")


class Document:
    """The records of one author; `values` maps each key to its encoded value, do not modify it."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self._clock = 0
        self._doc: Doc[Map[Any]] = Doc(client_id=CLIENT_ID)
        self._map: Map[Any] = self._doc.get(ROOT, type=Map)

    @classmethod
    def from_snapshot(cls, payload: bytes) -> Document:
        """A document that starts from another's whole state.

        Raises:
            UpdateRejected: `unreadable`, if that is no whole state.
        """
        document = cls()
        document.apply(payload)
        return document

    def compacted(self) -> tuple[Document, bytes]:
        """The same records in a document without a past, and the snapshot to make it from."""
        fresh = Document()
        return fresh, fresh.write(dict(sorted(self.values.items())))

    def write(self, changes: Mapping[str, bytes | None]) -> bytes:
        """Set keys to encoded values, or delete them where the value is None; return the update.

        Raises:
            StoreFull: the document would outgrow its snapshot; nothing changed.
        """
        self._check_room(changes)
        updates: list[bytes] = []

        def keep(event: TransactionEvent) -> None:
            updates.append(event.update)

        subscription = self._doc.observe(keep)
        try:
            with self._doc.transaction():
                for key, value in changes.items():
                    if value is not None:
                        self._map[key] = value
                    elif key in self.values:
                        del self._map[key]
        finally:
            self._doc.unobserve(subscription)
        self._refresh(changes)
        update = updates[0] if updates else b"\x00\x00"  # no items, no deletions
        self._clock = check_payload(update, clock=self._clock)
        return update

    def apply(self, payload: bytes) -> frozenset[str]:
        """Take in the author's next update; return the keys it touched.

        Raises:
            HalfApplied: `unreadable`, and this document is not to be used any more.
            UpdateRejected: `unreadable`; nothing changed.
        """
        clock = check_payload(payload, clock=self._clock)
        touched: set[str] = set()

        def note(event: MapEvent) -> None:
            touched.update(event.keys)  # type: ignore[attr-defined]

        subscription = self._map.observe(note)
        try:
            self._doc.apply_update(payload)
        except (ValueError, RuntimeError) as error:
            raise HalfApplied from error
        finally:
            self._map.unobserve(subscription)
        self._clock = clock
        return self._refresh(touched)

    def nbytes(self) -> int:
        """How much the whole document takes when encoded, with what overwrites left behind."""
        return len(self._doc.get_update())

    def _refresh(self, keys: Mapping[str, object] | set[str]) -> frozenset[str]:
        changed = set()
        for key in keys:
            value = self._map.get(key)
            new = None if value is None else bytes(value)  # pycrdt returns a bytearray
            if new != self.values.get(key):
                changed.add(key)
            if new is None:
                self.values.pop(key, None)
            else:
                self.values[key] = new
        return frozenset(changed)

    def _check_room(self, changes: Mapping[str, bytes | None]) -> None:
        entries: dict[str, bytes | None] = {**self.values, **changes}
        nbytes = sum(
            len(key) + len(value) + _ENTRY_OVERHEAD_BYTES
            for key, value in entries.items()
            if value is not None
        )
        if nbytes > MAX_DOCUMENT_BYTES:
            raise StoreFull(
                f"this node would publish {nbytes} bytes, the limit is {MAX_DOCUMENT_BYTES}; "
                "delete older records first"
            )
