"""Reading files past the system's cache, and how fast the disk under one is.

Weights that are read once a token and do not fit into memory only push other things out of the
cache; read straight into large pages of our own, they cost neither memory nor a copy, and a disk
is read at its full speed. Where a system has no way past its cache (Windows), or a file system
none (a memory disk), files are read as usual and what was read is forgotten where that can be
asked for. Knows nothing of weights.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

BLOCK_BYTES = 4096  # reads past the cache begin and end at multiples of it, in file and memory
LARGE_PAGE_BYTES = 2 << 20
PIECE_BYTES = 16 << 20  # what is worth a read of its own
# A long read is done in pieces, some of them at once: while whoever has read one waits for a core
# that the engine computes on, the disk is busy with the others. Two bf16 blocks in turn on two busy
# cores: one piece of 16 MB at a time 0.80 of the disk's speed, one of 128 MB 0.87, this 0.93.
READ_BYTES = 8 << 20
READS_AT_ONCE = 3
SAMPLE_STEP_BYTES = 32 << 20
SAMPLE_BYTES = 128 << 20  # that are read to learn a disk's speed,
SAMPLE_S = 0.5  # unless they take longer

_HAS_READS_AT_ONCE = hasattr(os, "preadv")  # all but Windows


class ColdFile:
    """A file that is read past the system's cache where there is a way; by one thread at a time.

    It stays readable when its name is removed or given to another file.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file, self.is_direct = _open(path)
        self._is_tried = False
        self.size = os.fstat(self._file.fileno()).st_size

    def read_into(self, memory: Bytes, offset: int, n_bytes: int) -> Bytes:
        """Read bytes [offset, offset + n_bytes) of the file.

        Args:
            memory: of `read_memory`, with room for `room_for(n_bytes)`.
            offset: of the first byte.
            n_bytes: how many.

        Returns:
            The part of `memory` that holds them; it begins at a multiple of 64 if `offset` does.

        Raises:
            OSError: the disk failed, or the file ends before.
        """
        first = offset % BLOCK_BYTES
        if offset < 0 or n_bytes < 0 or room_for(n_bytes) > memory.nbytes:
            raise ValueError(f"{n_bytes} bytes at {offset} into {memory.nbytes}")
        stop = first + n_bytes

        def read(at: int) -> None:
            piece = memory[at : min(at + READ_BYTES, _rounded(stop))]
            n_read = self._read(piece, offset - first + at)
            if n_read < min(len(piece), stop - at):
                raise OSError(errno.EIO, "the file is shorter than it was", str(self.path))

        starts = list(range(0, stop, READ_BYTES))
        if starts and not self._is_tried:  # alone, since it may find out that the file must be
            read(starts.pop(0))  # opened in another way
            self._is_tried = True
        _at_once(read, starts)
        return memory[first:stop]

    def forget(self) -> None:
        """Ask the system to drop what it holds of the file."""
        forget(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def __enter__(self) -> Self:
        """Nothing to do: the file is open already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()

    def _read(self, piece: Bytes, offset: int) -> int:
        try:
            return self._read_once(piece, offset)
        except OSError as error:
            if not self.is_direct or error.errno != errno.EINVAL:
                raise
        # A file system that takes the flag and then refuses to read.
        self._file.close()
        self._file, self.is_direct = FileIO(self.path), False
        return self._read_once(piece, offset)

    def _read_once(self, piece: Bytes, offset: int) -> int:
        n_read = 0
        while n_read < len(piece):
            n_more = _read_at(self._file, piece[n_read:], offset + n_read)
            if not n_more:
                break
            n_read += n_more
            if self.is_direct and n_read % BLOCK_BYTES:
                break  # the end of the file; another read would not begin where it must
        if not self.is_direct:
            forget(self._file.fileno(), offset, n_read)
        return n_read


def read_memory(n_bytes: int) -> Bytes:
    """Memory for `ColdFile.read_into`: in large pages where the system has them.

    With small ones a disk is read at half its speed, for each is a piece of its own to the driver.
    """
    size = _rounded(n_bytes, LARGE_PAGE_BYTES)
    if sys.platform == "win32":
        memory = mmap.mmap(-1, size + LARGE_PAGE_BYTES)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1, size + LARGE_PAGE_BYTES, flags=flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, dtype=np.uint8)
    first = -whole.ctypes.data % LARGE_PAGE_BYTES
    return whole[first : first + size]


def room_for(n_bytes: int) -> int:
    """How much memory reading so many bytes takes, wherever they begin."""
    return _rounded(n_bytes) + BLOCK_BYTES


def forget(descriptor: int, offset: int = 0, n_bytes: int = 0) -> None:
    """Ask the system to drop what it holds of a file; 0 bytes is all from there on."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, offset, n_bytes, os.POSIX_FADV_DONTNEED)


def disk_read_speed(path: Path) -> float:
    """Bytes per second at which the disk under a file is read, cache or no cache.

    Takes half a second at most. On Windows, and on file systems that only exist in memory, what is
    cached counts as disk.

    Args:
        path: a file of some megabytes at least; of a folder, or beside a smaller file, the largest.

    Raises:
        OSError: there is nothing to read.
    """
    file_path = _sample(path)
    with ColdFile(file_path) as file:
        if not file.is_direct:
            file.forget()
        step = min(SAMPLE_STEP_BYTES, file.size)
        memory = read_memory(room_for(step))
        memory[::BLOCK_BYTES] = 0  # the system gives memory when it is first written to
        n_read, began_at = 0, time.perf_counter()
        while n_read + step <= min(file.size, SAMPLE_BYTES):
            file.read_into(memory, n_read, step)
            n_read += step
            if time.perf_counter() - began_at > SAMPLE_S:
                break
        return max(1.0, n_read / max(time.perf_counter() - began_at, 1e-9))


def _sample(path: Path) -> Path:
    """The file to read: of a model in several, its index says nothing."""
    if path.is_file() and path.stat().st_size >= PIECE_BYTES:
        return path
    folder = path if path.is_dir() else path.parent
    files = [each for each in folder.iterdir() if each.is_file()]
    largest = max(files, key=lambda each: each.stat().st_size, default=path)
    if not largest.stat().st_size:
        raise OSError(errno.ENODATA, "nothing to read", str(path))
    return largest


def _at_once(read: Callable[[int], None], starts: Sequence[int]) -> None:
    """Call `read` with each, some at once where files can be read so; raises the first OSError."""
    left = iter(starts)
    lock = threading.Lock()
    errors: list[OSError] = []

    def work() -> None:
        while not errors:
            with lock:
                at = next(left, None)
            if at is None:
                return
            try:
                read(at)
            except OSError as error:
                errors.append(error)

    n_helpers = min(READS_AT_ONCE, len(starts)) - 1 if _HAS_READS_AT_ONCE else 0
    helpers = [threading.Thread(target=work, daemon=True) for _ in range(n_helpers)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]


def _read_at(file: FileIO, memory: Bytes, offset: int) -> int:
    if _HAS_READS_AT_ONCE:
        return os.preadv(file.fileno(), [memory.data], offset)
    file.seek(offset)
    return file.readinto(memory.data) or 0


def _open(path: Path) -> tuple[FileIO, bool]:
    """The file, and whether it is read past the cache."""
    if hasattr(os, "O_DIRECT"):
        with suppress(OSError):  # most likely EINVAL: the file system cannot
            return FileIO(path, opener=_open_direct), True
    file = FileIO(path)
    if sys.platform == "darwin":
        import fcntl

        with suppress(OSError):
            fcntl.fcntl(file.fileno(), fcntl.F_NOCACHE, 1)
    return file, False


def _open_direct(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_DIRECT)


def _rounded(n_bytes: int, multiple: int = BLOCK_BYTES) -> int:
    return -(-n_bytes // multiple) * multiple
