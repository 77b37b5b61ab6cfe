"""Weights as the kernels take them: a block of a checkpoint in one contiguous, aligned buffer.

Packing only rearranges the file's own quantised blocks, bit for bit. Tensors of a type that has
no kernel, and scales that are NaN or infinite, are refused here, before a kernel sees them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from covey.node.model.checkpoint import Checkpoint
from covey.node.model.errors import CorruptModel, UnsupportedModel
from covey.node.model.tensor_source import TensorInfo, to_float32

from .library import Block, Bytes, Floats, Library, Matrix
from .matrix_type import MatrixType

ALIGNMENT = 64
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("attn_norm", "ffn_norm")
_NORM_TYPES = ("F32", "F16", "BF16")


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
    matrices: Mapping[str, PackedMatrix]  # by field of `BlockWeights`
    norms: Mapping[str, Floats]

    def describe(self, library: Library) -> Block:
        """What the library is told of it; keep this object alive meanwhile."""
        return Block(
            *(self.norms[name].ctypes.data for name in NORMS),
            *(self.matrices[name].describe(library) for name in MATRICES),
        )


def pack_block(library: Library, checkpoint: Checkpoint, block_idx: int) -> PackedBlock:
    """Read one block and pack it.

    Raises:
        IndexError: no such block.
        UnsupportedModel: a tensor's type or shape has no kernel.
        CorruptModel: a scale is NaN or infinite.
    """
    names = checkpoint.block_tensors(block_idx)
    infos = {field: checkpoint.source.tensors[name] for field, name in names.items()}
    parts = _aligned_parts(_part_sizes(library, infos))
    matrices = {
        field: pack_matrix(library, checkpoint, infos[field], parts[field]) for field in MATRICES
    }
    norms = {}
    for field in NORMS:
        norms[field] = parts[field].view(np.float32)
        norms[field][:] = load_norm(checkpoint, infos[field])
    return PackedBlock(parts[""], matrices, norms)


def pack_matrix(
    library: Library, checkpoint: Checkpoint, info: TensorInfo, out: Bytes | None = None
) -> PackedMatrix:
    """Pack one matrix into `out` of `packed_size` bytes, or into memory of its own."""
    kind, (rows, columns) = matrix_type(info), info.shape
    if out is None:
        out = _aligned_parts({"matrix": packed_size(library, info)})["matrix"]
    blocks = np.frombuffer(checkpoint.source.raw(info.name), dtype=np.uint8)
    bad = kind.first_not_finite(blocks)
    if bad is not None:
        raise CorruptModel(
            checkpoint.path,
            info.name,
            f"expected finite numbers in the block at byte {info.offset + bad}",
        )
    library.pack(kind, rows, columns, blocks, out)
    return PackedMatrix(kind, rows, columns, out)


def load_norm(checkpoint: Checkpoint, info: TensorInfo) -> Floats:
    """A norm's weight as float32."""
    if info.type not in _NORM_TYPES:
        raise UnsupportedModel(f"type {info.type} of tensor {info.name!r}", _NORM_TYPES)
    return to_float32(info, checkpoint.source.raw(info.name))


def matrix_type(info: TensorInfo) -> MatrixType:
    """The packed type of a tensor; raises UnsupportedModel if there is none."""
    if info.type not in MatrixType.__members__:
        raise UnsupportedModel(
            f"type {info.type} of tensor {info.name!r} in the native engine",
            MatrixType.__members__,
        )
    return MatrixType[info.type]


def packed_size(library: Library, info: TensorInfo) -> int:
    """Bytes that a tensor takes when packed; raises UnsupportedModel."""
    kind = matrix_type(info)
    multiple = max(kind.block_columns, 32)
    if len(info.shape) != 2 or info.shape[1] % multiple:
        raise UnsupportedModel(
            f"shape {list(info.shape)} of {kind.name} tensor {info.name!r} in the native engine",
            (f"[rows, a multiple of {multiple}]",),
        )
    return library.packed_bytes(kind, *info.shape)


def packed_block_bytes(library: Library, checkpoint: Checkpoint, block_idx: int) -> int:
    """Bytes that a block takes when packed; raises UnsupportedModel."""
    names = checkpoint.block_tensors(block_idx)
    infos = {field: checkpoint.source.tensors[name] for field, name in names.items()}
    return _end_of(_part_sizes(library, infos))


def _part_sizes(library: Library, infos: Mapping[str, TensorInfo]) -> dict[str, int]:
    sizes = {field: packed_size(library, infos[field]) for field in MATRICES}
    return sizes | {field: 4 * infos[field].shape[0] for field in NORMS}


def _end_of(sizes: Mapping[str, int]) -> int:
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values())


def _aligned_parts(sizes: Mapping[str, int]) -> dict[str, Bytes]:
    """Views of one new buffer by name, each aligned; the buffer itself is under ""."""
    starts, end = {}, 0
    for name, size in sizes.items():
        starts[name] = end
        end += -(-size // ALIGNMENT) * ALIGNMENT
    memory = np.zeros(end + ALIGNMENT, dtype=np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    buffer = memory[first : first + end]
    return {"": buffer} | {name: buffer[at : at + sizes[name]] for name, at in starts.items()}
