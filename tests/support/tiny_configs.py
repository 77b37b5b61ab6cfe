"""A small valid config.json for every `model_type` that is supported, keys as the hub has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from covey.node.model.tensor_source import TensorInfo, TensorSource

_BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
_EXTRA: Mapping[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 9},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "phi3": {"original_max_position_embeddings": 64},
    "gemma3_text": {"head_dim": 8, "sliding_window": 9},
    "smollm3": {},
}
CONFIGS: dict[str, dict[str, Any]] = {
    model_type: {**_BASE, "model_type": model_type, "tie_word_embeddings": True, **extra}
    for model_type, extra in _EXTRA.items()
}
del CONFIGS["gemma3_text"]["tie_word_embeddings"]  # its default


class _NoTensors:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = {}

    def raw(self, name: str) -> memoryview:
        raise KeyError(name)

    def close(self) -> None:
        """Nothing is open."""


def no_tensors(path: Path) -> TensorSource:
    """A source without tensors, for configurations whose head is tied."""
    return _NoTensors(path)
