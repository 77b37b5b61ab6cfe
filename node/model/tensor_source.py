"""`TensorSource`: named raw tensors in a file, whatever its format; and their decoding to fp32.

A source reads nothing but its header until `raw` is called, and then only that byte range.
A `TensorSlice` is some rows of one, or some columns of those: a matrix that shares its tensor with
others, or a part of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file; `offset` counts from the start of the file."""

    name: str
    type: str  # as GGUF spells it: F32, F16, BF16, Q8_0, ...
    shape: tuple[int, ...]  # rows first, as numpy and torch have it
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """Rows [row_start, row_stop) of one tensor, which is a whole tensor more often than not.

    Rows are contiguous in a file, quantised or not, so a slice is a byte range, unless it has only
    some of the columns. A tensor of three dimensions counts as the matrix that its first two make:
    expert e of [X, rows, columns] has the rows from e * rows on. The rows of a vector are its
    numbers.
    """

    tensor: str  # the name in the file
    row_start: int
    row_stop: int
    info: TensorInfo  # the slice as a tensor of its own: shape [rows, columns] or [n], bytes
    offset: float = 0.0  # to be added to each number: norms that are stored as weight - 1
    row_columns: int = 1  # of a row in the file, of which the slice has all or some

    @classmethod
    def of(cls, tensor: TensorInfo, row_start: int, row_stop: int, offset: float = 0.0) -> Self:
        """Cut rows out of a tensor; they must be there."""
        *leading, columns = tensor.shape
        if not leading:  # a vector
            return cls(tensor.name, 0, columns, tensor, offset).rows(row_start, row_stop)
        n_rows = math.prod(leading)
        flat = replace(tensor, shape=(n_rows, columns))
        return cls(tensor.name, 0, n_rows, flat, offset, columns).rows(row_start, row_stop)

    def rows(self, start: int, stop: int) -> Self:
        """Rows [start, stop) of the slice; they must be there, and whole in the file."""
        n_bytes, first = self.info.nbytes // self.info.shape[0], self.row_start
        info = replace(
            self.info,
            shape=(stop - start, *self.info.shape[1:]),
            offset=self.info.offset + start * n_bytes,
            nbytes=(stop - start) * n_bytes,
        )
        return replace(self, row_start=first + start, row_stop=first + stop, info=info)

    def columns(self, start: int, stop: int) -> Self:
        """Columns [start, stop) of a matrix; they must be there, and begin and end with blocks."""
        n_rows, columns = self.info.shape
        n_bytes = self.info.nbytes // n_rows
        info = replace(
            self.info,
            shape=(n_rows, stop - start),
            offset=self.info.offset + start * n_bytes // columns,
            nbytes=(stop - start) * n_bytes // columns * n_rows,
        )
        return replace(self, info=info)

    def raw(self, source: TensorSource) -> memoryview:
        """The bytes of the slice, read-only; copied only if it has some of the columns."""
        whole = source.raw(self.tensor)
        start = self.info.offset - source.tensors[self.tensor].offset
        if not self._is_cut:
            return whole[start : start + self.info.nbytes]
        n_rows = self.info.shape[0]
        rows: npt.NDArray[np.uint8] = np.ndarray(
            (n_rows, self.info.nbytes // n_rows), np.uint8, whole, start, (self._row_bytes, 1)
        )
        return rows.copy().reshape(-1).data.toreadonly()

    def byte_in_file(self, at: int) -> int:
        """Where byte `at` of the slice lies in the file."""
        if not self._is_cut:
            return self.info.offset + at
        row, rest = divmod(at, self.info.nbytes // self.info.shape[0])
        return self.info.offset + row * self._row_bytes + rest

    @property
    def _is_cut(self) -> bool:
        return len(self.info.shape) > 1 and self.info.shape[-1] != self.row_columns

    @property
    def _row_bytes(self) -> int:
        """Bytes from a row to the next in the file."""
        n_rows, columns = self.info.shape
        return self.info.nbytes // n_rows * self.row_columns // columns


class TensorSource(Protocol):
    """Read-only access to the tensors of a model."""

    @property
    def path(self) -> Path:
        """The file or folder."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name; the header was checked, so each lies inside the file."""
        ...

    def raw(self, name: str) -> memoryview:
        """The bytes of one tensor, read-only and not copied; KeyError for an unknown name."""
        ...

    def close(self) -> None:
        """Let go of the file; views that are still alive keep its memory mapped."""
        ...


def to_float32(info: TensorInfo, raw: memoryview) -> FloatArray:
    """Decode one tensor; returns a copy of shape `info.shape` that does not hold `raw`."""
    if info.type == "F32":
        return np.frombuffer(raw, dtype="<f4").astype(np.float32).reshape(info.shape)
    if info.type == "F16":
        return np.frombuffer(raw, dtype="<f2").astype(np.float32).reshape(info.shape)
    if info.type == "BF16":
        bits = np.frombuffer(raw, dtype="<u2").astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32).reshape(info.shape)
    return _dequantize(info, raw)


def slice_to_float32(part: TensorSlice, source: TensorSource) -> FloatArray:
    """Decode one slice, its offset added; returns a copy of shape `part.info.shape`."""
    decoded = to_float32(part.info, part.raw(source))
    return decoded + np.float32(part.offset) if part.offset else decoded


def _dequantize(info: TensorInfo, raw: memoryview) -> FloatArray:
    # Imported here: `gguf` takes a second, and unquantised models never need it.
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = np.frombuffer(raw, dtype=np.uint8).reshape(*info.shape[:-1], -1)
    decoded: FloatArray = dequantize(rows, GGMLQuantizationType[info.type])
    return decoded.reshape(info.shape)
