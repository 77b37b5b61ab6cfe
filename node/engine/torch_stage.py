"""The reference stage: a Llama-type span of blocks in plain torch, fp32 or bf16, on the CPU.

It is the oracle that every faster engine is held against, so it stays simple. It imports no
checkpoint format and knows no peer. Results are bit-identical only for the same number of torch
threads (which the caller sets) and the same chunking of the prompt: torch's matrix products add
up in another order for another shape. How the blocks are cut into stages changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor

from covey.node.model.checkpoint import BlockWeights, Checkpoint
from covey.node.model.config import ModelConfig

from .errors import CacheOverflow, NonFiniteValues, PositionGap, UnknownSession
from .rope import RopeTable
from .stage import Step, StepResult, forward_each
from .tensors import EngineDtype, HiddenStates, check_hidden

TORCH_DTYPES = MappingProxyType({"fp32": torch.float32, "bf16": torch.bfloat16})


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
            unless its hashes are remembered, so with a manifest call `verify_block` instead.

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
            checkpoint.verify_block(block_idx)
        blocks.append(_fuse(checkpoint.block(block_idx), TORCH_DTYPES[dtype]))
        if on_block:
            on_block(len(blocks), end - start)
    return TorchStage(checkpoint.config, span, dtype, blocks)


@dataclass(frozen=True, slots=True)
class _Block:
    """Weights of one block as the products want them."""

    attn_norm: Tensor  # [D]
    qkv: Tensor  # [(H+2K)*E, D]
    o: Tensor  # [D, H*E]
    ffn_norm: Tensor  # [D]
    gate_up: Tensor  # [2*intermediate, D]
    down: Tensor  # [D, intermediate]

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.__slots__)


@dataclass(slots=True)
class _Session:
    """KV cache [n_blocks, K, capacity, E] of which the first `length` positions are filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Where the rows of one forward call stand: positions [start, end)."""

    start: int
    end: int
    cos: Tensor  # [T, rope_dim/2]
    sin: Tensor
    mask: Tensor | None  # [T, end], 0 or -inf; None for a single row, which sees all


class TorchStage:
    """A `Stage` in torch; made by `load_stage`."""

    def __init__(
        self, config: ModelConfig, span: tuple[int, int], dtype: EngineDtype, blocks: list[_Block]
    ) -> None:
        self.span = span
        self.dtype: EngineDtype = dtype
        self.hidden_size = config.hidden_size
        self.weight_bytes = sum(block.nbytes for block in blocks)
        self._config = config
        self._blocks = blocks
        self._torch_dtype = TORCH_DTYPES[dtype]
        self.kv_bytes_per_token = config.kv_bytes_per_token(len(blocks), self._torch_dtype.itemsize)
        self._rope = RopeTable(config)
        self._sessions: dict[str, _Session] = {}

    def open_session(self, session: str, n_tokens: int, prefix: Sequence[bytes] = ()) -> int:
        """See `Stage.open_session`; the memory is taken here and now, nothing is shared."""
        if n_tokens < 1:
            raise ValueError(f"n_tokens = {n_tokens}")
        if n_tokens > self._config.context_length:
            raise CacheOverflow(
                session=session,
                needed_tokens=n_tokens,
                capacity_tokens=self._config.context_length,
            )
        self._sessions.pop(session, None)  # before the new one is made, not after
        config = self._config
        shape = (len(self._blocks), config.n_kv_heads, n_tokens, config.head_dim)
        self._sessions[session] = _Session(
            torch.zeros(shape, dtype=self._torch_dtype), torch.zeros(shape, dtype=self._torch_dtype)
        )
        return 0

    def close_session(self, session: str) -> None:
        """See `Stage.close_session`."""
        self._sessions.pop(session, None)

    @torch.inference_mode()
    def forward(self, session: str, position: int, hidden: HiddenStates) -> HiddenStates:
        """See `Stage.forward`."""
        check_hidden(hidden, self.dtype, self.hidden_size)
        cache = self._rewind(session, position)
        end = position + len(hidden)
        if end > cache.capacity:
            raise CacheOverflow(session=session, needed_tokens=end, capacity_tokens=cache.capacity)
        x = hidden_to_torch(hidden, self.dtype)
        rows = self._rows(position, end)
        for i, block in enumerate(self._blocks):
            attended = self._attention(block, x, cache.keys[i], cache.values[i], rows)
            x = x + attended
            x = x + self._mlp(block, x)
        if not torch.isfinite(x).all():
            is_received = not bool(torch.isfinite(hidden_to_torch(hidden, self.dtype)).all())
            raise NonFiniteValues(session=session, position=position, is_received=is_received)
        cache.length = end
        return hidden_to_numpy(x)

    def forward_batch(self, steps: Sequence[Step]) -> list[StepResult]:
        """See `Stage.forward_batch`."""
        return forward_each(self, steps)

    def _rewind(self, session: str, position: int) -> _Session:
        cache = self._sessions.get(session)
        if cache is None:
            raise UnknownSession(session)
        if not 0 <= position <= cache.length:
            raise PositionGap(session=session, position=position, length=cache.length)
        cache.length = position
        return cache

    def _rows(self, start: int, end: int) -> _Rows:
        cos, sin = (torch.from_numpy(table) for table in self._rope.upto(end))
        mask = None
        if end - start > 1:
            mask = torch.full((end - start, end), -math.inf).triu(start + 1)
        return _Rows(start, end, cos[start:end], sin[start:end], mask)

    def _attention(
        self, block: _Block, x: Tensor, keys: Tensor, values: Tensor, at: _Rows
    ) -> Tensor:
        config = self._config
        n_tokens, n_kv, width = len(x), config.n_kv_heads, config.head_dim
        normed = F.rms_norm(x, (self.hidden_size,), block.attn_norm, config.rms_norm_eps)
        fused = F.linear(normed, block.qkv).view(n_tokens, -1, width)  # [T, H+2K, E]
        rotated = self._rotate(fused[:, : config.n_heads + n_kv], at)
        q, k = rotated[:, : config.n_heads], rotated[:, config.n_heads :]
        keys[:, at.start : at.end] = k.transpose(0, 1)  # [K, T, E]
        values[:, at.start : at.end] = fused[:, config.n_heads + n_kv :].transpose(0, 1)
        # The queries that share a KV head become rows of one product.
        grouped = q.reshape(n_tokens, n_kv, -1, width).permute(1, 2, 0, 3)  # [K, H/K, T, E]
        scores = grouped.reshape(n_kv, -1, width) @ keys[:, : at.end].transpose(1, 2)
        scores = scores.float() / math.sqrt(width)  # [K, H/K*T, end]
        if at.mask is not None:
            scores = (scores.view(n_kv, -1, n_tokens, at.end) + at.mask).view_as(scores)
        weights = scores.softmax(-1).to(self._torch_dtype)
        mixed = (weights @ values[:, : at.end]).view(n_kv, -1, n_tokens, width)
        return F.linear(mixed.permute(2, 0, 1, 3).reshape(n_tokens, -1), block.o)

    def _mlp(self, block: _Block, x: Tensor) -> Tensor:
        normed = F.rms_norm(x, (self.hidden_size,), block.ffn_norm, self._config.rms_norm_eps)
        gate, up = F.linear(normed, block.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, block.down)

    def _rotate(self, heads: Tensor, at: _Rows) -> Tensor:
        """Rotate the leading rope_dim dimensions of [T, n, E] by each row's position."""
        width = self._config.rope_dim
        turned, rest = heads[..., :width].float(), heads[..., width:]
        cos, sin = at.cos[:, None], at.sin[:, None]  # [T, 1, rope_dim/2]
        if self._config.rope_interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        else:
            a, b = turned.chunk(2, dim=-1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        turned = turned.to(heads.dtype)
        return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def hidden_to_torch(hidden: HiddenStates, dtype: EngineDtype) -> Tensor:
    """A tensor with the values of `hidden` in the engine's dtype; may share its memory."""
    # torch refuses to wrap arrays that are read-only, as those from a frame are; it is only read.
    writable = hidden if hidden.flags.writeable and hidden.flags.c_contiguous else hidden.copy()
    tensor = torch.from_numpy(writable)
    return tensor.view(torch.bfloat16) if dtype == "bf16" else tensor


def hidden_to_numpy(hidden: Tensor) -> HiddenStates:
    """The array form of a tensor in an engine's dtype; shares its memory."""
    if hidden.dtype == torch.bfloat16:
        bits: HiddenStates = hidden.contiguous().view(torch.uint16).numpy()
        return bits
    plain: HiddenStates = np.ascontiguousarray(hidden.numpy())
    return plain


def _fuse(weights: BlockWeights, dtype: torch.dtype) -> _Block:
    return _Block(
        attn_norm=weights.attn_norm.to(dtype),
        qkv=torch.cat((weights.q, weights.k, weights.v)).to(dtype),
        o=weights.o.to(dtype),
        ffn_norm=weights.ffn_norm.to(dtype),
        gate_up=torch.cat((weights.gate, weights.up)).to(dtype),
        down=weights.down.to(dtype),
    )
