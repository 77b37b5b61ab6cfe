"""The head on the native kernels: embedding, final norm and output matrix, as quantised.

It stays on the machine that asked, so no other member sees a token. Models with many tokens have
large ones: then only the rows of the embedding that are used need to be in memory, and the output
matrix can come from disk a piece at a time. Knows no stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd

import numpy as np
import numpy.typing as npt

from covey.node.disk import PIECE_BYTES, ColdFile
from covey.node.engine.errors import UnknownToken
from covey.node.engine.stage import Head
from covey.node.engine.tensors import EngineDtype, HiddenStates, Quantization, check_hidden
from covey.node.model.checkpoint import Checkpoint
from covey.node.model.config import ModelConfig
from covey.node.model.tensor_source import TensorSlice

from .library import Engine, Floats, load_library
from .packed import ALIGNMENT, GROUP_ROWS, PackedBlock, PackedMatrix, Packer
from .packed_cache import PackedCache
from .packed_file import ColdBlock
from .window import Extent, StreamFacts, Window


def load_native_head(
    checkpoint: Checkpoint,
    threads: int = 1,
    *,
    engine: Engine | None = None,
    cache: PackedCache | None = None,
    quantize: Quantization | None = None,
    streams: bool = False,
) -> Head:
    """Read and pack the embedding, the final norm and, unless it is tied, the output matrix.

    `threads`, `engine`, `cache` and `quantize` are as in `load_native_stage`. A head that streams
    reads the rows of the embedding that are asked for, and the output matrix anew for each step;
    for this there must be a cache.

    Raises:
        ValueError: a head is to stream without a cache.
        KernelsUnavailable, UnsupportedModel, CorruptModel, CannotStream: see `load_native_stage`.
    """
    engine = engine or Engine(load_library(), threads)
    packer = Packer(engine.library, quantize)
    parts = head_parts(checkpoint)
    if streams:
        if cache is None:
            raise ValueError("a head is streamed from a cache, and there is none")
        cold = {blob: cache.open(packer, checkpoint, blob, parts[blob]) for blob in parts}
        blocks = {blob: each.mapped() for blob, each in cold.items()}
        output: ResidentOutput | StreamedOutput = _streamed_output(engine, cold, blocks)
    else:
        blocks = {
            blob: packer.pack(checkpoint, parts[blob])
            if cache is None
            else cache.load(packer, checkpoint, blob, parts[blob])
            for blob in parts
        }
        output = ResidentOutput(engine, _output_matrix(blocks))
    return NativeHead(checkpoint.config, blocks, output, engine)


def head_parts(checkpoint: Checkpoint) -> dict[str, dict[str, TensorSlice]]:
    """Blob -> field -> where it lies: what a head holds."""

    def whole(name: str) -> TensorSlice:
        info = checkpoint.source.tensors[name]
        return TensorSlice.of(info, 0, info.shape[0])

    head = {"output_norm": checkpoint.output_norm_part()}
    if not checkpoint.config.tied_embeddings:
        head["output"] = whole(checkpoint.names.head)
    return {"embedding": {"embedding": whole(checkpoint.names.embedding)}, "head": head}


class ResidentOutput:
    """An output matrix in memory, in one of the blobs."""

    memory_bytes = 0  # of its own

    def __init__(self, engine: Engine, matrix: PackedMatrix) -> None:
        self._engine = engine
        self._owned = matrix  # keeps alive what is described
        self._matrix = matrix.describe(engine.library)

    def logits(self, norm: Floats, eps: float, rows: Floats) -> Floats:
        """Logits [n_rows, V] of hidden states [n_rows, D]."""
        return self._engine.head_logits(self._matrix, norm, eps, rows)


class StreamedOutput:
    """An output matrix on disk: read for each step, some rows of it at a time."""

    def __init__(self, engine: Engine, file: ColdFile, offset: int, matrix: PackedMatrix) -> None:
        """`offset`: where the matrix begins in the file."""
        self._engine = engine
        self._kind, self._n_rows, self._columns = matrix.kind, matrix.rows, matrix.columns
        group_bytes = engine.library.packed_bytes(matrix.kind, GROUP_ROWS, matrix.columns)
        # So many groups that each piece begins where the kernels want it.
        n_groups = ALIGNMENT // gcd(ALIGNMENT, group_bytes)
        n_groups *= max(PIECE_BYTES // (n_groups * group_bytes), 1)
        self._step = n_groups * GROUP_ROWS
        extents = [
            Extent(
                file,
                offset + first // GROUP_ROWS * group_bytes,
                engine.library.packed_bytes(matrix.kind, self._rows_from(first), matrix.columns),
            )
            for first in range(0, matrix.rows, self._step)
        ]
        self._window = Window(extents)
        self.memory_bytes = self._window.memory_bytes

    @property
    def facts(self) -> StreamFacts:
        """What was read for steps so far."""
        return self._window.facts

    def logits(self, norm: Floats, eps: float, rows: Floats) -> Floats:
        """The same, bit for bit; raises WeightsUnreadable if the disk fails."""
        out = np.empty((len(rows), self._n_rows), dtype=np.float32)
        library = self._engine.library
        for idx, first in enumerate(range(0, self._n_rows, self._step)):
            n_rows = self._rows_from(first)
            matrix = library.matrix(self._kind, n_rows, self._columns, self._window.take(idx))
            out[:, first : first + n_rows] = self._engine.head_logits(matrix, norm, eps, rows)
            self._window.release()
        return out

    def _rows_from(self, first: int) -> int:
        return min(self._step, self._n_rows - first)


class NativeHead:
    """A `Head` on the native library; made by `load_native_head`."""

    def __init__(
        self,
        config: ModelConfig,
        blobs: Mapping[str, PackedBlock],
        output: ResidentOutput | StreamedOutput,
        engine: Engine,
    ) -> None:
        self.dtype: EngineDtype = "fp32"
        self.vocab_size = config.vocab_size
        self._config = config
        self._blobs = blobs  # keeps alive what the others point to
        self._embedding = blobs["embedding"].matrices["embedding"].describe(engine.library)
        self._output = output
        self._norm = blobs["head"].floats["output_norm"]
        self._engine = engine
        self.weight_bytes = output.memory_bytes
        if isinstance(output, ResidentOutput):
            self.weight_bytes += sum(blob.buffer.nbytes for blob in blobs.values())

    @property
    def streaming(self) -> StreamFacts | None:
        """What was read from disk for steps, and waited for; None if all is in memory."""
        return self._output.facts if isinstance(self._output, StreamedOutput) else None

    @property
    def stall_s(self) -> float:
        """Seconds that steps have waited for the disk, in all."""
        return facts.stall_s if (facts := self.streaming) else 0.0

    def embed(self, ids: Sequence[int]) -> HiddenStates:
        """See `Head.embed`."""
        if not ids:
            raise ValueError("no tokens to embed")
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise UnknownToken(token, self.vocab_size)
        tokens = np.array(ids, dtype=np.int32)
        return self._engine.library.embed(self._embedding, tokens, self._config.embedding_scale)

    def logits(self, hidden: HiddenStates) -> npt.NDArray[np.float32]:
        """See `Head.logits`."""
        check_hidden(hidden, self.dtype, self._config.hidden_size)
        rows = np.ascontiguousarray(hidden)
        return self._output.logits(self._norm, self._config.rms_norm_eps, rows)

    def logits_of_each(self, rows: Sequence[HiddenStates]) -> Sequence[npt.NDArray[np.float32]]:
        """See `Head.logits_of_each`; the matrix is read once for all."""
        return list(self.logits(rows[0] if len(rows) == 1 else np.concatenate(rows)))


def _output_matrix(blobs: Mapping[str, PackedBlock]) -> PackedMatrix:
    """The output matrix, which may be the embedding."""
    return blobs["head"].matrices.get("output", blobs["embedding"].matrices["embedding"])


def _streamed_output(
    engine: Engine, cold: Mapping[str, ColdBlock], blobs: Mapping[str, PackedBlock]
) -> StreamedOutput:
    blob = "head" if "output" in blobs["head"].matrices else "embedding"
    matrix = _output_matrix(blobs)
    offset = matrix.data.ctypes.data - blobs[blob].buffer.ctypes.data
    for name in cold.keys() - {blob}:
        cold[name].file.close()
    return StreamedOutput(engine, cold[blob].file, offset, matrix)
