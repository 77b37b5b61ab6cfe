"""What a block computes, in plain torch: the mathematics of the reference stage and shard.

It computes whatever a `ModelConfig` can say and knows no architecture by name. Sessions, and how
long they are, are its callers' business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor

from covey.node.model.config import ModelConfig, RopeKind

from .rope import RopeTables
from .tensors import EngineDtype, HiddenStates

TORCH_DTYPES = MappingProxyType({"fp32": torch.float32, "bf16": torch.bfloat16})


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Weights of one attention as the products want them; None where the model has none."""

    attn_norm: Tensor  # [D]
    qkv: Tensor  # [(H+2K)*E, D]
    qkv_bias: Tensor | None  # [(H+2K)*E]
    q_norm: Tensor | None  # [E]
    k_norm: Tensor | None  # [E]
    o: Tensor  # [D, H*E]
    post_attn_norm: Tensor | None  # [D]


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """The same of one MLP."""

    ffn_norm: Tensor  # [D]
    router: Tensor | None  # [X, D]
    gate_up: Tensor  # [2*intermediate, D], or [X, 2*intermediate, D] with a router
    down: Tensor  # [D, intermediate], or [X, D, intermediate]
    post_ffn_norm: Tensor | None  # [D]


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values [n_blocks, K, capacity, E] of one session."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the rows of one session stand in one block: positions [start, end)."""

    start: int
    end: int
    cos: Tensor  # [T, rope_dim/2]
    sin: Tensor
    mask: Tensor | None  # [T, end], 0 or -inf; None for a single row that sees all


class TorchBlocks:
    """The computations of a span's blocks; a part's `config` has just the heads of that part."""

    def __init__(self, config: ModelConfig, span: tuple[int, int], dtype: EngineDtype) -> None:
        self._config = config
        self._span = span
        self._torch_dtype = TORCH_DTYPES[dtype]
        self._ropes = RopeTables(config, range(*span))

    def new_cache(self, n_tokens: int) -> Cache:
        """Room for so many positions of one session; the memory is taken here and now."""
        config, n_blocks = self._config, self._span[1] - self._span[0]
        shape = (n_blocks, config.n_kv_heads, n_tokens, config.head_dim)
        return Cache(
            torch.zeros(shape, dtype=self._torch_dtype), torch.zeros(shape, dtype=self._torch_dtype)
        )

    def rows(self, start: int, end: int, is_long: bool) -> list[Rows]:
        """One entry per block; blocks of the same kind share theirs."""
        config, tables = self._config, self._ropes.upto(end, is_long=is_long)
        made: dict[tuple[RopeKind, int], Rows] = {}
        rows = []
        for block_idx in range(*self._span):
            kind, window = config.rope_kind(block_idx), config.window(block_idx)
            if (kind, window) not in made:
                cos, sin = (torch.from_numpy(table[start:end]) for table in tables[kind])
                made[kind, window] = Rows(start, end, cos, sin, _mask(start, end, window))
            rows.append(made[kind, window])
        return rows

    def attention(
        self, block: AttentionWeights, x: Tensor, cache: Cache, place: int, at: Rows
    ) -> Tensor:
        """What the attention of the span's block `place` adds to x [T, D]; fills its cache."""
        config, keys, values = self._config, cache.keys[place], cache.values[place]
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

    def mlp(self, block: MlpWeights, x: Tensor) -> Tensor:
        """What a block's MLP adds to x [T, D]."""
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

    def _experts(self, block: MlpWeights, router: Tensor, x: Tensor) -> Tensor:
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

    def _rotate(self, heads: Tensor, at: Rows) -> Tensor:
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


def attention_weights(read: Mapping[str, Tensor], dtype: EngineDtype) -> AttentionWeights:
    """The fields of `BlockWeights` that attention takes, fused; None and absent are the same."""
    return AttentionWeights(
        qkv=_joined(read, ("q", "k", "v"), dtype, dim=0),
        qkv_bias=(
            _joined(read, ("q_bias", "k_bias", "v_bias"), dtype, dim=0)
            if "q_bias" in read
            else None
        ),
        **_cast(read, ("attn_norm", "q_norm", "k_norm", "o", "post_attn_norm"), dtype),
    )


def mlp_weights(read: Mapping[str, Tensor], dtype: EngineDtype) -> MlpWeights:
    """The same of those that the MLP takes."""
    return MlpWeights(
        gate_up=_joined(read, ("gate", "up"), dtype, dim=-2),
        **_cast(read, ("ffn_norm", "router", "down", "post_ffn_norm"), dtype),
    )


def nbytes(weights: AttentionWeights | MlpWeights) -> int:
    """Memory that they take."""
    held = (getattr(weights, each.name) for each in fields(weights))
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def _cast(read: Mapping[str, Tensor], names: tuple[str, ...], dtype: EngineDtype) -> dict[str, Any]:
    return {name: read[name].to(TORCH_DTYPES[dtype]) if name in read else None for name in names}


def _joined(
    read: Mapping[str, Tensor], names: tuple[str, ...], dtype: EngineDtype, *, dim: int
) -> Tensor:
    return torch.cat([read[name] for name in names], dim=dim).to(TORCH_DTYPES[dtype])
