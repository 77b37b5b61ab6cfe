"""The head on the native kernels: embedding, final norm and output matrix, as quantised.

It stays on the machine that asked, so no other member sees a token. Knows no stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from covey.node.engine.errors import UnknownToken
from covey.node.engine.stage import Head
from covey.node.engine.tensors import EngineDtype, HiddenStates, check_hidden
from covey.node.model.checkpoint import Checkpoint
from covey.node.model.config import ModelConfig

from .library import Engine, Floats, load_library
from .packed import PackedMatrix, load_norm, pack_matrix


def load_native_head(
    checkpoint: Checkpoint, threads: int = 1, *, engine: Engine | None = None
) -> Head:
    """Read and pack the embedding, the final norm and, unless it is tied, the output matrix.

    `threads` and `engine` are as in `load_native_stage`.

    Raises:
        KernelsUnavailable, UnsupportedModel, CorruptModel: see `load_native_stage`.
    """
    engine = engine or Engine(load_library(), threads)
    tensors, names, config = checkpoint.source.tensors, checkpoint.names, checkpoint.config
    embedding = pack_matrix(engine.library, checkpoint, tensors[names.embedding])
    output = embedding
    if not config.tied_embeddings:
        output = pack_matrix(engine.library, checkpoint, tensors[names.head])
    norm = load_norm(checkpoint, tensors[names.output_norm])
    return NativeHead(config, embedding=embedding, norm=norm, output=output, engine=engine)


class NativeHead:
    """A `Head` on the native library; made by `load_native_head`."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        embedding: PackedMatrix,
        norm: Floats,
        output: PackedMatrix,
        engine: Engine,
    ) -> None:
        self.dtype: EngineDtype = "fp32"
        self.vocab_size = config.vocab_size
        matrices = {id(matrix): matrix for matrix in (embedding, output)}.values()
        self.weight_bytes = norm.nbytes + sum(matrix.data.nbytes for matrix in matrices)
        self._config = config
        self._owned = (embedding, output)  # keeps alive what the two below point to
        self._embedding = embedding.describe(engine.library)
        self._output = output.describe(engine.library)
        self._norm = norm
        self._engine = engine

    def embed(self, ids: Sequence[int]) -> HiddenStates:
        """See `Head.embed`."""
        if not ids:
            raise ValueError("no tokens to embed")
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise UnknownToken(token, self.vocab_size)
        return self._engine.library.embed(self._embedding, np.array(ids, dtype=np.int32))

    def logits(self, hidden: HiddenStates) -> npt.NDArray[np.float32]:
        """See `Head.logits`."""
        check_hidden(hidden, self.dtype, self._config.hidden_size)
        rows = np.ascontiguousarray(hidden)
        return self._engine.head_logits(self._output, self._norm, self._config.rms_norm_eps, rows)

    def logits_of_each(self, rows: Sequence[HiddenStates]) -> Sequence[npt.NDArray[np.float32]]:
        """See `Head.logits_of_each`; the matrix is read once for all."""
        return list(self.logits(rows[0] if len(rows) == 1 else np.concatenate(rows)))
