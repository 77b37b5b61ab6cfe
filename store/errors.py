"""What can go wrong in the store.

`UpdateRejected` is about somebody else's bytes: count it, perhaps think less of the sender, go on.
Every other `StoreError` is about this machine and ends in one line for a person.
"""

from __future__ import annotations

from enum import StrEnum

from covey.errors import CoveyError


class StoreError(CoveyError):
    """The store cannot do what was asked; the text says what to do."""


class RejectReason(StrEnum):
    """Why bytes from another member were refused; the values are stable, metrics use them."""

    MALFORMED = "malformed"  # not the one canonical encoding of a message
    TOO_LARGE = "too_large"  # over a limit of size, log length or number of authors
    UNKNOWN_AUTHOR = "unknown_author"  # the author is no member
    BAD_SIGNATURE = "bad_signature"  # not signed by the author, or for another swarm
    REPLAYED = "replayed"  # a sequence (or beat) already seen, with other content or too old
    WRONG_VERSION = "wrong_version"  # another version of the format
    UNREADABLE = "unreadable"  # well signed, but its payload is not one of our updates


class UpdateRejected(StoreError):
    """Bytes from another member were refused; nothing changed here."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(f"update refused ({reason}): {detail}")
        self.reason = reason


class RecordMalformed(StoreError, ValueError):
    """A value is not the record that its key says; readers skip it."""


class StoreFull(StoreError):
    """A write does not fit into what one member may publish; delete older records first."""


class StoreCorrupt(StoreError):
    """The store's file is damaged; nothing in it is used."""
