"""The reference stage: a span of blocks in plain torch, fp32 or bf16, on the CPU.

It computes whatever a `ModelConfig` can say and knows no architecture by name. It is the oracle
that every faster engine is held against, so it stays simple. It imports no checkpoint format and
knows no peer. Results are bit-identical only for the same number of torch threads (which the
caller sets) and the same chunking of the prompt: torch's matrix products add up in another order
for another shape. How the blocks are cut into stages changes no bit.
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
from covey.node.model.config import ModelConfig, RopeKind

from .errors import CacheOverflow, NonFiniteValues, PositionGap, UnknownSession
from .rope import RopeTables
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
    """Weights of one block as the products want them; None where the model has none."""

    attn_norm: Tensor  # [D]
    qkv: Tensor  # [(H+2K)*E, D]
    qkv_bias: Tensor | None  # [(H+2K)*E]
    q_norm: Tensor | None  # [E]
    k_norm: Tensor | None  # [E]
    o: Tensor  # [D, H*E]
    post_attn_norm: Tensor | None  # [D]
    ffn_norm: Tensor  # [D]
    router: Tensor | None  # [X, D]
    gate_up: Tensor  # [2*intermediate, D], or [X, 2*intermediate, D] with a router
    down: Tensor  # [D, intermediate], or [X, D, intermediate]
    post_ffn_norm: Tensor | None  # [D]

    @property
    def nbytes(self) -> int:
        held = (getattr(self, name) for name in self.__slots__)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


@dataclass(slots=True)
class _Session:
    """KV cache [n_blocks, K, capacity, E] of which the first `length` positions are filled."""

    keys: Tensor
    values: Tensor
    is_long: bool  # see ModelConfig.is_long
    length: int = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Where the rows of one forward call stand in one block: positions [start, end)."""

    start: int
    end: int
    cos: Tensor  # [T, rope_dim/2]
    sin: Tensor
    mask: Tensor | None  # [T, end], 0 or -inf; None for a single row that sees all


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
        self._ropes = RopeTables(config, range(*span))
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
            torch.zeros(shape, dtype=self._torch_dtype),
            torch.zeros(shape, dtype=self._torch_dtype),
            config.is_long(n_tokens),
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
        rows = self._rows(position, end, cache.is_long)
        for i, block in enumerate(self._blocks):
            x = x + self._attention(block, x, cache.keys[i], cache.values[i], rows[i])
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

    def _rows(self, start: int, end: int, is_long: bool) -> list[_Rows]:
        """One entry per block; blocks of the same kind share theirs."""
        config, tables = self._config, self._ropes.upto(end, is_long=is_long)
        made: dict[tuple[RopeKind, int], _Rows] = {}
        rows = []
        for block_idx in range(*self.span):
            kind, window = config.rope_kind(block_idx), config.window(block_idx)
            if (kind, window) not in made:
                cos, sin = (torch.from_numpy(table[start:end]) for table in tables[kind])
                made[kind, window] = _Rows(start, end, cos, sin, _mask(start, end, window))
            rows.append(made[kind, window])
        return rows

    def _attention(
        self, block: _Block, x: Tensor, keys: Tensor, values: Tensor, at: _Rows
    ) -> Tensor:
        config = self._config
        n_tokens, n_kv, width = len(x), config.n_kv_heads, config.head_dim
        normed = self._norm(x, block.attn_norm)
        fused = F.linear(normed, block.qkv, block.qkv_bias).view(n_tokens, -1, width)
        q, k = fused[:, : config.n_heads], fused[:, config.n_heads : -n_kv]  # [T, H or K, E]
        if block.q_norm is not None and block.k_norm is not None:
            q, k = self._norm(q, block.q_norm), self._norm(k, block.k_norm)
        q, k = self._rotate(q, at), self._rotate(k, at)
        keys[:, at.start : at.end] = k.transpose(0, 1)  # [K, T, E]
        values[:, at.start : at.end] = fused[:, -n_kv:].transpose(0, 1)
        # The queries that share a KV head become rows of one product.
        grouped = q.reshape(n_tokens, n_kv, -1, width).permute(1, 2, 0, 3)  # [K, H/K, T, E]
        scores = grouped.reshape(n_kv, -1, width) @ keys[:, : at.end].transpose(1, 2)
        scores = scores.float() * config.score_scale  # [K, H/K*T, end]
        if at.mask is not None:
            scores = (scores.view(n_kv, -1, n_tokens, at.end) + at.mask).view_as(scores)
        weights = scores.softmax(-1).to(self._torch_dtype)
        mixed = (weights @ values[:, : at.end]).view(n_kv, -1, n_tokens, width)
        attended = F.linear(mixed.permute(2, 0, 1, 3).reshape(n_tokens, -1), block.o)
        return self._norm(attended, block.post_attn_norm)

    def _mlp(self, block: _Block, x: Tensor) -> Tensor:
        normed = self._norm(x, block.ffn_norm)
        if block.router is None:
            added = self._gated(normed, block.gate_up, block.down)
        else:
            added = self._experts(block, block.router, normed)
        return self._norm(added, block.post_ffn_norm)

    def _gated(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        if self._config.activation == "gelu_tanh":
            return F.linear(F.gelu(gate, approximate="tanh") * up, down)
        return F.linear(F.silu(gate) * up, down)

    def _experts(self, block: _Block, router: Tensor, x: Tensor) -> Tensor:
        """The mean of the best experts of each row, weighted as the router rates them."""
        ratings = F.linear(x, router).float().softmax(-1)  # [T, X]
        weights, chosen = ratings.topk(self._config.n_experts_used)  # [T, n_experts_used]
        if self._config.normalizes_experts:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(x.dtype)
        added = torch.zeros_like(x)
        for expert in sorted(set(chosen.flatten().tolist())):
            rows, ranks = (chosen == expert).nonzero(as_tuple=True)
            out = self._gated(x[rows], block.gate_up[expert], block.down[expert])
            added.index_add_(0, rows, out * weights[rows, ranks, None])
        return added

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """RMSNorm over the last dimension; nothing without a weight."""
        if weight is None:
            return x
        return F.rms_norm(x, weight.shape, weight, self._config.rms_norm_eps)

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


def _mask(start: int, end: int, window: int) -> Tensor | None:
    """What each of the rows [start, end) may not see of [0, end), as -inf."""
    if end - start == 1 and not 0 < window < end:
        return None
    queries, keys = torch.arange(start, end)[:, None], torch.arange(end)
    hidden = keys > queries
    if window:
        hidden |= keys <= queries - window
    return torch.zeros(end - start, end).masked_fill_(hidden, -math.inf)


def _fuse(weights: BlockWeights, dtype: torch.dtype) -> _Block:
    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    biases = [b for b in (weights.q_bias, weights.k_bias, weights.v_bias) if b is not None]
    return _Block(
        attn_norm=weights.attn_norm.to(dtype),
        qkv=torch.cat((weights.q, weights.k, weights.v)).to(dtype),
        qkv_bias=torch.cat(biases).to(dtype) if biases else None,
        q_norm=cast(weights.q_norm),
        k_norm=cast(weights.k_norm),
        o=weights.o.to(dtype),
        post_attn_norm=cast(weights.post_attn_norm),
        ffn_norm=weights.ffn_norm.to(dtype),
        router=cast(weights.router),
        gate_up=torch.cat((weights.gate, weights.up), dim=-2).to(dtype),
        down=weights.down.to(dtype),
        post_ffn_norm=cast(weights.post_ffn_norm),
    )
