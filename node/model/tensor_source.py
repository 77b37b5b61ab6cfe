"""`TensorSource`: named raw tensors in a file, whatever its format; and their decoding to fp32.

A source reads nothing but its header until `raw` is called, and then only that byte range.
A `TensorSlice` is some rows of one: a matrix that shares its tensor with others.
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

    Rows are contiguous in a file, quantised or not, so a slice is a byte range. A tensor of three
    dimensions counts as the matrix that its first two make: expert e of [X, rows, columns] has
    the rows from e * rows on.
    """

    tensor: str  # the name in the file
    row_start: int
    row_stop: int
    info: TensorInfo  # the slice as a tensor of its own: shape [rows, columns] or [n], bytes
    offset: float = 0.0  # to be added to each number: norms that are stored as weight - 1

    @classmethod
    def of(cls, tensor: TensorInfo, row_start: int, row_stop: int, offset: float = 0.0) -> Self:
        """Cut rows out of a tensor; they must be there."""
        *leading, columns = tensor.shape
        if not leading:  # a vector is read whole
            return cls(tensor.name, row_start, row_stop, tensor, offset)
        row_bytes = tensor.nbytes // math.prod(leading)
        n_rows = row_stop - row_start
        info = replace(
            tensor,
            shape=(n_rows, columns),
            offset=tensor.offset + row_start * row_bytes,
            nbytes=n_rows * row_bytes,
        )
        return cls(tensor.name, row_start, row_stop, info, offset)

    def raw(self, source: TensorSource) -> memoryview:
        """The bytes of the slice, read-only and not copied."""
        whole = source.raw(self.tensor)
        start = self.info.offset - source.tensors[self.tensor].offset
        return whole[start : start + self.info.nbytes]


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
