"""One file of packed weights: written whole or not at all, and ending with its own SHA-256.

A file that is there under its name never changes; a damaged one is replaced by renaming another
over it, so that whoever has it open or mapped keeps what was there.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from covey.node.disk import PIECE_BYTES, ColdFile, forget, read_memory, room_for

from .library import Bytes
from .packed import PackedBlock

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class ColdBlock:
    """A block that lies on disk, whole and checked; `view` makes of its bytes what it is."""

    file: ColdFile
    n_bytes: int
    view: Callable[[Bytes], PackedBlock]

    def mapped(self) -> PackedBlock:
        """The block without reading it: what is looked at comes from the disk then.

        Raises:
            OSError: the file is not there any more.
        """
        buffer = _map(self.file.path, self.n_bytes)
        if buffer is None:
            raise FileNotFoundError(f"{self.file.path} was replaced")
        return self.view(buffer)


def write_packed(path: Path, pieces: Iterable[Bytes], *, is_cold: bool = False) -> None:
    """Put a file there whole or not at all; raises OSError.

    With `is_cold` the system is not left with anything of it in memory, now or later.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    digest, n_waiting = hashlib.sha256(), 0
    try:
        with half.open("wb", buffering=0) as file:
            for piece in pieces:
                digest.update(piece.data)
                _write_all(file.write, piece.data)
                n_waiting += len(piece)
                if is_cold and n_waiting >= PIECE_BYTES:
                    _put_on_disk(file.fileno())
                    n_waiting = 0
            _write_all(file.write, memoryview(digest.digest()))
            if is_cold:
                _put_on_disk(file.fileno())
        half.replace(path)
    except BaseException:
        with suppress(OSError):
            half.unlink()
        raise


def map_packed(path: Path, size: int) -> Bytes | None:
    """The content of a whole and undamaged file of `size` bytes and a digest, else None."""
    buffer = _map(path, size + _DIGEST_BYTES)
    if buffer is None:
        return None
    if hashlib.sha256(buffer[:size].data).digest() != buffer[size:].tobytes():
        _say_damaged(path)
        return None
    return buffer[:size]


def open_packed(path: Path, size: int) -> ColdFile | None:
    """The same file, read once and left on disk; takes the memory of a few megabytes."""
    try:
        file = ColdFile(path)
    except OSError:
        return None
    try:
        if file.size == size + _DIGEST_BYTES and _digest(file, size):
            return file
    except OSError as error:
        logger.warning("packed weights in %s: %s", path, error.strerror)
    file.close()
    return None


def _digest(file: ColdFile, size: int) -> bool:
    """Whether the file's digest is that of what it holds."""
    memory = read_memory(room_for(min(size, PIECE_BYTES)))
    digest = hashlib.sha256()
    for at in range(0, size, PIECE_BYTES):
        digest.update(file.read_into(memory, at, min(PIECE_BYTES, size - at)).data)
    if file.read_into(memory, size, _DIGEST_BYTES).tobytes() == digest.digest():
        return True
    _say_damaged(file.path)
    return False


def _map(path: Path, n_bytes: int) -> Bytes | None:
    """The first bytes of a file that has as many, or with a digest behind them."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size not in (n_bytes, n_bytes + _DIGEST_BYTES):
                return None
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError):
        return None
    return data[:n_bytes]


def _write_all(write: Callable[[memoryview], int | None], data: memoryview) -> None:
    """A file without a buffer may take less than it is given."""
    while data:
        data = data[write(data) or 0 :]


def _put_on_disk(descriptor: int) -> None:
    """Wait until what was written is there, and have the system forget it."""
    os.fsync(descriptor)
    forget(descriptor)


def _say_damaged(path: Path) -> None:
    logger.warning("packed weights in %s are damaged; they are made anew", path)
