"""`TensorSource`: named raw tensors in a file, whatever its format; and their decoding to fp32.

A source reads nothing but its header until `raw` is called, and then only that byte range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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


def _dequantize(info: TensorInfo, raw: memoryview) -> FloatArray:
    # Imported here: `gguf` takes a second, and unquantised models never need it.
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = np.frombuffer(raw, dtype=np.uint8).reshape(*info.shape[:-1], -1)
    decoded: FloatArray = dequantize(rows, GGMLQuantizationType[info.type])
    return decoded.reshape(info.shape)
