"""Values: one encoding each, and nothing that is not JSON."""

from __future__ import annotations

import math

import pytest

from covey.store.errors import RecordMalformed, StoreFull
from covey.store.values import MAX_DEPTH, decode_value, encode_value, is_key


def test_integers_and_text_come_back_as_they_were() -> None:
    value = {"n": 3, "big": 2**64 - 1, "x": 3.0, "text": "hé😀", "list": [None, True, -1]}
    back = decode_value(encode_value(value))
    assert back == value
    assert [type(back[key]) for key in ("n", "x")] == [int, float]


def test_equal_values_have_one_encoding() -> None:
    assert encode_value({"a": 1, "b": 2}) == encode_value({"b": 2, "a": 1})


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2**64, -(2**63) - 1, b"x", {1: 2}, "\ud800"])
def test_what_json_cannot_say_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        encode_value({"bad": bad})


def test_a_value_over_the_limit_is_refused_with_its_size() -> None:
    with pytest.raises(StoreFull, match="108 bytes is over the limit of 100"):
        encode_value({"a": "x" * 100}, max_bytes=100)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"a":1',
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":18446744073709551616}',
        b'{"a":"\\ud800"}',
        b'{"a":"\xff"}',
        b'{"a":' + b"[" * 100_000,
        b'{"a":' + b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1) + b"}",
    ],
)
def test_bytes_that_are_no_value_are_refused(data: bytes) -> None:
    with pytest.raises(RecordMalformed):
        decode_value(data, max_bytes=1_000_000)


@pytest.mark.parametrize(
    ("key", "is_good"),
    [
        ("a", True),
        ("plan/0f/1", True),
        ("x" * 256, True),
        ("", False),
        ("a b", False),
        ("é", False),
        ("a\n", False),
        ("x" * 257, False),
    ],
)
def test_keys_are_short_printable_ascii(key: str, is_good: bool) -> None:
    assert is_key(key) is is_good
