"""Formats of weight matrices that there are kernels for, and what of them Python has to know.

How the codes lie in a block is the kernels' business (`formats.h`); here is how long a block is
and where its floating-point numbers are, which are the only ones in it that can be infinite or NaN.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from covey.node.model.gguf import TENSOR_TYPES

_SCAN_BYTES = 1 << 22  # looked at in one piece, to need little memory


class MatrixType(IntEnum):
    """By their names and numbers in GGUF."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ4_NL = 20
    BF16 = 30

    @property
    def block_columns(self) -> int:
        """Columns of one block in the file; a matrix has a multiple of them."""
        return TENSOR_TYPES[self][1]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in the file."""
        return TENSOR_TYPES[self][2]

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row in the file."""
        return columns // self.block_columns * self.block_bytes

    @property
    def is_float(self) -> bool:
        """Whether it stores numbers one by one, not in blocks with a scale."""
        return self.block_columns == 1

    @property
    def number_starts(self) -> tuple[int, ...]:
        """Where the floating-point numbers of a block begin."""
        return _NUMBER_STARTS.get(self, (0,))

    def first_not_finite(self, blocks: npt.NDArray[np.uint8]) -> int | None:
        """Byte at which the first block begins that has an infinite or NaN number; else None."""
        bits, exponent = _NUMBERS.get(self, _FP16)
        rows = blocks.reshape(-1, self.block_bytes)
        step = _SCAN_BYTES // self.block_bytes
        for first in range(0, len(rows), step):
            piece = rows[first : first + step]
            bad = np.zeros(len(piece), dtype=bool)
            for start in self.number_starts:
                number = piece[:, start : start + bits.itemsize].copy().view(bits)[:, 0]
                bad |= (number & exponent) == exponent
            if bad.any():
                return (first + int(bad.argmax())) * self.block_bytes
        return None


# Where they are not at the start alone.
_NUMBER_STARTS: dict[MatrixType, tuple[int, ...]] = {
    MatrixType.Q4_1: (0, 2),
    MatrixType.Q5_1: (0, 2),
    MatrixType.Q2_K: (80, 82),
    MatrixType.Q3_K: (108,),
    MatrixType.Q4_K: (0, 2),
    MatrixType.Q5_K: (0, 2),
    MatrixType.Q6_K: (208,),
}
_FP16: tuple[np.dtype[Any], int] = (np.dtype("<u2"), 0x7C00)  # its bits, and those of its exponent
_NUMBERS: dict[MatrixType, tuple[np.dtype[Any], int]] = {
    MatrixType.F32: (np.dtype("<u4"), 0x7F800000),
    MatrixType.BF16: (np.dtype("<u2"), 0x7F80),
}
