"""The configuration that a GGUF file declares; keys and defaults as llama.cpp reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .config import MAX_BLOCKS, MAX_HEAD_DIM, MAX_HEADS, MAX_WIDTH, ModelConfig, RopeKind
from .errors import CorruptModel, UnsupportedModel
from .gguf import GgufFile
from .layouts import GGUF_NAMES
from .metadata import Keys
from .tensor_source import to_float32

# Mistral's files say "llama".
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe", "phi3", "gemma3", "smollm3")

# What llama.cpp's converter stores with the rows of q and k swapped into pairs.
_INTERLEAVED = ("llama", "smollm3")
# Of so many blocks the last sees everything if the file has a window but no pattern; 0: none does.
_WINDOW_PERIOD: Mapping[str, int] = MappingProxyType({"llama": 0, "phi3": 0, "gemma3": 6})
_SMOLLM3_NO_ROPE_PERIOD = 4  # no key says so: llama.cpp has it as a constant
_GEMMA3_27B_BLOCKS = 62  # the one size of Gemma 3 whose attention scale is not of head_dim

_ROPE_FREQS = "rope_freqs.weight"
_SHORT_FACTORS, _LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"


def gguf_config(file: GgufFile) -> ModelConfig:
    """Read the configuration.

    Raises:
        CorruptModel: a key is missing or has the wrong type.
        UnsupportedModel: an architecture or feature that the engine does not compute.
        ModelError: a value out of its limits.
    """
    architecture = Keys(file.path, file.metadata).text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(f"architecture {architecture!r}", ARCHITECTURES)
    keys = Keys(file.path, file.metadata, f"{architecture}.")
    _refuse(architecture, keys)
    hidden_size = keys.size("embedding_length", MAX_WIDTH)
    n_heads = keys.size("attention.head_count", MAX_HEADS)
    head_dim = keys.size("attention.key_length", MAX_HEAD_DIM, hidden_size // n_heads)
    if keys.number("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel("values of another width than keys", ("equal widths",))
    embedding = file.tensors.get(GGUF_NAMES.embedding)
    if embedding is None or len(embedding.shape) != 2:
        raise CorruptModel(file.path, GGUF_NAMES.embedding, "expected a matrix of embeddings")
    rope_dim = keys.size("rope.dimension_count", head_dim, head_dim)
    fields: dict[str, Any] = {
        "architecture": architecture,
        "n_blocks": keys.size("block_count", MAX_BLOCKS),
        "hidden_size": hidden_size,
        "n_heads": n_heads,
        "n_kv_heads": keys.number("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "vocab_size": embedding.shape[0],
        "context_length": keys.number("context_length"),
        "rope_theta": keys.real("rope.freq_base", 10000.0),
        "rope_dim": rope_dim,
        "rope_interleaved": architecture in _INTERLEAVED,
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "tied_embeddings": GGUF_NAMES.head not in file.tensors,
        "rope_factors": _rope_factors(file, keys, rope_dim),
    }
    fields |= _mlp(architecture, keys) | _long_rope(file, keys, rope_dim)
    windows = _windows(architecture, keys, fields["n_blocks"])
    return ModelConfig(**fields | _specific(architecture, keys, fields, windows))


def _refuse(architecture: str, keys: Keys) -> None:
    """Features that would change the result and that no supported model has."""
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if keys.real(key, 0.0):
            raise UnsupportedModel(f"{key} in {architecture!r}", ("attention without it",))
    if not keys.flag("attention.causal", True):
        raise UnsupportedModel("attention that is not causal", ("causal attention",))
    if architecture != "qwen3moe" and keys.number("expert_count", 0):
        raise UnsupportedModel(
            f"mixture of experts in {architecture!r}", ("qwen3moe", f"dense {architecture}")
        )


def _specific(
    architecture: str, keys: Keys, fields: Mapping[str, Any], windows: tuple[int, ...]
) -> dict[str, Any]:
    """What sets the architecture apart from plain Llama."""
    blocks = range(len(windows))
    specific: dict[str, Any] = {
        "windows": windows if any(windows) else (),
        "has_qkv_bias": architecture == "qwen2",
        "has_qk_norm": architecture in ("qwen3", "qwen3moe", "gemma3"),
    }
    if architecture == "smollm3":
        period = _SMOLLM3_NO_ROPE_PERIOD
        kinds: list[RopeKind] = ["main" if (i + 1) % period else "none" for i in blocks]
        specific["rope_kinds"] = tuple(kinds) if "none" in kinds else ()
    if architecture == "gemma3":
        is_27b = len(windows) == _GEMMA3_27B_BLOCKS
        per_head = fields["hidden_size"] / fields["n_heads"]
        specific |= {
            "rope_kinds": tuple("local" if w else "main" for w in windows) if any(windows) else (),
            "rope_local_theta": keys.real("rope.freq_base_swa", 10000.0),
            "activation": "gelu_tanh",
            "embedding_scale": math.sqrt(fields["hidden_size"]),
            "attention_scale": 1.0 / math.sqrt(per_head) if is_27b else None,
            "has_post_norms": True,
        }
    return specific


def _windows(architecture: str, keys: Keys, n_blocks: int) -> tuple[int, ...]:
    """One entry per block, 0 where it sees everything."""
    window = keys.number("attention.sliding_window", 0)
    if not window:
        return (0,) * n_blocks
    pattern = "attention.sliding_window_pattern"
    if keys.is_array(pattern):
        return tuple(window * flag for flag in keys.flags(pattern, n_blocks))
    if pattern not in keys and architecture not in _WINDOW_PERIOD:
        raise UnsupportedModel(
            f"a sliding window without a pattern in {architecture!r}", _WINDOW_PERIOD
        )
    period = keys.number(pattern, _WINDOW_PERIOD.get(architecture))
    if period < 0:
        raise keys.corrupt(pattern, "expected 0 or above")
    return tuple(window * (not period or (i + 1) % period != 0) for i in range(n_blocks))


def _mlp(architecture: str, keys: Keys) -> dict[str, Any]:
    if architecture != "qwen3moe":
        return {"intermediate_size": keys.number("feed_forward_length")}
    scale = keys.real("expert_weights_scale", 1.0)
    if scale not in (0.0, 1.0):  # 0 is llama.cpp's way to say none
        raise UnsupportedModel(f"expert_weights_scale = {scale}", ("1",))
    return {
        "intermediate_size": keys.number("expert_feed_forward_length"),
        "n_experts": keys.number("expert_count"),
        "n_experts_used": keys.number("expert_used_count"),
        "normalizes_experts": keys.flag("expert_weights_norm", True),
    }


def _rope_factors(file: GgufFile, keys: Keys, rope_dim: int) -> tuple[float, ...]:
    kind = keys.text("rope.scaling.type", "none")
    if kind not in ("none", "linear", "longrope"):
        supported = ("none", "linear", "llama3", "longrope")
        raise UnsupportedModel(f"rope scaling {kind!r}", supported)
    stretch = keys.real("rope.scaling.factor", 1.0) if kind == "linear" else 1.0
    for name in (_ROPE_FREQS, _SHORT_FACTORS):
        if name in file.tensors:
            return tuple(factor * stretch for factor in _factors(file, name, rope_dim))
    return (stretch,) * (rope_dim // 2) if stretch != 1.0 else ()


def _long_rope(file: GgufFile, keys: Keys, rope_dim: int) -> dict[str, Any]:
    """Phi-3's: a second set of factors for long sessions, and a scale of both."""
    fields: dict[str, Any] = {"rope_scale": keys.real("rope.scaling.attn_factor", 1.0)}
    if _LONG_FACTORS in file.tensors:
        fields["rope_long_factors"] = _factors(file, _LONG_FACTORS, rope_dim)
        fields["rope_original_context"] = keys.number("rope.scaling.original_context_length")
    return fields


def _factors(file: GgufFile, name: str, rope_dim: int) -> tuple[float, ...]:
    info = file.tensors[name]
    if info.type != "F32" or info.shape != (rope_dim // 2,):
        raise CorruptModel(file.path, name, f"expected {rope_dim // 2} F32 factors")
    return tuple(float(factor) for factor in to_float32(info, file.raw(name)))
