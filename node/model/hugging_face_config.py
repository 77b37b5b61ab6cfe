"""The configuration that a config.json declares; keys and defaults as transformers reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .config import (
    MAX_BLOCKS,
    MAX_CONTEXT,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_WIDTH,
    ModelConfig,
    llama3_rope_factors,
)
from .errors import CorruptModel, UnsupportedModel
from .layouts import HUGGING_FACE_NAMES
from .metadata import Keys
from .tensor_source import TensorSource

# `model_type` -> ours.
ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "llama": "llama",
        "mistral": "mistral",
        "qwen2": "qwen2",
        "qwen3": "qwen3",
        "qwen3_moe": "qwen3moe",
        "phi3": "phi3",
        "gemma3_text": "gemma3",
        "smollm3": "smollm3",
    }
)

# Where transformers' defaults differ from Llama's, for keys that files on the hub leave out.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "gemma3": {
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "head_dim": 256,
        },
        "smollm3": {"tie_word_embeddings": True, "rope_theta": 2e6},
        "qwen3": {"head_dim": 128},
    }
)

_ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
)
_LAYER_TYPES = ("full_attention", "sliding_attention")
_ROPE_TYPES = ("default", "linear", "llama3", "longrope")

# True or above 0, these would change the result, and no supported model has them.
_REFUSED = (
    "attention_bias",
    "mlp_bias",
    "quantization_config",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
    "mlp_only_layers",
)


def hugging_face_config(path: Path, config: Mapping[str, Any], source: TensorSource) -> ModelConfig:
    """Read the configuration; raises as `gguf_config` does."""
    model_type = Keys(path, config).text("model_type")
    if model_type not in ARCHITECTURES:
        raise UnsupportedModel(f"architecture {model_type!r}", ARCHITECTURES)
    architecture = ARCHITECTURES[model_type]
    given = {key: value for key, value in config.items() if value is not None}
    keys = Keys(path, {**_DEFAULTS.get(architecture, {}), **given})
    _refuse(model_type, config)
    hidden_size = keys.size("hidden_size", MAX_WIDTH)
    n_heads = keys.size("num_attention_heads", MAX_HEADS)
    head_dim = keys.size("head_dim", MAX_HEAD_DIM, hidden_size // n_heads)
    is_tied = keys.flag("tie_word_embeddings", False)
    if not is_tied and HUGGING_FACE_NAMES.head not in source.tensors:
        raise CorruptModel(path, HUGGING_FACE_NAMES.head, "expected it, as the head is not tied")
    fields: dict[str, Any] = {
        "architecture": architecture,
        "n_blocks": keys.size("num_hidden_layers", MAX_BLOCKS),
        "hidden_size": hidden_size,
        "n_heads": n_heads,
        "n_kv_heads": keys.number("num_key_value_heads", n_heads),
        "head_dim": head_dim,
        "vocab_size": keys.number("vocab_size"),
        "context_length": keys.number("max_position_embeddings"),
        "rope_interleaved": False,
        "rms_norm_eps": keys.real("rms_norm_eps"),
        "tied_embeddings": is_tied,
        "activation": _activation(architecture, keys),
    }
    fields |= _rope(architecture, keys, head_dim) | _mlp(architecture, keys)
    return ModelConfig(**fields | _specific(architecture, keys, fields))


def _refuse(model_type: str, config: Mapping[str, Any]) -> None:
    refused = _REFUSED if model_type != "llama" else (*_REFUSED, "sliding_window")
    for feature in refused:
        if config.get(feature):
            raise UnsupportedModel(f"{feature} in config.json", (f"{model_type} without it",))


def _activation(architecture: str, keys: Keys) -> str:
    name = keys.text("hidden_activation" if architecture == "gemma3" else "hidden_act", "silu")
    if name not in _ACTIVATIONS:
        raise UnsupportedModel(f"activation {name!r}", _ACTIVATIONS)
    return _ACTIVATIONS[name]


def _specific(architecture: str, keys: Keys, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What sets the architecture apart from plain Llama."""
    n_blocks = fields["n_blocks"]
    windows = _windows(architecture, keys, n_blocks)
    specific: dict[str, Any] = {
        "windows": windows if any(windows) else (),
        "has_qkv_bias": architecture == "qwen2",
        "has_qk_norm": architecture in ("qwen3", "qwen3moe", "gemma3"),
    }
    if architecture == "smollm3":
        specific["rope_kinds"] = _smollm3_ropes(keys, n_blocks)
    if architecture == "gemma3":
        scalar = keys.real("query_pre_attn_scalar")
        if not scalar > 0:
            raise keys.corrupt("query_pre_attn_scalar", "expected a number above 0")
        is_default = scalar == fields["head_dim"]
        specific |= {
            "rope_kinds": tuple("local" if w else "main" for w in windows) if any(windows) else (),
            "embedding_scale": math.sqrt(fields["hidden_size"]),
            "attention_scale": None if is_default else 1.0 / math.sqrt(scalar),
            "has_post_norms": True,
        }
    return specific


def _smollm3_ropes(keys: Keys, n_blocks: int) -> tuple[str, ...]:
    if "no_rope_layers" in keys:
        has_rope = keys.flags("no_rope_layers", n_blocks)
    else:
        period = keys.number("no_rope_layer_interval", 4)
        if period < 1:
            raise keys.corrupt("no_rope_layer_interval", "expected 1 or above")
        has_rope = tuple((i + 1) % period != 0 for i in range(n_blocks))
    return () if all(has_rope) else tuple("main" if rotates else "none" for rotates in has_rope)


