"""Where a replica's envelopes survive a restart: one SQLite file in the node's home.

Stores bytes by author and sequence and knows nothing of what they mean. Calls block, each for one
small transaction: tens of microseconds, and one fsync (milliseconds on a memory card) for the
node's own writes, which must be on disk before anyone sees them, since a sequence must never be
used twice. Used from the thread that made it.
"""

from __future__ import annotations

import contextlib
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from .errors import StoreCorrupt, StoreError

_SCHEMA_VERSION = 1
_LOCK_WAIT_S = 1.0  # another process holds the file only by mistake: one node per home

_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS owner (only INTEGER PRIMARY KEY CHECK (only = 1), name TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS envelopes (
    author TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    data BLOB NOT NULL,
    crc INTEGER NOT NULL,  -- SQLite itself does not notice flipped bits in a row
    PRIMARY KEY (author, sequence)
);
PRAGMA user_version = {_SCHEMA_VERSION};
"""


class Disk:
    """The envelopes in one file; a context manager that closes it."""

    def __init__(self, path: Path) -> None:
        """Open or create the file.

        Raises:
            StoreCorrupt: the file is damaged or no store.
            StoreError: it cannot be opened, written, or was made by a newer Covey.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
        except OSError as error:
            raise StoreError(
                f"cannot write {path} ({error.strerror}); choose another folder with --home"
            ) from error
        with self._seam():
            # Transactions are opened by hand (isolation_level=None): the module's own implicit
            # ones would make the durability switch in `append` fail.
            self._db = sqlite3.connect(path, timeout=_LOCK_WAIT_S, isolation_level=None)
        try:
            self._prepare()
        except StoreError:
            self._db.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; harmless if closed already."""
        self._db.close()

    def claim(self, owner: str) -> None:
        """Say whose file this is: the first caller's for ever.

        Raises:
            StoreError: it belongs to another owner (swarm or identity).
        """
        with self._seam():
            self._db.execute("INSERT OR IGNORE INTO owner VALUES (1, ?)", (owner,))
            (name,) = self._db.execute("SELECT name FROM owner").fetchone()
        if name != owner:
            raise StoreError(
                f"{self.path} belongs to another swarm or identity; choose another --home"
            )

    def load(self) -> Iterator[tuple[str, int, bytes]]:
        """Every envelope as (author, sequence, data), by author, then sequence.

        Raises:
            StoreCorrupt: a row is not what was written.
        """
        with self._seam():
            rows = self._db.execute(
                "SELECT author, sequence, data, crc FROM envelopes ORDER BY author, sequence"
            )
            for author, sequence, data, crc in rows:
                if not isinstance(data, bytes) or zlib.crc32(data) != crc:
                    raise self._corrupt()
                yield author, sequence, data

    def append(self, author: str, sequence: int, data: bytes, *, is_durable: bool) -> None:
        """Add one envelope; `is_durable` waits until it would survive a power cut.

        Raises:
            StoreError: the disk is full, say; nothing was added.
        """
        with self._transaction(is_durable=is_durable):
            self._insert(author, sequence, data)

    def restart(self, author: str, sequence: int, data: bytes, *, is_durable: bool) -> None:
        """Put a snapshot in the place of all that is held of the author.

        Raises:
            StoreError: as for `append`; the old envelopes are still there.
        """
        with self._transaction(is_durable=is_durable):
            self._db.execute("DELETE FROM envelopes WHERE author = ?", (author,))
            self._insert(author, sequence, data)

    def drop(self, author: str, *, after: int = 0) -> None:
        """Delete the author's envelopes with a sequence above `after`.

        Raises:
            StoreError: it could not be written.
        """
        with self._seam():
            self._db.execute(
                "DELETE FROM envelopes WHERE author = ? AND sequence > ?", (author, after)
            )

    def _prepare(self) -> None:
        with self._seam():
            # EXCLUSIVE: no second process, and no shared-memory file beside the log.
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            (verdict,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if verdict != "ok":
                raise self._corrupt()
            if version > _SCHEMA_VERSION:
                raise StoreError(f"{self.path} was written by a newer Covey; upgrade this one")
            self._db.executescript(_SCHEMA)

    def _insert(self, author: str, sequence: int, data: bytes) -> None:
        row = (author, sequence, data, zlib.crc32(data))
        self._db.execute("INSERT OR REPLACE INTO envelopes VALUES (?, ?, ?, ?)", row)

    @contextlib.contextmanager
    def _transaction(self, *, is_durable: bool) -> Iterator[None]:
        with self._seam():
            self._db.execute(f"PRAGMA synchronous = {'FULL' if is_durable else 'NORMAL'}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                self._db.rollback()
                raise

    @contextlib.contextmanager
    def _seam(self) -> Iterator[None]:
        """Turn SQLite's errors into ours."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StoreError(
                f"cannot use {self.path} ({error}); is the disk full, read-only, "
                "or another node running in this home?"
            ) from error
        except sqlite3.ProgrammingError:
            raise  # closed already, or another thread's: our own mistake, not the file's
        except sqlite3.DatabaseError as error:
            raise self._corrupt() from error

    def _corrupt(self) -> StoreCorrupt:
        return StoreCorrupt(
            f"{self.path} is damaged; move it away and start again: "
            "what the members published comes back from them"
        )
