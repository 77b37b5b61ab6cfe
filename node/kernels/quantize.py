"""Float matrices as GGUF's quantised blocks, a few megabytes at a time.

Q8_0 and Q4_0 are the `gguf` package's, Q4_K is ours. All of them give every machine the same bytes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from covey.node.model.tensor_source import TensorInfo, to_float32

from .matrix_type import MatrixType
from .quantize_k import quantize_q4_k

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_PIECE_NUMBERS = 1 << 18
_SMALLEST = np.float32(1e-30)  # nothing below it, times any code, is seen in a scale of fp16


def quantize_matrix(info: TensorInfo, raw: Bytes, kind: MatrixType) -> Bytes:
    """The blocks of a float matrix [rows, columns] in `kind`, row after row.

    Args:
        info: F32, F16 or BF16; columns a multiple of the kind's block.
        raw: its bytes; finite numbers.
        kind: Q8_0, Q4_0 or Q4_K.

    A number that is too large for the kind makes its block's scale infinite; the caller looks.
    """
    rows, columns = info.shape
    stored_bytes = MatrixType[info.type].row_bytes(columns)
    out = np.empty((rows, kind.row_bytes(columns)), dtype=np.uint8)
    step = max(1, _PIECE_NUMBERS // columns)
    for first in range(0, rows, step):
        n_rows = min(step, rows - first)
        piece = replace(info, shape=(n_rows, columns))
        stored = raw[first * stored_bytes : (first + n_rows) * stored_bytes]
        out[first : first + n_rows] = quantize_rows(to_float32(piece, stored.data), kind)
    return out.reshape(-1)


def quantize_rows(values: Floats, kind: MatrixType) -> Bytes:
    """Rows [n, columns] of finite numbers as GGUF stores them, [n, bytes of a row]."""
    # A scale of zero comes of these anyway, and their inverses are infinite.
    values = np.where(np.abs(values) < _SMALLEST, np.float32(0), values)
    if kind is MatrixType.Q4_K:
        return quantize_q4_k(values)
    # Imported here: `gguf` takes a second, and packed weights from the disk need none of it.
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    with np.errstate(over="ignore", invalid="ignore"):
        blocks: Bytes = quantize(values, GGMLQuantizationType(int(kind)))
    return blocks
