"""Server-sent events: any split of the bytes gives the same events."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.client.errors import ClientError
from covey.client.sse import MAX_EVENT_BYTES, SseDecoder

LINE = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=8)


def decode(*pieces: bytes) -> list[bytes]:
    decoder = SseDecoder()
    return [event for piece in pieces for event in decoder.feed(piece)]


def test_an_event_ends_with_an_empty_line() -> None:
    assert decode(b"data: a\n") == []
    assert decode(b"data: a\n\n") == [b"a"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_line_end_will_do(end: bytes) -> None:
    assert decode(b"data: a" + end + end + b"data: b" + end + end + b"x") == [b"a", b"b"]


def test_one_space_after_the_colon_is_no_data() -> None:
    assert decode(b"data:a\n\ndata: b\n\ndata:  c\n\n") == [b"a", b"b", b" c"]


def test_comments_and_other_fields_are_no_events() -> None:
    assert decode(b": keep-alive\n\nevent: x\nid: 3\nretry: 9\n\ndatum: a\n\n") == []


def test_lines_of_one_event_are_joined() -> None:
    assert decode(b"data: a\ndata\ndata: b\n\n") == [b"a\n\nb"]


@pytest.mark.parametrize("piece", [b"x" * 65536, b"data: " + b"x" * 65536 + b"\n"])
def test_an_endless_event_is_refused(piece: bytes) -> None:
    with pytest.raises(ClientError, match="too large"):
        decode(*[piece] * (2 * MAX_EVENT_BYTES // len(piece)))


@given(
    st.lists(LINE, max_size=6), st.sampled_from(["\n", "\r\n", "\r"]), st.lists(st.integers(0, 99))
)
def test_any_split_gives_the_same_events(texts: list[str], end: str, cuts: list[int]) -> None:
    stream = "".join(f": c{end}data: {text}{end}{end}" for text in texts).encode() + b"\n"
    borders = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    pieces = [stream[start:stop] for start, stop in pairwise(borders)]
    assert decode(*pieces) == [text.encode() for text in texts]
