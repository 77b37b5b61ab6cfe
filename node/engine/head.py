"""The head in torch: embedding, final norm and output matrix.

It stays on the machine that asked, so no other member sees a token. Knows no stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor

from covey.node.model.checkpoint import Checkpoint
from covey.node.model.config import ModelConfig

from .errors import UnknownToken
from .stage import Head
from .tensors import EngineDtype, HiddenStates, check_hidden
from .torch_blocks import TORCH_DTYPES, hidden_to_numpy, hidden_to_torch

__all__ = ["Head", "TorchHead", "load_head"]


def load_head(checkpoint: Checkpoint, dtype: EngineDtype = "fp32") -> TorchHead:
    """Read the embedding, the final norm and, unless it is tied, the output matrix."""
    torch_dtype = TORCH_DTYPES[dtype]
    embedding = checkpoint.embedding().to(torch_dtype)
    head = checkpoint.head()
    return TorchHead(
        checkpoint.config,
        dtype,
        embedding=embedding,
        norm=checkpoint.output_norm().to(torch_dtype),
        output=embedding if head is None else head.to(torch_dtype),
    )


class TorchHead:
    """A `Head` in torch; made by `load_head`."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: EngineDtype,
        *,
        embedding: Tensor,
        norm: Tensor,
        output: Tensor,
    ) -> None:
        self.dtype: EngineDtype = dtype
        self.vocab_size = config.vocab_size
        tied = output is embedding
        self.weight_bytes = embedding.nbytes + norm.nbytes + (0 if tied else output.nbytes)
        self._config = config
        self._embedding = embedding  # [V, D]
        self._norm = norm  # [D]
        self._output = output  # [V, D]

    @torch.inference_mode()
    def embed(self, ids: Sequence[int]) -> HiddenStates:
        """See `Head.embed`."""
        if not ids:
            raise ValueError("no tokens to embed")
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise UnknownToken(token, self.vocab_size)
        hidden = F.embedding(torch.tensor(ids), self._embedding)
        return hidden_to_numpy(hidden * self._config.embedding_scale)

    @torch.inference_mode()
    def logits(self, hidden: HiddenStates) -> npt.NDArray[np.float32]:
        """See `Head.logits`."""
        check_hidden(hidden, self.dtype, self._config.hidden_size)
        x = hidden_to_torch(hidden, self.dtype)
        normed = F.rms_norm(x, (x.shape[-1],), self._norm, self._config.rms_norm_eps)
        logits: npt.NDArray[np.float32] = F.linear(normed, self._output).float().numpy()
        return logits

    def logits_of_each(self, rows: Sequence[HiddenStates]) -> Sequence[npt.NDArray[np.float32]]:
        """See `Head.logits_of_each`; torch's results depend on how many rows there are."""
        return [self.logits(row)[0] for row in rows]
