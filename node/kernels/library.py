"""The native library by ctypes: which one fits this CPU, its types, and checked calls.

Only this file and `halves.py` make pointers. Every array is checked here for dtype, layout and
length before its address is passed on. The C side is described in `abi.h`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint32, c_void_p
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from covey.node.engine.stage import PAGE_TOKENS

from .errors import KernelFailed, KernelsUnavailable
from .matrix_type import MatrixType
from .pacer import Pacer
from .structures import Block, Matrix, Parts, Rope, Run, Shape

ABI_VERSION = 5
ISA_VARIABLE = "COVEY_KERNELS"  # names the instruction set to use in place of the best one

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class PageTable:
    """The addresses of a session's pages; keeps them alive."""

    def __init__(self, pages: Sequence[Bytes], page_bytes: int) -> None:
        for page in pages:
            _check_array(page, np.uint8, (page_bytes,))
        self.page_bytes = page_bytes
        self._pages = tuple(pages)
        self._addresses = (c_void_p * len(pages))(*(page.ctypes.data for page in pages))
        _require(
            not any((at or 1) % 64 for at in self._addresses), "pages begin at multiples of 64"
        )
        self._address = ctypes.addressof(self._addresses)

    def run(self, position: int, n_rows: int) -> Run:
        """Rows [position, position + n_rows) of this session; keep the table alive meanwhile."""
        end = position + n_rows
        _require(0 <= position < end <= PAGE_TOKENS * len(self._pages), "rows beyond the pages")
        return Run(self._address, len(self._pages), n_rows, position)


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "covey_abi_version": (c_int32, []),
    "covey_isa": (c_char_p, [c_int32]),
    "covey_engine_new": (c_void_p, [c_int32, c_void_p]),
    "covey_engine_free": (None, [c_void_p]),
    "covey_packed_bytes": (c_int64, [c_int32] * 3),
    "covey_pack": (c_int32, [c_int32] * 3 + [c_void_p] * 2),
    "covey_page_bytes": (c_int64, [POINTER(Shape), c_int32]),
    "covey_span_forward": (
        c_int32,
        [
            *(c_void_p, POINTER(Shape), POINTER(Block), c_int32, c_int32, POINTER(Run), c_int32),
            *(POINTER(Rope), c_int32, c_void_p, c_uint32),
        ],
    ),
    "covey_embed": (c_int32, [POINTER(Matrix), c_void_p, c_int32, c_float, c_void_p]),
    "covey_head_logits": (
        c_int32,
        [c_void_p, POINTER(Matrix), c_void_p, c_float, c_void_p, c_int32, c_void_p],
    ),
    "covey_multiply": (c_int32, [c_void_p, POINTER(Matrix), c_void_p, c_int32, c_void_p]),
}


class Library:
    """One loaded library; `isa` is the instruction set it was built for."""

    def __init__(self, isa: str, path: Path) -> None:
        self.isa = isa
        self.path = path
        try:
            self._c: Any = ctypes.CDLL(str(path))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(self._c, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise KernelsUnavailable(f"cannot load {path.name}: {error}; build it again") from error
        version = self._c.covey_abi_version()
        if version != ABI_VERSION:
            raise KernelsUnavailable(
                f"{path.name} has ABI {version}, expected {ABI_VERSION}; build it again"
            )

    @property
    def isas(self) -> list[str]:
        """The instruction sets of this CPU that Covey has kernels for, best first."""
        names: list[bytes] = list(iter(map(self._c.covey_isa, count()).__next__, None))
        return [name.decode() for name in names]

    @property
    def best_isa(self) -> str:
        """The first of `isas`."""
        return self.isas[0]

    def packed_bytes(self, kind: MatrixType, rows: int, columns: int) -> int:
        """Bytes of a packed matrix; ValueError for a shape that cannot be packed."""
        n_bytes: int = -1
        if 0 < rows < 2**31 and 0 < columns < 2**31:
            n_bytes = self._c.covey_packed_bytes(kind, rows, columns)
        if n_bytes < 0:
            raise ValueError(f"cannot pack {kind.name} [{rows}, {columns}]")
        return n_bytes

    def pack(self, kind: MatrixType, rows: int, columns: int, blocks: Bytes, out: Bytes) -> None:
        """Rearrange `blocks`, the rows as GGUF stores them, into `out` of `packed_bytes`."""
        _check_array(out, np.uint8, (self.packed_bytes(kind, rows, columns),))
        _check_array(blocks, np.uint8, (rows * kind.row_bytes(columns),))
        _require(out.flags.writeable, "a packed matrix is written to")
        self._call("covey_pack", kind, rows, columns, blocks.ctypes.data, out.ctypes.data)

    def embed(self, embedding: Matrix, ids: npt.NDArray[np.int32], scale: float = 1.0) -> Floats:
        """Rows [len(ids), D] of a matrix made by `matrix`, times scale; ids must be in range."""
        _check_array(ids, np.int32, (len(ids),))
        _require(len(ids) > 0, "no ids")
        _require(int(ids.min()) >= 0 and int(ids.max()) < embedding.rows, "an id out of range")
        out = np.empty((len(ids), embedding.columns), dtype=np.float32)
        self._call("covey_embed", embedding, ids.ctypes.data, len(ids), scale, out.ctypes.data)
        return out

    def matrix(self, kind: MatrixType, rows: int, columns: int, packed: Bytes) -> Matrix:
        """Describe a packed matrix to the library; the caller keeps `packed` alive."""
        _check_array(packed, np.uint8, (self.packed_bytes(kind, rows, columns),))
        _require(packed.ctypes.data % 64 == 0, "packed matrices begin at multiples of 64 bytes")
        return Matrix(kind, rows, columns, 0, packed.ctypes.data)

    def page_bytes(self, shape: Shape, n_blocks: int) -> int:
        """Bytes of one page of the KV cache; ValueError for a shape that has no kernel."""
        n_bytes: int = self._c.covey_page_bytes(shape, n_blocks)
        _require(n_bytes > 0, "a shape that the kernels do not take")
        return n_bytes

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._c, name)(*arguments)
        if status:
            raise KernelFailed(name, status)


