"""The reference shard: a member's part of a span of blocks in plain torch, fp32 or bf16.

What every faster shard is held against. Sessions are computed one after the other, so that what
else is in a step changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from covey.node.model.checkpoint import Checkpoint
from covey.node.model.config import ModelConfig

from .errors import EngineError
from .group_steps import GroupSteps, SessionRows
from .sessions import SessionLength, SessionLengths, check_capacity
from .shard import Slice
from .slices import check_slice, cut_block, has_columns, has_heads, slice_config, stored_columns
from .stage import Step
from .tensors import EngineDtype, HiddenStates, itemsize
from .torch_blocks import (
    AttentionWeights,
    Cache,
    MlpWeights,
    Rows,
    TorchBlocks,
    attention_weights,
    hidden_to_numpy,
    hidden_to_torch,
    mlp_weights,
    nbytes,
)


def load_shard(
    checkpoint: Checkpoint,
    span: tuple[int, int],
    cut: Slice,
    dtype: EngineDtype = "fp32",
    on_block: Callable[[int, int], None] | None = None,
    verify: bool = False,
) -> TorchShard:
    """Read and decode what `cut` has of the blocks of `span`; arguments as in `load_stage`.

    Raises:
        ValueError: not a span or a slice of this model, or it cuts blocks of quantised numbers.
        CorruptModel: with `verify`, a block is not what `checkpoint.blobs` says.
    """
    start, end = span
    config = checkpoint.config
    if not 0 <= start < end <= config.n_blocks:
        raise ValueError(f"span {span} of a model of {config.n_blocks} blocks")
    check_slice(config, cut)
    blocks = []
    for block_idx in range(start, end):
        if verify:
            checkpoint.verify_blob(f"block.{block_idx}")
        parts = cut_block(checkpoint.block_parts(block_idx), config, cut, stored_columns)
        read = {name: torch.from_numpy(checkpoint.read(part)) for name, part in parts.items()}
        blocks.append(
            _Block(
                attention_weights(read, dtype) if has_heads(cut) else None,
                mlp_weights(read, dtype) if has_columns(cut) else None,
            )
        )
        if on_block:
            on_block(len(blocks), end - start)
    return TorchShard(config, span, cut, dtype, blocks)


@dataclass(frozen=True, slots=True)
class _Block:
    """None where the slice has no part."""

    attention: AttentionWeights | None
    mlp: MlpWeights | None


@dataclass(frozen=True, slots=True)
class _Session:
    """The rows of one session on their way, and for each block where they stand in it."""

    rows: SessionRows[SessionLength]
    at: list[Rows]

    @property
    def places(self) -> slice:
        """Which of the rows of the step they are."""
        return slice(self.rows.first, self.rows.first + self.rows.n_rows)


class TorchShard:
    """A `Shard` in torch; made by `load_shard`."""

    def __init__(
        self,
        config: ModelConfig,
        span: tuple[int, int],
        cut: Slice,
        dtype: EngineDtype,
        blocks: list[_Block],
    ) -> None:
        own = slice_config(config, cut)
        self.span = span
        self.slice = cut
        self.dtype: EngineDtype = dtype
        self.hidden_size = config.hidden_size
        self.weight_bytes = sum(
            nbytes(half) for block in blocks for half in (block.attention, block.mlp) if half
        )
        self.kv_bytes_per_token = (
            own.kv_bytes_per_token(len(blocks), itemsize(dtype)) if has_heads(cut) else 0
        )
        self._config = config
        self._blocks = blocks
        self._torch = TorchBlocks(own, span, dtype)
        self._steps = GroupSteps(SessionLengths(config), dtype, config.hidden_size)
        self._caches: dict[str, Cache] = {}
        self._step: list[_Session] = []

    def open_session(self, session: str, n_tokens: int, prefix: Sequence[bytes] = ()) -> int:
        """See `Shard.open_session`; with heads, nothing is shared."""
        if not has_heads(self.slice):
            return self._steps.open(session, n_tokens, prefix)
        check_capacity(self._config, session, n_tokens)
        self.close_session(session)  # before the new one is made, not after
        self._caches[session] = self._torch.new_cache(n_tokens)
        return self._steps.open(session, n_tokens)

    def close_session(self, session: str) -> None:
        """See `Shard.close_session`."""
        self._steps.close(session)
        self._caches.pop(session, None)

    def begin(self, steps: Sequence[Step]) -> list[EngineError | None]:
        """See `Shard.begin`."""
        answers, rows = self._steps.begin(steps)
        self._step = [
            _Session(each, self._torch.rows(each.start, each.end, each.held.is_long))
            for each in rows
        ]
        return answers

    @torch.inference_mode()
    def attention(self, block_idx: int, hidden: HiddenStates) -> HiddenStates | None:
        """See `Shard.attention`."""
        place, x = self._place(block_idx, hidden)
        weights = self._blocks[place].attention
        if weights is None:
            return None
        parts = [
            self._torch.attention(
                weights, x[each.places], self._caches[each.rows.session], place, each.at[place]
            )
            for each in self._step
        ]
        return hidden_to_numpy(torch.cat(parts))

    @torch.inference_mode()
    def mlp(self, block_idx: int, hidden: HiddenStates) -> HiddenStates | None:
        """See `Shard.mlp`."""
        place, x = self._place(block_idx, hidden)
        if block_idx == self.span[1] - 1:
            self._steps.note(hidden)
        weights = self._blocks[place].mlp
        if weights is None:
            return None
        return hidden_to_numpy(
            torch.cat([self._torch.mlp(weights, x[each.places]) for each in self._step])
        )

    def end(self, *, is_done: bool) -> None:
        """See `Shard.end`."""
        self._step = []
        self._steps.end(is_done=is_done)

    def _place(self, block_idx: int, hidden: HiddenStates) -> tuple[int, Tensor]:
        if not self._step:
            raise ValueError("no step has begun")
        if not self.span[0] <= block_idx < self.span[1]:
            raise ValueError(f"block {block_idx} of span {self.span}")
        self._steps.check(hidden)
        return block_idx - self.span[0], hidden_to_torch(hidden, self.dtype)
