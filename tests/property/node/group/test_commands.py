"""The words of a group: read as they were written, and nothing else is read."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.node.group.commands import (
    MAX_SESSIONS,
    MAX_STEPS,
    Close,
    Keep,
    Open,
    Rows,
    Run,
    Word,
    WrongWord,
    pack,
    unpack,
)

HIDDEN = 4

names = st.text("abcXYZ019_-", min_size=1, max_size=64)
rows = st.builds(Rows, names, st.integers(0, 1 << 20), st.integers(1, 8))
words = st.one_of(
    st.builds(Keep, st.lists(names, max_size=20)),
    st.builds(Open, names, st.integers(1, 1 << 20), st.lists(st.binary(min_size=16, max_size=16))),
    st.builds(Close, names),
    st.builds(Run, st.lists(rows, min_size=1, max_size=8)),
)


def hidden_of(word: Word) -> np.ndarray[tuple[int, int], np.dtype[np.float32]] | None:
    if not isinstance(word, Run):
        return None
    return np.arange(word.n_rows * HIDDEN, dtype=np.float32).reshape(word.n_rows, HIDDEN)


def message(word: Word) -> bytes:
    return b"".join(pack(word, hidden_of(word)))


@given(words)
def test_a_word_is_read_as_it_was_written(word: Word) -> None:
    read, hidden = unpack(memoryview(message(word)), HIDDEN)
    assert read == word
    expected = hidden_of(word)
    if expected is None:
        assert hidden is None
    else:
        np.testing.assert_array_equal(hidden, expected)


@given(words, st.data())
def test_another_length_is_refused(word: Word, data: st.DataObject) -> None:
    whole = message(word)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    for wrong in (cut, whole + b"\0"):
        with pytest.raises(WrongWord):
            unpack(memoryview(wrong), HIDDEN)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_word_or_refused(data: bytes) -> None:
    try:
        word, _ = unpack(memoryview(data), HIDDEN)
    except WrongWord:
        return
    assert isinstance(word, Keep | Open | Close | Run)


@pytest.mark.parametrize(
    "word",
    [
        Keep(["s"] * (MAX_SESSIONS + 1)),
        Keep(["no blanks"]),
        Open("", 1),
        Open("s", 0),
        Open("s", 1, [b"short"]),
        Run([]),
        Run([Rows("s", 0, 1)] * (MAX_STEPS + 1)),
        Run([Rows("s", -1, 1)]),
        Run([Rows("s", 0, 0)]),
    ],
    ids=repr,
)
def test_what_is_out_of_bounds_is_refused(word: Word) -> None:
    with pytest.raises(WrongWord, match="cannot be read"):
        unpack(memoryview(b"".join(pack(word))), HIDDEN)


def test_a_word_of_another_kind_is_refused() -> None:
    other = msgspec.msgpack.encode({"type": "stop"})
    with pytest.raises(WrongWord):
        unpack(memoryview(len(other).to_bytes(4, "little") + other), HIDDEN)