def _windows(architecture: str, keys: Keys, n_blocks: int) -> tuple[int, ...]:
    """One entry per block, 0 where it sees everything."""
    none = (0,) * n_blocks
    if architecture == "llama" or "sliding_window" not in keys:
        return none
    is_optional = architecture in ("qwen2", "qwen3", "qwen3moe", "smollm3")
    if is_optional and not keys.flag("use_sliding_window", False):
        return none
    window = keys.number("sliding_window")
    if architecture in ("mistral", "phi3", "qwen3moe"):
        return (window,) * n_blocks
    if "layer_types" in keys:
        types = keys.texts("layer_types", n_blocks)
        unknown = sorted(set(types) - set(_LAYER_TYPES))
        if unknown:
            raise UnsupportedModel(f"layer type {unknown[0]!r}", _LAYER_TYPES)
        return tuple(window * (kind == "sliding_attention") for kind in types)
    if architecture == "gemma3":
        period = keys.number("sliding_window_pattern", 6)
        if period < 1:
            raise keys.corrupt("sliding_window_pattern", "expected 1 or above")
        return tuple(window * ((i + 1) % period != 0) for i in range(n_blocks))
    if architecture == "smollm3":
        return tuple(window * (kind == "none") for kind in _smollm3_ropes(keys, n_blocks) or none)
    first = keys.number("max_window_layers", 28)
    return tuple(window * (i >= first) for i in range(n_blocks))


def _mlp(architecture: str, keys: Keys) -> dict[str, Any]:
    if architecture != "qwen3moe":
        return {"intermediate_size": keys.number("intermediate_size")}
    if keys.number("decoder_sparse_step", 1) != 1:
        raise UnsupportedModel("decoder_sparse_step other than 1", ("experts in every block",))
    return {
        "intermediate_size": keys.number("moe_intermediate_size"),
        "n_experts": keys.number(
            "num_local_experts" if "num_local_experts" in keys else "num_experts"
        ),
        "n_experts_used": keys.number("num_experts_per_tok"),
        "normalizes_experts": keys.flag("norm_topk_prob", False),
    }


def _rope(architecture: str, keys: Keys, head_dim: int) -> dict[str, Any]:
    # transformers 5 writes everything under rope_parameters, for Gemma 3 by layer type;
    # 4 writes rope_theta and rope_scaling.
    rope = keys.table("rope_parameters")
    local = rope.table("sliding_attention")
    if "full_attention" in rope:
        rope = rope.table("full_attention")
    if local.text("rope_type", "default") != "default":
        raise UnsupportedModel("rope scaling of sliding layers", ("default",))
    rope = rope.over(keys.table("rope_scaling"))
    theta = rope.real("rope_theta", keys.real("rope_theta", 10000.0))
    part = 1.0
    if architecture == "phi3":
        default = keys.real("partial_rotary_factor", 1.0)
        part = rope.real("partial_rotary_factor", default)
        if not 0 < part <= 1:
            raise keys.corrupt("partial_rotary_factor", "expected a number from 0 to 1")
    rope_dim = int(head_dim * part)
    fields: dict[str, Any] = {"rope_theta": theta, "rope_dim": rope_dim}
    if architecture == "gemma3":
        default = keys.real("rope_local_base_freq", 10000.0)
        fields["rope_local_theta"] = local.real("rope_theta", default)
    return fields | _rope_scaling(architecture, keys, rope, theta, rope_dim)


def _rope_scaling(
    architecture: str, keys: Keys, rope: Keys, theta: float, rope_dim: int
) -> dict[str, Any]:
    kind = rope.text("rope_type", rope.text("type", "default"))
    if architecture == "phi3" and kind in ("su", "yarn"):  # as its first files call it
        kind = "longrope"
    if kind == "default":
        return {}
    if kind == "linear":
        return {"rope_factors": (rope.real("factor"),) * (rope_dim // 2)}
    if kind == "longrope":
        return _long_rope(keys, rope)
    if kind != "llama3":
        raise UnsupportedModel(f"rope scaling {kind!r}", _ROPE_TYPES)
    low, high = rope.real("low_freq_factor"), rope.real("high_freq_factor")
    if not 0 < low < high or theta <= 0:
        raise rope.corrupt("low_freq_factor", "expected 0 < low_freq_factor < high_freq_factor")
    factors = llama3_rope_factors(
        theta=theta,
        rope_dim=rope_dim,
        factor=rope.real("factor"),
        low=low,
        high=high,
        original_context=_original_context(keys, rope),
    )
    return {"rope_factors": factors}


def _long_rope(keys: Keys, rope: Keys) -> dict[str, Any]:
    context, original = (
        keys.size("max_position_embeddings", MAX_CONTEXT),
        _original_context(keys, rope),
    )
    stretch = rope.real("factor", context / original)
    default = 1.0
    if stretch > 1 and original > 1:
        default = math.sqrt(1 + math.log(stretch) / math.log(original))
    return {
        "rope_factors": rope.reals("short_factor"),
        "rope_long_factors": rope.reals("long_factor"),
        "rope_original_context": original,
        "rope_scale": rope.real("attention_factor", default),
    }


def _original_context(keys: Keys, rope: Keys) -> int:
    key = "original_max_position_embeddings"
    return (rope if key in rope else keys).size(key, MAX_CONTEXT)
