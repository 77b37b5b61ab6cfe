"""Where the weights of a shard lie: the rows and columns of a block's matrices that are its own.

Of q, k and v, and of gate and up, a shard has rows, which are a byte range of the file; of o and
down it has columns, which are cut where quantised blocks end. Norms it has whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from covey.node.model.checkpoint import Checkpoint
from covey.node.model.config import ModelConfig
from covey.node.model.gguf import TENSOR_TYPES
from covey.node.model.tensor_source import TensorSlice

from .shard import Slice

#: (field, where it lies) -> columns that must stay together; UnsupportedModel if it has no kernel.
BlockColumns: TypeAlias = Callable[[str, TensorSlice], int]

ATTENTION_FIELDS = frozenset(
    (
        *("attn_norm", "q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm"),
        "post_attn_norm",
    )
)
_STORED_COLUMNS = {name: columns for name, columns, _ in TENSOR_TYPES.values()}


@dataclass(frozen=True, slots=True)
class Split:
    """How the blocks of a model can be shared out."""

    n_kv_heads: int
    mlp_columns: int
    mlp_quantum: int  # columns that must stay together


def stored_columns(_: str, part: TensorSlice) -> int:
    """`BlockColumns` of matrices that stay what they are in the file."""
    return _STORED_COLUMNS[part.info.type]


def can_split(config: ModelConfig) -> bool:
    """Whether what a block adds is a sum of parts: with experts or norms of it, it is none."""
    return not config.n_experts and not config.has_post_norms


def split_of(checkpoint: Checkpoint, block_columns: BlockColumns) -> Split | None:
    """How an engine can share out a model's blocks; None if it cannot."""
    config = checkpoint.config
    if not can_split(config):
        return None
    quantum = 1
    for block_idx in range(config.n_blocks):
        parts = checkpoint.block_parts(block_idx)
        if _head_columns(config) % block_columns("o", parts["o"]):
            return None
        # Whole vectors of the rows of gate and up, even where down stays as it is in the file.
        quantum = math.lcm(quantum, 32, block_columns("down", parts["down"]))
    if config.intermediate_size % quantum:
        return None
    return Split(config.n_kv_heads, config.intermediate_size, quantum)


def attention_parts(parts: Mapping[str, TensorSlice]) -> dict[str, TensorSlice]:
    """Those of `Checkpoint.block_parts` that attention takes."""
    return {name: part for name, part in parts.items() if name in ATTENTION_FIELDS}


def cut_block(
    parts: Mapping[str, TensorSlice], config: ModelConfig, cut: Slice, block_columns: BlockColumns
) -> dict[str, TensorSlice]:
    """What a shard holds of `Checkpoint.block_parts`, in the same order.

    Raises:
        ValueError: not a slice of this model, or one that ends within quantised blocks.
        UnsupportedModel: see `BlockColumns`.
    """
    check_slice(config, cut)
    return {
        name: _cut(name, part, config, cut, block_columns)
        for name, part in parts.items()
        if _is_held(name, cut)
    }


def check_slice(config: ModelConfig, cut: Slice) -> None:
    """Raise ValueError for what is no slice of this model, or nothing at all."""
    if not can_split(config):
        raise ValueError(f"{config.architecture}: its blocks are no sums of parts")
    for field, n_all in (
        ("kv_heads", config.n_kv_heads),
        ("mlp_columns", config.intermediate_size),
    ):
        start, end = getattr(cut, field)
        if not 0 <= start <= end <= n_all:
            raise ValueError(f"{field} [{start}, {end}) of {n_all}")
    if not has_heads(cut) and not has_columns(cut):
        raise ValueError("a shard without heads and columns")


def has_heads(cut: Slice) -> bool:
    """Whether the slice has a part in attention, and so a KV cache."""
    return cut.kv_heads[0] < cut.kv_heads[1]


def has_columns(cut: Slice) -> bool:
    """Whether the slice has a part in the MLP."""
    return cut.mlp_columns[0] < cut.mlp_columns[1]


def whole_slice(config: ModelConfig) -> Slice:
    """The slice that is everything."""
    return Slice((0, config.n_kv_heads), (0, config.intermediate_size))


def slice_config(config: ModelConfig, cut: Slice) -> ModelConfig:
    """The configuration of a model that had just these heads and columns.

    Where the slice has none, it stays as it is: nothing of the kind is computed then.
    """
    n_kv_heads = cut.kv_heads[1] - cut.kv_heads[0] or config.n_kv_heads
    return replace(
        config,
        n_heads=config.n_heads // config.n_kv_heads * n_kv_heads,
        n_kv_heads=n_kv_heads,
        intermediate_size=cut.mlp_columns[1] - cut.mlp_columns[0] or config.intermediate_size,
    )


def slice_name(cut: Slice) -> str:
    """What a slice is called in the name of a file."""
    (first, last), (start, end) = cut.kv_heads, cut.mlp_columns
    return f"h{first}-{last}.c{start}-{end}"


def _head_columns(config: ModelConfig) -> int:
    """Columns of o, and rows of q, that go with a KV head."""
    return config.n_heads // config.n_kv_heads * config.head_dim


def _is_held(name: str, cut: Slice) -> bool:
    return has_heads(cut) if name in ATTENTION_FIELDS else has_columns(cut)


def _cut(
    name: str, part: TensorSlice, config: ModelConfig, cut: Slice, block_columns: BlockColumns
) -> TensorSlice:
    first, last = cut.kv_heads
    if name in ("q", "q_bias"):
        per_head = _head_columns(config)
        return part.rows(first * per_head, last * per_head)
    if name in ("k", "v", "k_bias", "v_bias"):
        return part.rows(first * config.head_dim, last * config.head_dim)
    if name in ("gate", "up"):
        return part.rows(*cut.mlp_columns)
    if name == "o":
        per_head = _head_columns(config)
        return _columns(name, part, first * per_head, last * per_head, block_columns)
    if name == "down":
        return _columns(name, part, *cut.mlp_columns, block_columns)
    return part


def _columns(
    name: str, part: TensorSlice, start: int, end: int, block_columns: BlockColumns
) -> TensorSlice:
    together = block_columns(name, part)
    if start % together or end % together:
        raise ValueError(
            f"columns [{start}, {end}) of {part.tensor!r}: cut it at multiples of {together}"
        )
    return part.columns(start, end)
