"""What can be wrong with a model, or with what was asked of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from covey.errors import CoveyError


class ModelError(CoveyError):
    """Base of everything that `node/model/` raises on purpose."""


class ModelNotFound(ModelError):
    """No such model here; the text says what to do about it."""


class CorruptModel(ModelError):
    """The file breaks its own format: fetch it again.

    Attributes:
        path: the file.
        where: a byte offset, or the name of a tensor or key.
        expected: what should have been there.
    """

    def __init__(self, path: Path, where: int | str, expected: str) -> None:
        place = f"byte {where}" if isinstance(where, int) else printable(where)
        super().__init__(f"{path} is corrupt at {place}: {printable(expected)}; fetch it again")
        self.path = path
        self.where = where
        self.expected = expected


class UnsupportedModel(ModelError):
    """A well-formed model that Covey cannot run.

    Attributes:
        feature: what is unsupported, by name.
        supported: what there is instead.
    """

    def __init__(self, feature: str, supported: Iterable[str]) -> None:
        self.feature = feature
        self.supported = tuple(supported)
        listed = ", ".join(self.supported) or "nothing of the kind"
        super().__init__(f"unsupported: {printable(feature)}; supported: {listed}")


class InvalidParams(ModelError):
    """A request asks for something outside its limits; `field` is the parameter to change."""

    def __init__(self, field: str, value: object, limit: str) -> None:
        super().__init__(f"{field} = {printable(repr(value))}: must be {limit}")
        self.field = field


MAX_PRINTED = 200  # characters of a name from a file that reach a message; arbitrary


def printable(text: str) -> str:
    """`text` from a file on one short line, with nothing that a terminal would obey."""
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[:MAX_PRINTED])
    return shown + ("..." if len(text) > MAX_PRINTED else "")
