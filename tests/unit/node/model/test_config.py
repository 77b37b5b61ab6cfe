"""`ModelConfig`: limits name the field, the value and the limit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from covey.node.model.config import llama3_rope_factors
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
    ],
)
def test_value_out_of_limits_is_named(field: str, value: Any) -> None:
    with pytest.raises(ModelError, match=f"{field}.* = .*: must be"):
        replace(TINY, **{field: value})


def test_other_architecture_is_unsupported_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="'mamba'; supported: llama"):
        replace(TINY, architecture="mamba")


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
