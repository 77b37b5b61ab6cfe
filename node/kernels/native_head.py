"""The head on the native kernels: embedding, final norm and output matrix, as quantised.

It stays on the machine that asked, so no other member sees a token. Knows no stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from covey.node.engine.errors import UnknownToken
from covey.node.engine.stage import Head
from covey.node.engine.tensors import EngineDtype, HiddenStates, Quantization, check_hidden
from covey.node.model.checkpoint import Checkpoint
from covey.node.model.config import ModelConfig
from covey.node.model.tensor_source import TensorSlice

from .library import Engine, load_library
from .packed import PackedBlock, Packer
from .packed_cache import PackedCache


def load_native_head(
    checkpoint: Checkpoint,
    threads: int = 1,
    *,
    engine: Engine | None = None,
    cache: PackedCache | None = None,
    quantize: Quantization | None = None,
) -> Head:
    """Read and pack the embedding, the final norm and, unless it is tied, the output matrix.

    `threads`, `engine`, `cache` and `quantize` are as in `load_native_stage`.

    Raises:
        KernelsUnavailable, UnsupportedModel, CorruptModel: see `load_native_stage`.
    """
    engine = engine or Engine(load_library(), threads)
    packer = Packer(engine.library, quantize)

    def load(blob: str) -> PackedBlock:
        parts = head_parts(checkpoint)[blob]
        if cache is None:
            return packer.pack(checkpoint, parts)
        return cache.load(packer, checkpoint, blob, parts)

    return NativeHead(checkpoint.config, load("embedding"), load("head"), engine)


def head_parts(checkpoint: Checkpoint) -> dict[str, dict[str, TensorSlice]]:
    """Blob -> field -> where it lies: what a head holds."""

    def whole(name: str) -> TensorSlice:
        info = checkpoint.source.tensors[name]
        return TensorSlice.of(info, 0, info.shape[0])

    head = {"output_norm": checkpoint.output_norm_part()}
    if not checkpoint.config.tied_embeddings:
        head["output"] = whole(checkpoint.names.head)
    return {"embedding": {"embedding": whole(checkpoint.names.embedding)}, "head": head}


class NativeHead:
    """A `Head` on the native library; made by `load_native_head`."""

    def __init__(
        self, config: ModelConfig, embedding: PackedBlock, head: PackedBlock, engine: Engine
    ) -> None:
        self.dtype: EngineDtype = "fp32"
        self.vocab_size = config.vocab_size
        self.weight_bytes = embedding.buffer.nbytes + head.buffer.nbytes
        self._config = config
        self._owned = (embedding, head)  # keeps alive what the others point to
        self._embedding = embedding.matrices["embedding"].describe(engine.library)
        output = head.matrices.get("output", embedding.matrices["embedding"])
        self._output = output.describe(engine.library)
        self._norm = head.floats["output_norm"]
        self._engine = engine

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
        return self._engine.head_logits(self._output, self._norm, self._config.rms_norm_eps, rows)

    def logits_of_each(self, rows: Sequence[HiddenStates]) -> Sequence[npt.NDArray[np.float32]]:
        """See `Head.logits_of_each`; the matrix is read once for all."""
        return list(self.logits(rows[0] if len(rows) == 1 else np.concatenate(rows)))
