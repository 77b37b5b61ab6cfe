"""Settings: sizes as people write them, and the bounds of each field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from covey.node.config import NodeConfig, parse_size
from covey.node.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("1000000", 1_000_000),
        ("512", 512),
        ("4k", 4096),
        ("512M", 512 << 20),
        ("512MiB", 512 << 20),
        ("512mb", 512 << 20),
        ("4G", 4 << 30),
        ("1.5g", 3 << 29),
        (".5T", 1 << 39),
        (" 2 GiB ", 2 << 30),
        ("100B", 100),
        ("9007199254740993", 9007199254740993),  # 2**53 + 1, which no float holds
    ],
)
def test_sizes_are_read_in_powers_of_1024(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "G", "4 apples", "-1", "+1", "1e9", "4GG", "1.2.3", "5.", "٤G", "inf", "nan"),
        *("9" * 400, "0x10", "4G\n5", "1,5G"),
    ],
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="write it like 512M or 4G"):
        parse_size(text)


def config(**changes: Any) -> NodeConfig:
    return NodeConfig(**{"home": Path("home"), "name": "kitchen", **changes})


@pytest.mark.parametrize(
    ("field", "low", "high"),
    [
        ("max_blocks", 0, 1024),
        ("memory_bytes", 0, 1 << 48),
        ("port", 0, 65535),
        ("api_port", 0, 65535),
        ("threads", 1, 256),
        ("context_tokens", 16, 1 << 20),
        ("max_sessions", 1, 1024),
        ("grace_s", 0, 3600),
    ],
)
def test_each_number_has_its_bounds(field: str, low: int, high: int) -> None:
    for value in (low, high):
        assert getattr(config(**{field: value}), field) == value
    for value in (low - 1, high + 1):
        with pytest.raises(ConfigError, match=f"{value} is outside {low} to {high}"):
            config(**{field: value})


def test_what_may_be_left_open_may_be_none() -> None:
    assert config(max_blocks=None, memory_bytes=None).max_blocks is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prefer": "cheap"}, "prefer"),
        ({"engine": "fp16"}, "engine"),
        ({"quantize": "q5_k"}, "quantize"),
        ({"quantize": "q8_0", "engine": "fp32"}, "quantize"),
        ({"speed": 0.0}, "speed"),
        ({"speed": 1.01}, "speed"),
        ({"speed": float("nan")}, "speed"),
        ({"speed": 0.5, "engine": "bf16"}, "speed"),
        ({"name": ""}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"grace_s": float("nan")}, "grace"),
    ],
)
def test_the_field_that_is_wrong_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        config(**changes)
