"""Weights as the kernels take them: a block of a checkpoint in one contiguous, aligned buffer.

Packing only rearranges the file's own quantised blocks, bit for bit; float matrices can be
quantised first. Tensors of a type that has no kernel, and weights or scales that are NaN or
infinite, are refused here, before a kernel sees them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from covey.node.engine.tensors import Quantization
from covey.node.model.checkpoint import Checkpoint
from covey.node.model.errors import CorruptModel, UnsupportedModel
from covey.node.model.layouts import expert_field
from covey.node.model.tensor_source import TensorInfo, TensorSlice

from .library import Bytes, Floats, Library
from .matrix_type import MatrixType
from .quantize import quantize_matrix
from .structures import Block, Matrix

ALIGNMENT = 64
GROUP_ROWS = 16  # of a packed matrix, that lie together; the groups follow one another
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")  # with experts "gate.0" and so on
ENDS = ("embedding", "output")
_PIECE_BYTES = 1 << 23  # of a file's tensor, packed at once
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


@dataclass(frozen=True, slots=True)
class Packer:
    """Packs for one library; float matrices become `quantize` if that is given.

    Of such a matrix the embedding and the output become Q8_0, as llama.cpp keeps them, and so does
    a matrix whose rows are no whole blocks of Q4_K. Quantised matrices stay what they are.
    """

    library: Library
    quantize: Quantization | None = None

    def matrix_type(self, name: str, part: TensorSlice) -> MatrixType:
        """The packed type of one matrix; raises UnsupportedModel if there is none.

        Some of the columns are of the type that all of them would be.
        """
        kind = matrix_type(part.info)
        if self.quantize is None or not kind.is_float:
            return kind
        wanted = MatrixType[self.quantize.upper()]
        choices = (MatrixType.Q8_0,) if name in ENDS else (wanted, MatrixType.Q8_0)
        fitting = (each for each in choices if part.row_columns % each.block_columns == 0)
        return next(fitting, kind)

    def block_columns(self, name: str, part: TensorSlice) -> int:
        """How many columns of a matrix must stay together; raises UnsupportedModel."""
        return max(self.matrix_type(name, part).block_columns, 32)

    def changes(self, parts: Mapping[str, TensorSlice]) -> bool:
        """Whether any of these matrices is quantised."""
        return any(
            is_matrix(name) and self.matrix_type(name, part) is not matrix_type(part.info)
            for name, part in parts.items()
        )

    def block_bytes(self, parts: Mapping[str, TensorSlice]) -> int:
        """Bytes that a block of these parts takes when packed; raises UnsupportedModel."""
        return sum(_aligned(self._part_bytes(name, part)) for name, part in parts.items())

    def view(self, parts: Mapping[str, TensorSlice], buffer: Bytes) -> PackedBlock:
        """A buffer of `block_bytes` as what is in it, or will be: nothing is copied.

        Raises:
            UnsupportedModel: a tensor's type or shape has no kernel.
        """
        matrices, floats, at = {}, {}, 0
        for name, part in parts.items():
            size = self._part_bytes(name, part)
            data = buffer[at : at + size]
            if is_matrix(name):
                rows, columns = part.info.shape
                kind = self.matrix_type(name, part)
                matrices[name] = PackedMatrix(kind, rows, columns, data)
            else:
                floats[name] = data.view(np.float32).reshape(part.info.shape)
            at += _aligned(size)
        return PackedBlock(buffer, matrices, floats)

    def pack(
        self,
        checkpoint: Checkpoint,
        parts: Mapping[str, TensorSlice],
        buffer: Bytes | None = None,
    ) -> PackedBlock:
        """Read the parts of one block, or other parts, and pack them into zeroed `buffer`.

        Raises:
            UnsupportedModel: a tensor's type or shape has no kernel.
            CorruptModel: a weight or a scale is NaN or infinite, or a weight is too large to be
                quantised.
        """
        if buffer is None:
            buffer = aligned_memory(self.block_bytes(parts))
        block = self.view(parts, buffer)
        for name, matrix in block.matrices.items():
            blocks = _read_matrix(checkpoint, parts[name], matrix.kind)
            self.library.pack(matrix.kind, matrix.rows, matrix.columns, blocks, matrix.data)
        for name, values in block.floats.items():
            values[:] = checkpoint.read(parts[name])
        return block

    def pieces(self, checkpoint: Checkpoint, parts: Mapping[str, TensorSlice]) -> Iterator[Bytes]:
        """The same, byte for byte, a few megabytes at a time: for what is larger than memory.

        Raises:
            UnsupportedModel, CorruptModel: see `pack`, whenever the next piece is asked for.
        """
        for name, part in parts.items():
            if is_matrix(name):
                yield from self._matrix_pieces(checkpoint, name, part)
            else:
                yield checkpoint.read(part).reshape(-1).view(np.uint8)
            size = self._part_bytes(name, part)
            yield np.zeros(_aligned(size) - size, dtype=np.uint8)

    def _matrix_pieces(
        self, checkpoint: Checkpoint, name: str, part: TensorSlice
    ) -> Iterator[Bytes]:
        kind, (n_rows, columns) = self.matrix_type(name, part), part.info.shape
        step = max(_PIECE_BYTES * n_rows // part.info.nbytes // GROUP_ROWS, 1) * GROUP_ROWS
        for first in range(0, n_rows, step):
            rows = part.rows(first, min(first + step, n_rows))
            packed = np.empty(self._part_bytes(name, rows), dtype=np.uint8)
            blocks = _read_matrix(checkpoint, rows, kind)
            self.library.pack(kind, rows.info.shape[0], columns, blocks, packed)
            yield packed

    def _part_bytes(self, name: str, part: TensorSlice) -> int:
        if is_matrix(name):
            return packed_size(self.library, part.info, self.matrix_type(name, part))
        if part.info.type not in _FLOAT_TYPES:
            raise UnsupportedModel(f"type {part.info.type} of tensor {part.tensor!r}", _FLOAT_TYPES)
        return 4 * prod(part.info.shape)


def is_matrix(name: str) -> bool:
    """Whether a part is packed; else it is kept as float32."""
    return name.partition(".")[0] in (*MATRICES, *ENDS)


def matrix_type(info: TensorInfo) -> MatrixType:
    """The type of a tensor as it is; raises UnsupportedModel if there is no kernel for it."""
    if info.type not in MatrixType.__members__:
        raise UnsupportedModel(
            f"type {info.type} of tensor {info.name!r} in the native engine",
            MatrixType.__members__,
        )
    return MatrixType[info.type]


def packed_size(library: Library, info: TensorInfo, kind: MatrixType | None = None) -> int:
    """Bytes that a matrix takes when packed as `kind`, or as it is; raises UnsupportedModel."""
    kind = kind or matrix_type(info)
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


def _read_matrix(checkpoint: Checkpoint, part: TensorSlice, kind: MatrixType) -> Bytes:
    """The blocks of one matrix in `kind`: those of the file, or quantised from its numbers."""
    blocks = np.frombuffer(checkpoint.raw(part), dtype=np.uint8)
    stored = matrix_type(part.info)
    _check_finite(checkpoint, part, stored, blocks, "finite numbers")
    if kind is stored:
        return blocks
    quantized = quantize_matrix(part.info, blocks, kind)
    _check_finite(checkpoint, part, kind, quantized, f"numbers that {kind.name} can hold")
    return quantized


def _check_finite(
    checkpoint: Checkpoint, part: TensorSlice, kind: MatrixType, blocks: Bytes, expected: str
) -> None:
    bad = kind.first_not_finite(blocks)
    if bad is not None:
        stored = matrix_type(part.info)
        at = bad // kind.block_bytes * kind.block_columns // stored.block_columns
        raise CorruptModel(
            checkpoint.path,
            part.tensor,
            f"expected {expected} in the block at byte "
            f"{part.byte_in_file(at * stored.block_bytes)}",
        )


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
