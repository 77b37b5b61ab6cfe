"""`ModelConfig`: limits name the field, the value and the limit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from covey.node.model.config import Activation, llama3_rope_factors
from covey.node.model.errors import ModelError, UnsupportedModel
from support.tiny_models import TINY


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_blocks", 0),
        ("n_blocks", 10**6),
        ("hidden_size", -1),
        ("hidden_size", True),
        ("n_kv_heads", 3),
        ("n_kv_heads", 8),
        ("head_dim", 0),
        ("vocab_size", 2**40),
        ("context_length", 0),
        ("rope_dim", 7),
        ("rope_dim", 16),
        ("rope_theta", float("inf")),
        ("rope_theta", 0.0),
        ("rms_norm_eps", float("nan")),
        ("rope_factors", (1.0,) * 4 + (2.0,)),
        ("rope_factors", (1.0, 1.0, 1.0, 0.0)),
        ("rope_long_factors", (1.0, 1.0)),
        ("rope_local_theta", -1.0),
        ("rope_scale", float("nan")),
        ("windows", (8, 0, 8)),
        ("windows", (8, 0, 8, -1)),
        ("windows", (8, 0, 8, True)),
        ("rope_kinds", ("main", "none")),
        ("rope_kinds", ("main", "none", "local", "both")),
        ("attention_scale", 0.0),
        ("embedding_scale", float("inf")),
        ("n_experts", -1),
        ("n_experts", 10**5),
        ("n_experts_used", 2),
    ],
)
def test_value_out_of_limits_is_named(field: str, value: Any) -> None:
    with pytest.raises(ModelError, match=f"{field}.* = .*: must be"):
        replace(TINY, **{field: value})


def test_other_architecture_is_unsupported_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="'mamba'; supported: llama"):
        replace(TINY, architecture="mamba")


def test_other_activation_is_unsupported_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="'relu'; supported: silu, gelu_tanh"):
        replace(TINY, activation=cast("Activation", "relu"))


def test_experts_used_are_some_of_those_there_are() -> None:
    for used in (0, 5):
        with pytest.raises(ModelError, match="n_experts_used"):
            replace(TINY, n_experts=4, n_experts_used=used)


def test_a_new_field_at_its_default_changes_no_identity() -> None:
    assert set(TINY.canonical()) <= {
        "architecture", "n_blocks", "hidden_size", "n_heads", "n_kv_heads", "head_dim",
        "intermediate_size", "vocab_size", "context_length", "rope_theta", "rope_dim",
        "rope_interleaved", "rms_norm_eps", "tied_embeddings",
    }  # fmt: skip
    assert replace(TINY, windows=(1, 2, 3, 4)).canonical()["windows"] == (1, 2, 3, 4)


def test_a_session_is_long_by_its_room_not_by_its_length() -> None:
    config = replace(TINY, rope_long_factors=(1.0, 2.0, 3.0, 4.0), rope_original_context=64)
    assert not config.is_long(64)
    assert config.is_long(65)
    assert not TINY.is_long(512)
    with pytest.raises(ModelError, match="rope_original_context = 0"):
        replace(config, rope_original_context=0)


def test_kv_bytes_of_smollm2() -> None:
    # 30 blocks x 3 heads x 64 x 2 x 4 bytes.
    config = replace(TINY, n_heads=9, n_kv_heads=3, head_dim=64)
    assert config.kv_bytes_per_token(30, 4) == 46080


def test_llama3_factors_keep_short_waves_and_divide_long_ones() -> None:
    factors = llama3_rope_factors(
        theta=500000.0, rope_dim=128, factor=8.0, low=1.0, high=4.0, original_context=8192
    )
    assert factors[0] == 1.0
    assert factors[-1] == 8.0
    assert list(factors) == sorted(factors)