class Engine:
    """Threads and scratch memory; calls from several Python threads take turns.

    A stage and a head in one process should share one: two engines' threads are in each other's
    way while one still spins for its next job and the other works.
    """

    def __init__(
        self,
        library: Library,
        threads: int,
        *,
        speed: float = 1.0,
        helper_cores: Sequence[int] = (),
    ) -> None:
        """Start threads - 1 helpers of the calling thread.

        Args:
            library: to call.
            threads: that work, the caller's included.
            speed: below 1, behave like a machine of that share of this one's speed.
            helper_cores: where each helper stays; by default the system moves them about, which
                is better wherever other programs run.

        Raises:
            KernelsUnavailable: the system gives no such threads or cores.
        """
        if not 1 <= threads <= 1024:
            raise ValueError(f"threads = {threads}: must be 1 to 1024")
        if helper_cores and len(helper_cores) != threads - 1:
            raise ValueError(f"{len(helper_cores)} cores for {threads - 1} helpers")
        self.library = library
        self.threads = threads
        self._lock = threading.Lock()
        self._pacer = None if speed == 1.0 else Pacer(speed)
        cores = (c_int32 * len(helper_cores))(*helper_cores) if helper_cores else None
        self._handle: int | None = library._c.covey_engine_new(threads, cores)
        if not self._handle:
            where = f" on cores {list(helper_cores)}" if helper_cores else ""
            raise KernelsUnavailable(f"the system gives no {threads} threads{where}; ask for fewer")

    def span_forward(
        self,
        shape: Shape,
        blocks: ctypes.Array[Block],
        runs: Sequence[tuple[PageTable, int, int]],
        ropes: Sequence[tuple[Floats, Floats]],
        hidden: Floats,
        parts: Parts = Parts.BLOCK,
        *,
        first_block: int = 0,
        page_blocks: int | None = None,
    ) -> None:
        """Run `blocks` on hidden [n_rows, D] in place, all rows in one pass over the weights.

        Args:
            shape: of every block.
            blocks: whose matrices are alive.
            runs: (pages, position, n_rows) of sessions, each another one, in the order of their
                rows; pages of `Library.page_bytes` of this shape and `page_blocks`.
            ropes: one or two tables, cosines and sines [n_positions, rope_dim/2] from position 0
                on; `Block.rope` says which.
            hidden: float32, contiguous, writable.
            parts: which half, or both.
            first_block: place of the first of `blocks` within the pages.
            page_blocks: blocks that the pages are for; by default just these.
        """
        page_blocks = len(blocks) if page_blocks is None else page_blocks
        call = SpanCall(self, shape, runs, ropes, hidden, page_blocks=page_blocks)
        call.run(blocks, parts, first_block)

    def head_logits(self, output: Matrix, norm: Floats, eps: float, hidden: Floats) -> Floats:
        """Logits [n_rows, V] of hidden states [n_rows, D]."""
        _check_array(norm, np.float32, (output.columns,))
        _check_array(hidden, np.float32, (len(hidden), output.columns))
        _require(len(hidden) > 0, "no rows")
        out = np.empty((len(hidden), output.rows), dtype=np.float32)
        self._call(
            "covey_head_logits",
            *(output, norm.ctypes.data, eps),
            *(hidden.ctypes.data, len(hidden), out.ctypes.data),
        )
        return out

    def multiply(self, matrix: Matrix, x: Floats) -> Floats:
        """x [n_rows, columns] times the transpose of a packed matrix: [n_rows, rows]."""
        _check_array(x, np.float32, (len(x), matrix.columns))
        _require(len(x) > 0, "no rows")
        out = np.empty((len(x), matrix.rows), dtype=np.float32)
        self._call("covey_multiply", matrix, x.ctypes.data, len(x), out.ctypes.data)
        return out

    def _call(self, name: str, *arguments: object) -> None:
        with self._lock:
            if self._pacer is None:
                self.library._call(name, self._handle, *arguments)
            else:
                with self._pacer:
                    self.library._call(name, self._handle, *arguments)

    def __del__(self) -> None:
        """Stop the threads and free the scratch memory."""
        if getattr(self, "_handle", None):
            self.library._c.covey_engine_free(self._handle)
            self._handle = None


