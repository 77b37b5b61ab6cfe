"""`Keys`: typed access to metadata that came from a file, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CorruptModel

MAX_ITEMS = 4096  # of a list that is read whole: one item per block, or per pair of a head


class Keys:
    """Reads a value of the wanted type by its key, or says in which file which key is wrong.

    A value of None counts as absent, as null does in transformers' config.json.
    """

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        """`prefix`: what every key begins with, "llama." for one."""
        self._path = path
        self._values = values
        self._prefix = prefix

    def __contains__(self, key: str) -> bool:
        return self._values.get(self._prefix + key) is not None

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number; without a default the key must be there."""
        value = self._get(key, default)
        if type(value) is not int:
            raise self.corrupt(key, f"expected a whole number, found {_brief(value)}")
        return value

    def size(self, key: str, limit: int, default: int | None = None) -> int:
        """A whole number from 1 to `limit`."""
        value = self.number(key, default)
        if not 1 <= value <= limit:
            raise self.corrupt(key, f"expected a whole number from 1 to {limit}, found {value}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A number as a float."""
        value = self._get(key, default)
        if type(value) not in (int, float):
            raise self.corrupt(key, f"expected a number, found {_brief(value)}")
        return self._as_float(key, value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.corrupt(key, f"expected a string, found {_brief(value)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.corrupt(key, f"expected true or false, found {_brief(value)}")
        return value

    def reals(self, key: str) -> tuple[float, ...]:
        """An array of numbers."""
        items = self._items(key)
        if not all(type(item) in (int, float) for item in items):
            raise self.corrupt(key, "expected an array of numbers")
        return tuple(self._as_float(key, item) for item in items)

    def flags(self, key: str, n_items: int) -> tuple[bool, ...]:
        """An array of booleans, or of 0 and 1, of a certain length."""
        items = self._items(key)
        if len(items) != n_items or not all(item in (0, 1) for item in items):
            raise self.corrupt(key, f"expected {n_items} times true or false")
        return tuple(bool(item) for item in items)

    def texts(self, key: str, n_items: int) -> tuple[str, ...]:
        """An array of strings of a certain length."""
        items = self._items(key)
        if len(items) != n_items or not all(isinstance(item, str) for item in items):
            raise self.corrupt(key, f"expected {n_items} strings")
        return tuple(items)

    def is_array(self, key: str) -> bool:
        """Whether the key is there and holds an array."""
        return isinstance(self._values.get(self._prefix + key), (list, tuple, np.ndarray))

    def table(self, key: str) -> Keys:
        """An object within this one; empty if it is absent."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.corrupt(key, f"expected an object, found {_brief(value)}")
        return Keys(self._path, value)

    def over(self, others: Keys) -> Keys:
        """These values, and those of `others` where there is none here."""
        return Keys(self._path, {**others._values, **self._values})

    def corrupt(self, key: str, expected: str) -> CorruptModel:
        """The error for what this key holds."""
        return CorruptModel(self._path, self._prefix + key, expected)

    def _items(self, key: str) -> list[Any]:
        if not self.is_array(key):
            raise self.corrupt(key, "expected an array")
        value = self._values[self._prefix + key]
        if len(value) > MAX_ITEMS:
            raise self.corrupt(key, f"expected at most {MAX_ITEMS} items")
        return value.tolist() if isinstance(value, np.ndarray) else list(value)

    def _as_float(self, key: str, value: float) -> float:
        try:
            return float(value)
        except OverflowError as error:
            raise self.corrupt(key, "expected a number that fits a float") from error

    def _get(self, key: str, default: object) -> Any:
        value = self._values.get(self._prefix + key)
        if value is None and default is None:
            raise self.corrupt(key, "expected this key")
        return default if value is None else value


def _brief(value: object) -> str:
    return "an array" if isinstance(value, (list, tuple, np.ndarray)) else repr(value)
