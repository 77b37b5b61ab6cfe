"""The reference stage: a span of blocks in plain torch, fp32 or bf16, on the CPU.

What a block computes is in `torch_blocks.py`. This is the oracle that every faster engine is held
against, so it stays simple. It imports no checkpoint format and knows no peer. Results are
bit-identical only for the same number of torch threads (which the caller sets) and the same
chunking of the prompt: torch's matrix products add up in another order for another shape. How the
blocks are cut into stages changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch

from covey.node.model.checkpoint import BlockWeights, Checkpoint
from covey.node.model.config import ModelConfig

from .errors import NonFiniteValues
from .sessions import SessionLengths, check_capacity
from .stage import Step, StepResult, forward_each
from .tensors import EngineDtype, HiddenStates, check_hidden, itemsize
from .torch_blocks import (
    AttentionWeights,
    Cache,
    MlpWeights,
    TorchBlocks,
    attention_weights,
    hidden_to_numpy,
    hidden_to_torch,
    mlp_weights,
    nbytes,
)


def load_stage(
    checkpoint: Checkpoint,
    span: tuple[int, int],
    dtype: EngineDtype = "fp32",
    on_block: Callable[[int, int], None] | None = None,
    verify: bool = False,
) -> TorchStage:
    """Read and decode the blocks of `span`, and nothing else of the model.

    Args:
        checkpoint: open; not needed any more afterwards.
        span: blocks [start, end).
        dtype: of weights, KV cache and hidden states.
        on_block: told (blocks loaded, blocks in all) after each.
        verify: hash each block first, against `checkpoint.blobs()`; that reads the whole model
            unless its hashes are remembered, so with a manifest call `verify_blob` instead.

    Raises:
        ValueError: not a span of this model.
        CorruptModel: with `verify`, a block is not what `checkpoint.blobs` says.
    """
    start, end = span
    if not 0 <= start < end <= checkpoint.config.n_blocks:
        raise ValueError(f"span {span} of a model of {checkpoint.config.n_blocks} blocks")
    blocks = []
    for block_idx in range(start, end):
        if verify:
            checkpoint.verify_blob(f"block.{block_idx}")
        blocks.append(_fuse(checkpoint.block(block_idx), dtype))
        if on_block:
            on_block(len(blocks), end - start)
    return TorchStage(checkpoint.config, span, dtype, blocks)


@dataclass(frozen=True, slots=True)
class _Block:
    attention: AttentionWeights
    mlp: MlpWeights


class TorchStage:
    """A `Stage` in torch; made by `load_stage`."""

    def __init__(
        self, config: ModelConfig, span: tuple[int, int], dtype: EngineDtype, blocks: list[_Block]
    ) -> None:
        self.span = span
        self.dtype: EngineDtype = dtype
        self.hidden_size = config.hidden_size
        self.weight_bytes = sum(nbytes(block.attention) + nbytes(block.mlp) for block in blocks)
        self.kv_bytes_per_token = config.kv_bytes_per_token(len(blocks), itemsize(dtype))
        self._config = config
        self._blocks = blocks
        self._torch = TorchBlocks(config, span, dtype)
        self._lengths = SessionLengths(config)
        self._caches: dict[str, Cache] = {}

    def open_session(self, session: str, n_tokens: int, prefix: Sequence[bytes] = ()) -> int:
        """See `Stage.open_session`; the memory is taken here and now, nothing is shared."""
        check_capacity(self._config, session, n_tokens)
        self.close_session(session)  # before the new one is made, not after
        self._caches[session] = self._torch.new_cache(n_tokens)
        return self._lengths.open(session, n_tokens)

    def close_session(self, session: str) -> None:
        """See `Stage.close_session`."""
        self._lengths.close(session)
        self._caches.pop(session, None)

    @torch.inference_mode()
    def forward(self, session: str, position: int, hidden: HiddenStates) -> HiddenStates:
        """See `Stage.forward`."""
        check_hidden(hidden, self.dtype, self.hidden_size)
        end = position + len(hidden)
        held = self._lengths.prepare(session, position, len(hidden))
        cache = self._caches[session]
        x = hidden_to_torch(hidden, self.dtype)
        rows = self._torch.rows(position, end, held.is_long)
        for place, block in enumerate(self._blocks):
            x = x + self._torch.attention(block.attention, x, cache, place, rows[place])
            x = x + self._torch.mlp(block.mlp, x)
        if not torch.isfinite(x).all():
            is_received = not bool(torch.isfinite(hidden_to_torch(hidden, self.dtype)).all())
            raise NonFiniteValues(session=session, position=position, is_received=is_received)
        self._lengths.advance(held, end)
        return hidden_to_numpy(x)

    def forward_batch(self, steps: Sequence[Step]) -> list[StepResult]:
        """See `Stage.forward_batch`."""
        return forward_each(self, steps)


def _fuse(weights: BlockWeights, dtype: EngineDtype) -> _Block:
    named = {each.name: getattr(weights, each.name) for each in fields(weights)}
    read = {name: tensor for name, tensor in named.items() if tensor is not None}
    return _Block(attention_weights(read, dtype), mlp_weights(read, dtype))