_ATTENTION = Parts.ATTENTION.value


class SpanCall:
    """Rows on their way through blocks, which are run some at a time; checked once for all.

    Args:
        engine: that runs them.
        shape, runs, ropes, hidden: see `Engine.span_forward`; `hidden` is worked on in place, and
            may be given other values between calls. Without pages, only MLPs can be run.
        page_blocks: blocks that the pages are for.
    """

    def __init__(
        self,
        engine: Engine,
        shape: Shape,
        runs: Sequence[tuple[PageTable | None, int, int]],
        ropes: Sequence[tuple[Floats, Floats]],
        hidden: Floats,
        *,
        page_blocks: int,
    ) -> None:
        n_rows = sum(run[2] for run in runs)
        _check_array(hidden, np.float32, (n_rows, shape.hidden_size))
        _require(hidden.flags.writeable and n_rows > 0, "hidden states are written to")
        _require(1 <= len(ropes) <= 2, "one or two tables of angles")
        for cosines, sines in ropes:
            for table in (cosines, sines):
                _check_array(table, np.float32, (len(cosines), shape.rope_dim // 2))
        pages = [run[0] for run in runs if run[0] is not None]
        self._has_pages = len(pages) == len(runs)
        if self._has_pages:
            page_bytes = engine.library.page_bytes(shape, page_blocks)
            _require(all(each.page_bytes == page_bytes for each in pages), "pages of another shape")
        described = (table.run(at, n) if table else Run(None, 0, n, 0) for table, at, n in runs)
        tables = (Rope * len(ropes))(
            *(Rope(cos.ctypes.data, sin.ctypes.data, len(cos)) for cos, sin in ropes)
        )
        self._rest = (
            *((Run * len(runs))(*described), len(runs)),
            *(tables, len(tables), hidden.ctypes.data),
        )
        self._engine = engine
        self._shape = shape
        self._page_blocks = page_blocks
        self._owned = (tuple(pages), tuple(ropes), hidden)  # what the addresses point into

    def run(self, blocks: ctypes.Array[Block], parts: Parts, first_block: int = 0) -> None:
        """Run `blocks`, the first of which is at `first_block` within the pages, on the rows."""
        # Groups come here twice for each block: plain numbers, since those of enums take longer.
        n_blocks, flags = len(blocks), parts.value
        _require(0 <= first_block <= self._page_blocks - n_blocks, "blocks beyond the pages")
        _require(self._has_pages or not flags & _ATTENTION, "attention without pages")
        self._engine._call(
            "covey_span_forward", self._shape, blocks, n_blocks, first_block, *self._rest, flags
        )


def page_memory(n_bytes: int) -> Bytes:
    """Zeros that take physical memory only where they are written to; freed with the array."""
    if sys.platform == "win32":
        return np.frombuffer(mmap.mmap(-1, n_bytes), dtype=np.uint8)
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Attention reads all of it for every token, and large pages spare it page walks.
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)


@cache
def load_library(isa: str | None = None) -> Library:
    """The library for `isa`, else for what COVEY_KERNELS names, else the best one of this CPU.

    Raises:
        KernelsUnavailable: none was built, or this CPU has not got that instruction set.
    """
    portable = Library("portable", _path("portable"))
    wanted = isa or os.environ.get(ISA_VARIABLE) or None
    if wanted is None:
        wanted = next(isa for isa in portable.isas if _is_built(isa))
    if wanted not in portable.isas:
        raise KernelsUnavailable(
            f"no {wanted!r} kernels for this CPU; it runs {', '.join(portable.isas)}"
        )
    return portable if wanted == "portable" else Library(wanted, _path(wanted))


def usable_isas() -> list[str]:
    """The instruction sets that `load_library` can be asked for, best first."""
    return [isa for isa in load_library("portable").isas if _is_built(isa)]


def _is_built(isa: str) -> bool:
    return any(Path(__file__).parent.glob(f"_{isa}.*so"))


def _path(isa: str) -> Path:
    found = sorted(Path(__file__).parent.glob(f"_{isa}.*so"))
    if not found:
        raise KernelsUnavailable(f"no {isa} kernels were built; install with a C++ compiler")
    return found[0]


def _check_array(array: npt.NDArray[Any], dtype: type[Any], shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(
            f"array is {array.dtype} {list(array.shape)}, "
            f"expected contiguous {np.dtype(dtype)} {list(shape)}"
        )


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(text)
