"""What config.json may say: each architecture's facts, defaults, and what is refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from covey.node.model.config import ModelConfig
from covey.node.model.errors import CorruptModel, ModelError, UnsupportedModel
from covey.node.model.hugging_face_config import ARCHITECTURES, hugging_face_config
from support.tiny_configs import CONFIGS, no_tensors

PATH = Path("config.json")


def read(model_type: str, **changes: Any) -> ModelConfig:
    return hugging_face_config(PATH, CONFIGS[model_type] | changes, no_tensors(PATH))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_is_read(model_type: str) -> None:
    config = read(model_type)
    assert config.architecture == ARCHITECTURES[model_type]
    assert (config.n_blocks, config.n_heads, config.n_kv_heads) == (6, 4, 2)


def test_other_architectures_are_refused_with_the_list() -> None:
    config = CONFIGS["llama"] | {"model_type": "gemma2"}
    listed = "llama, mistral, qwen2, qwen3, qwen3_moe, phi3, gemma3_text, smollm3"
    with pytest.raises(UnsupportedModel, match=f"architecture 'gemma2'; supported: {listed}"):
        hugging_face_config(PATH, config, no_tensors(PATH))


@pytest.mark.parametrize(
    ("model_type", "change", "feature"),
    [
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"layer_types": ["chunked_attention"] * 6}, "'chunked_attention'"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("llama", {"sliding_window": 9}, "sliding_window"),
        ("llama", {"hidden_act": "relu"}, "activation 'relu'"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}},
            "rope scaling of sliding layers",
        ),
    ],
)
def test_features_the_engine_lacks_are_refused_by_name(
    model_type: str, change: dict[str, Any], feature: str
) -> None:
    with pytest.raises(UnsupportedModel, match=f"{feature}.*; supported: "):
        read(model_type, **change)


@pytest.mark.parametrize(
    ("model_type", "change", "key"),
    [
        ("llama", {"hidden_size": 0}, "hidden_size"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("llama", {"head_dim": 10**30}, "head_dim"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ("llama", {"rope_scaling": [1]}, "rope_scaling"),
        ("mistral", {"sliding_window": 4.5}, "sliding_window"),
        ("qwen2", {"use_sliding_window": 1, "sliding_window": 4}, "use_sliding_window"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "layer_types"),
        ("gemma3_text", {"layer_types": "full_attention"}, "layer_types"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("gemma3_text", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        ("phi3", {"partial_rotary_factor": 0}, "partial_rotary_factor"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": 1}}, "short_factor"),
        ("qwen3_moe", {"num_experts_per_tok": "2"}, "num_experts_per_tok"),
    ],
)
def test_values_of_the_wrong_type_are_named(
    model_type: str, change: dict[str, Any], key: str
) -> None:
    with pytest.raises(CorruptModel) as caught:
        read(model_type, **change)
    assert caught.value.where == key


def test_more_experts_used_than_there_are() -> None:
    with pytest.raises(ModelError, match="n_experts_used = 9"):
        read("qwen3_moe", num_experts_per_tok=9)


def test_gemma3_as_the_hub_has_it() -> None:
    # transformers 4: a period, not layer_types; two keys for the ropes; defaults left out.
    config = read("gemma3_text", rope_theta=1e6, rope_local_base_freq=1e4)
    assert config.windows == (9, 9, 9, 9, 9, 0)
    assert config.rope_kinds == ("local",) * 5 + ("main",)
    assert (config.rope_theta, config.rope_local_theta) == (1e6, 1e4)
    assert config.embedding_scale == math.sqrt(32)
    assert config.attention_scale == 1 / 16  # query_pre_attn_scalar is 256
    assert config.tied_embeddings
    assert config.activation == "gelu_tanh"


def test_gemma3_without_a_window_has_one_rope() -> None:
    assert read("gemma3_text", sliding_window=None).rope_kinds == ()


def test_smollm3_rotates_all_but_every_fourth_block() -> None:
    kinds = ("main", "main", "main", "none", "main", "main")
    assert read("smollm3").rope_kinds == kinds
    assert read("smollm3", no_rope_layers=[1, 1, 1, 0, 1, 1]).rope_kinds == kinds
    assert read("smollm3", no_rope_layers=[1] * 6).rope_kinds == ()
    windowed = read("smollm3", use_sliding_window=True, sliding_window=5)
    assert windowed.windows == (0, 0, 0, 5, 0, 0)


def test_qwen2_has_windows_only_if_it_uses_them() -> None:
    assert read("qwen2", sliding_window=4096).windows == ()
    windowed = read("qwen2", sliding_window=5, use_sliding_window=True, max_window_layers=4)
    assert windowed.windows == (0, 0, 0, 0, 5, 5)


def test_phi3_long_rope_under_its_old_name() -> None:
    scaling = {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = read("phi3", rope_scaling=scaling, original_max_position_embeddings=16)
    assert config.rope_long_factors == (2.0,) * 4
    assert config.rope_original_context == 16
    assert config.rope_scale == pytest.approx(math.sqrt(1 + math.log(4) / math.log(16)))
