"""Remembers the hashes of a model's blobs on disk, so that a file is hashed once.

A record is only a shortcut: it is keyed by path, size and time of change of every file, a record
that does not read well counts as none, and one that cannot be written is done without.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Self

import platformdirs

FORMAT_VERSION = 1  # raise it when what a blob's bytes are changes
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_RECORD_BYTES = 2**20  # about 130 bytes per blob


@dataclass(frozen=True, slots=True)
class Blob:
    """One part of a model that travels on its own: its name, size and hex SHA-256."""

    name: str
    nbytes: int
    sha256: str


class BlobCache:
    """The record of one model's blobs."""

    def __init__(self, record: Path) -> None:
        self._record = record

    @classmethod
    def beside(cls, files: Iterable[Path], cache_dir: Path | None) -> Self:
        """The record for these files as they are now; by default in the user's cache folder."""
        stats = [(path.resolve(), path.stat()) for path in files]
        key = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        named = hashlib.sha256(json.dumps([FORMAT_VERSION, key]).encode()).hexdigest()
        folder = cache_dir or platformdirs.user_cache_path("covey") / "blobs"
        return cls(folder / f"{named}.json")

    def load(self, names: Sequence[str]) -> tuple[Blob, ...] | None:
        """The remembered blobs if there are exactly these, in this order; else None."""
        try:
            with self._record.open("rb") as file:
                rows = json.loads(file.read(_MAX_RECORD_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
            return None
        blobs = tuple(Blob(*row) for row in rows)
        return blobs if [blob.name for blob in blobs] == list(names) else None

    def save(self, blobs: Sequence[Blob]) -> None:
        """Remember `blobs`; readers see the old record or the new one, never a half of it."""
        half = self._record.with_suffix(f".{os.getpid()}.tmp")
        with suppress(OSError):  # a full or read-only disk costs time on the next start, no more
            self._record.parent.mkdir(parents=True, exist_ok=True)
            half.write_text(json.dumps([astuple(blob) for blob in blobs]), "utf-8")
            half.replace(self._record)


def _is_row(row: object) -> bool:
    return (
        isinstance(row, list)
        and len(row) == 3
        and isinstance(row[0], str)
        and type(row[1]) is int
        and row[1] >= 0
        and isinstance(row[2], str)
        and _SHA256.fullmatch(row[2]) is not None
    )
