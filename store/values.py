"""Record values: dicts of JSON types, and the one byte string that stands for each.

They are kept in the document as canonical JSON bytes, not as CRDT values: pycrdt would turn
integers into floats, and JSON carries no length in front of its arrays that could claim memory.
Knows nothing of records or documents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from .errors import RecordMalformed, StoreFull

MAX_VALUE_BYTES = 64 * 1024  # a manifest of 512 blobs takes about 47 KiB
MAX_DEPTH = 16  # arbitrary; a plan nests five deep
MAX_KEY_CHARS = 256

_KEY = re.compile(r"[!-~]{1,256}")  # printable ASCII without the space
_INTEGERS = range(-(2**63), 2**64)  # what a reader in any language can hold


def is_key(key: str) -> bool:
    """Whether `key` may name a record: 1 to 256 printable ASCII characters, no space."""
    return _KEY.fullmatch(key) is not None


def encode_value(value: Mapping[str, object], *, max_bytes: int = MAX_VALUE_BYTES) -> bytes:
    """Encode as canonical JSON: equal values give equal bytes.

    Raises:
        ValueError: not made of JSON types (NaN, infinity, keys that are not strings), or too deep.
        StoreFull: longer than `max_bytes`.
    """
    _check(value, depth=0)
    data = msgspec.json.encode(value, order="sorted")
    if len(data) > max_bytes:
        raise StoreFull(f"a record of {len(data)} bytes is over the limit of {max_bytes}; split it")
    return data


def decode_value(data: bytes, *, max_bytes: int = MAX_VALUE_BYTES) -> dict[str, Any]:
    """Decode what `encode_value` wrote, from any bytes.

    Raises:
        RecordMalformed: too long, too deep, or not a JSON object.
    """
    if len(data) > max_bytes:
        raise RecordMalformed(f"a value of {len(data)} bytes is over the limit of {max_bytes}")
    try:
        value = msgspec.json.decode(data, type=dict[str, Any])
        _check(value, depth=0)
    except RecordMalformed:
        raise
    except (ValueError, RecursionError) as error:
        raise RecordMalformed("a value is not a JSON object within limits") from error
    return value


def _check(value: object, *, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    match value:
        case None | bool():
            pass
        case str():
            value.encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError
        case int():
            if value not in _INTEGERS:
                raise ValueError("an integer is outside 64 bits")
        case float():
            if not math.isfinite(value):
                raise ValueError("NaN and infinity are not JSON")
        case Mapping():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise ValueError("a key is not a string")  # noqa: TRY004  one error for any bad value
                _check(key, depth=depth)
                _check(item, depth=depth + 1)
        case list() | tuple():
            for item in value:
                _check(item, depth=depth + 1)
        case _:
            raise ValueError(f"{type(value).__name__} is not a JSON type")
