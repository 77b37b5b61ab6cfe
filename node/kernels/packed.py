"""Weights as the kernels take them: a block of a checkpoint in one contiguous, aligned buffer.

Packing only rearranges the file's own quantised blocks, bit for bit. Tensors of a type that has
no kernel, and scales that are NaN or infinite, are refused here, before a kernel sees them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from covey.node.model.checkpoint import Checkpoint
from covey.node.model.errors import CorruptModel, UnsupportedModel
from covey.node.model.layouts import expert_field
from covey.node.model.tensor_source import TensorInfo, TensorSlice

from .library import Block, Bytes, Floats, Library, Matrix
from .matrix_type import MatrixType

ALIGNMENT = 64
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")  # with experts "gate.0" and so on
_FLOAT_TYPES = ("F32", "F16", "BF16")  # of what is kept as float32: norms, biases, routers


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """One matrix [rows, columns]; `data` is a view of its block's buffer."""

    kind: MatrixType
    rows: int
    columns: int
    data: Bytes

    def describe(self, library: Library) -> Matrix:
        """What the library is told of it; keep this object alive meanwhile."""
        return library.matrix(self.kind, self.rows, self.columns, self.data)


@dataclass(frozen=True, slots=True)
class PackedBlock:
    """One decoder block; everything is a view of `buffer`."""

    buffer: Bytes
    matrices: Mapping[str, PackedMatrix]  # by field of `Checkpoint.block_parts`
    floats: Mapping[str, Floats]  # norms, biases, the router

    def describe(self, library: Library, *, window: int = 0, rope: int = 0) -> Block:
        """What the library is told of it; keep this object and the result alive meanwhile.

        Args:
            library: that will be told.
            window: positions that a position sees, its own included; 0 is all.
            rope: index of the block's rope table, or NO_ROPE.
        """
        described = {name: matrix.describe(library) for name, matrix in self.matrices.items()}
        fields: dict[str, Any] = {name: values.ctypes.data for name, values in self.floats.items()}
        fields |= {name: described[name] for name in MATRICES if name in described}
        if "router" in self.floats:
            experts = [
                described[expert_field(name, expert)]
                for expert in range(len(self.floats["router"]))
                for name in ("gate", "up", "down")
            ]
            fields["experts"] = (Matrix * len(experts))(*experts)
        return Block(**fields, window=window, rope=rope)


def block_bytes(library: Library, parts: Mapping[str, TensorSlice]) -> int:
    """Bytes that a block of these parts takes when packed; raises UnsupportedModel."""
    return sum(_aligned(_part_bytes(library, name, part)) for name, part in parts.items())


def view_block(library: Library, parts: Mapping[str, TensorSlice], buffer: Bytes) -> PackedBlock:
    """A buffer of `block_bytes` as what is in it, or will be: nothing is copied.

    Raises:
        UnsupportedModel: a tensor's type or shape has no kernel.
    """
    matrices, floats, at = {}, {}, 0
    for name, part in parts.items():
        size = _part_bytes(library, name, part)
        data = buffer[at : at + size]
        if is_matrix(name):
            rows, columns = part.info.shape
            matrices[name] = PackedMatrix(matrix_type(part.info), rows, columns, data)
        else:
            floats[name] = data.view(np.float32).reshape(part.info.shape)
        at += _aligned(size)
    return PackedBlock(buffer, matrices, floats)


def pack_block(
    library: Library,
    checkpoint: Checkpoint,
    parts: Mapping[str, TensorSlice],
    buffer: Bytes | None = None,
) -> PackedBlock:
    """Read the parts of one block, or other parts, and pack them into zeroed `buffer`.

    Raises:
        UnsupportedModel: a tensor's type or shape has no kernel.
        CorruptModel: a scale is NaN or infinite.
    """
    if buffer is None:
        buffer = aligned_memory(block_bytes(library, parts))
    block = view_block(library, parts, buffer)
    for name, matrix in block.matrices.items():
        _pack_matrix(library, checkpoint, parts[name], matrix)
    for name, values in block.floats.items():
        values[:] = checkpoint.read(parts[name])
    return block


def is_matrix(name: str) -> bool:
    """Whether a part is packed; else it is kept as float32."""
    return name.partition(".")[0] in (*MATRICES, "embedding", "output")


def matrix_type(info: TensorInfo) -> MatrixType:
    """The packed type of a tensor; raises UnsupportedModel if there is none."""
    if info.type not in MatrixType.__members__:
        raise UnsupportedModel(
            f"type {info.type} of tensor {info.name!r} in the native engine",
            MatrixType.__members__,
        )
    return MatrixType[info.type]


def packed_size(library: Library, info: TensorInfo) -> int:
    """Bytes that a matrix takes when packed; raises UnsupportedModel."""
    kind = matrix_type(info)
    multiple = max(kind.block_columns, 32)
    if len(info.shape) != 2 or info.shape[1] % multiple:
        raise UnsupportedModel(
            f"shape {list(info.shape)} of {kind.name} tensor {info.name!r} in the native engine",
            (f"[rows, a multiple of {multiple}]",),
        )
    return library.packed_bytes(kind, *info.shape)


def aligned_memory(n_bytes: int) -> Bytes:
    """Zeros that begin where the kernels want it."""
    memory = np.zeros(n_bytes + ALIGNMENT, dtype=np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return memory[first : first + n_bytes]


def _part_bytes(library: Library, name: str, part: TensorSlice) -> int:
    if is_matrix(name):
        return packed_size(library, part.info)
    if part.info.type not in _FLOAT_TYPES:
        raise UnsupportedModel(f"type {part.info.type} of tensor {part.tensor!r}", _FLOAT_TYPES)
    return 4 * prod(part.info.shape)


def _pack_matrix(
    library: Library, checkpoint: Checkpoint, part: TensorSlice, matrix: PackedMatrix
) -> None:
    blocks = np.frombuffer(checkpoint.raw(part), dtype=np.uint8)
    bad = matrix.kind.first_not_finite(blocks)
    if bad is not None:
        raise CorruptModel(
            checkpoint.path,
            part.tensor,
            f"expected finite numbers in the block at byte {part.info.offset + bad}",
        )
    library.pack(matrix.kind, matrix.rows, matrix.columns, blocks, matrix.data)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
