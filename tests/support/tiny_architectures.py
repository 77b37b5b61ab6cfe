"""Tiny random models of every supported architecture, made and saved by transformers itself.

And the same weights as a GGUF file, written by the `gguf` package with the names, keys and
rearrangements of llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

N_TOKENS = 40  # beyond every sliding window below
VOCAB = 97

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Tiny:
    """One kind of model: transformers' classes by prefix, its configuration, GGUF's name for it."""

    prefix: str
    gguf: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    keys: Callable[[Any, Any], None] | None = None  # adds metadata to a gguf.GGUFWriter
    tensors: Callable[[Any], Mapping[str, Any]] | None = None  # more tensors for the GGUF file
    config_prefix: str = ""


def _window(config: Any, writer: Any) -> None:
    writer.add_sliding_window(config.sliding_window or 0)


def _long_rope(config: Any, writer: Any) -> None:
    _window(config, writer)
    rope = config.rope_parameters
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_attn_factors(LONG_ROPE_SCALE)


def _long_rope_tensors(config: Any) -> Mapping[str, Any]:
    rope = config.rope_parameters
    return {
        f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32)
        for kind in ("long", "short")
    }


def _local_rope(config: Any, writer: Any) -> None:
    _window(config, writer)
    writer.add_sliding_window_pattern([kind != "full_attention" for kind in config.layer_types])
    full = config.rope_parameters["full_attention"]
    writer.add_rope_freq_base(full["rope_theta"])
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])


def _linear_rope(config: Any, writer: Any) -> None:
    import gguf

    _local_rope(config, writer)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(config.rope_parameters["full_attention"]["factor"])


def _experts(config: Any, writer: Any) -> None:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if not config.norm_topk_prob:
        writer.add_expert_weights_norm(False)


def _windows_by_block(config: Any, writer: Any) -> None:
    _window(config, writer)
    writer.add_sliding_window_pattern([kind != "full_attention" for kind in config.layer_types])


# sqrt(1 + ln(128 / 32) / ln(32)), the paper's default (arXiv:2402.13753)
LONG_ROPE_SCALE = 1.1832159566199232
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * i for i in range(6)],
    "long_factor": [1.0 + 0.7 * i for i in range(6)],
    "original_max_position_embeddings": 32,
    "partial_rotary_factor": 0.75,
}
_GEMMA = {"num_hidden_layers": 4, "head_dim": 32, "sliding_window": 9}
_LOCAL_GLOBAL = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
_MOE = {"head_dim": 32, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

TINIES: dict[str, Tiny] = {
    "llama": Tiny("Llama", "llama"),
    "mistral": Tiny("Mistral", "llama", {"sliding_window": 9, "head_dim": 32}, _window),
    "mistral without window": Tiny("Mistral", "llama", {"sliding_window": None}),
    "qwen2": Tiny("Qwen2", "qwen2", {"tie_word_embeddings": True}),
    "qwen2 with windows": Tiny(
        "Qwen2",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        _windows_by_block,
    ),
    "qwen3": Tiny("Qwen3", "qwen3", {"head_dim": 32}),
    "phi3": Tiny("Phi3", "phi3", {"sliding_window": 11}, _window),
    "phi3 long": Tiny(
        "Phi3",
        "phi3",
        {"rope_parameters": _LONG_ROPE, "original_max_position_embeddings": 32},
        _long_rope,
        _long_rope_tensors,
    ),
    "gemma3": Tiny(
        "Gemma3",
        "gemma3",
        _GEMMA | {"layer_types": _LOCAL_GLOBAL, "query_pre_attn_scalar": 32},
        _local_rope,
        config_prefix="Gemma3Text",
    ),
    "gemma3 stretched": Tiny(
        "Gemma3",
        "gemma3",
        _GEMMA
        | {
            "layer_types": _LOCAL_GLOBAL,
            "query_pre_attn_scalar": 32,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        _linear_rope,
        config_prefix="Gemma3Text",
    ),
    "smollm3": Tiny("SmolLM3", "smollm3", {"num_hidden_layers": 5}),
    "qwen3 moe": Tiny("Qwen3Moe", "qwen3moe", _MOE | {"norm_topk_prob": True}, _experts),
    "qwen3 moe as rated": Tiny("Qwen3Moe", "qwen3moe", _MOE | {"norm_topk_prob": False}, _experts),
}


def make(tiny: Tiny, folder: Path, changes: Mapping[str, Any] | None = None) -> Any:
    """A random model, saved as safetensors into `folder`; norms and biases are random too."""
    import torch
    import transformers

    torch.manual_seed(0)
    config_class = getattr(transformers, f"{tiny.config_prefix or tiny.prefix}Config")
    values = {**_BASE, **tiny.changes, **(changes or {})}
    model = getattr(transformers, f"{tiny.prefix}ForCausalLM")(config_class(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def write_gguf(tiny: Tiny, folder: Path, config: Any) -> Path:
    """The model saved in `folder` as a GGUF file, F32."""
    import gguf
    from safetensors.numpy import load_file

    path = folder / "model.gguf"
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == tiny.gguf)
    writer = gguf.GGUFWriter(path, tiny.gguf)
    _write_keys(tiny, writer, config)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in _converted(tiny, load_file(folder / "model.safetensors"), config).items():
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(mapped or name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_keys(tiny: Tiny, writer: Any, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", {})
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if "rope_theta" in rope:
        writer.add_rope_freq_base(rope["rope_theta"])
    if tiny.keys:
        tiny.keys(config, writer)


def _converted(tiny: Tiny, tensors: dict[str, Any], config: Any) -> dict[str, Any]:
    converted = dict(tiny.tensors(config)) if tiny.tensors else {}
    experts: dict[str, list[Any]] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: _natural(item[0])):
        if tiny.gguf in ("llama", "smollm3") and name.endswith(("q_proj.weight", "k_proj.weight")):
            is_q = name.endswith("q_proj.weight")
            n_heads = config.num_attention_heads if is_q else config.num_key_value_heads
            halves = tensor.reshape(n_heads, 2, -1, tensor.shape[1])
            converted[name] = halves.swapaxes(1, 2).reshape(tensor.shape)
        elif tiny.gguf == "gemma3" and name.endswith("norm.weight"):
            converted[name] = tensor + 1
        elif ".experts." in name:
            before, _, after = name.partition(".experts.")
            experts.setdefault(f"{before}.experts.{after.partition('.')[2]}", []).append(tensor)
        else:
            converted[name] = tensor
    return converted | {name: np.stack(stacked) for name, stacked in experts.items()}


def _natural(name: str) -> list[tuple[int, str]]:
    """So that expert 10 comes after expert 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
