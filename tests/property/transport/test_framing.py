"""Segments: every frame comes out as it went in, whatever the split; no bytes do harm."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from covey.transport.errors import ProtocolViolation
from covey.transport.framing import (
    END,
    MAX_OPEN_FRAMES,
    MAX_STREAM,
    URGENT_STREAM,
    FrameDecoder,
    FrameQueue,
    RawFrame,
    single_segment,
)

Sent = tuple[int, bytes, list[bytes]]  # stream, header, buffers

frames = st.lists(
    st.tuples(
        st.integers(0, MAX_STREAM),
        st.binary(min_size=1, max_size=40),
        st.lists(st.binary(min_size=1, max_size=200), max_size=3),
    ),
    max_size=12,
)
sizes = st.lists(st.integers(1, 400), min_size=1, max_size=20)


def on_the_wire(sent: list[Sent], segment_bytes: int) -> bytes:
    queue = FrameQueue(segment_bytes=segment_bytes)
    for stream, header, buffers in sent:
        queue.push(stream, header, [memoryview(data) for data in buffers])
    wire = b""
    while (pieces := queue.next_segment()) is not None:
        wire += b"".join(pieces)
    assert queue.nbytes == 0
    return wire


def pieces_of(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, at = list[bytes](), 0
    for size in itertools.cycle(sizes):
        if at >= len(data):
            return pieces
        pieces.append(data[at : at + size])
        at += size
    return pieces


def contents(frames: list[RawFrame]) -> list[tuple[bytes, bytes]]:
    return [(bytes(frame.header), bytes(frame.body)) for frame in frames]


@given(frames, sizes, st.integers(16, 300))
def test_frames_survive_any_split(sent: list[Sent], sizes: list[int], segment_bytes: int) -> None:
    decoder = FrameDecoder()
    wire = on_the_wire(sent, segment_bytes) + END
    got = [frame for piece in pieces_of(wire, sizes) for frame in decoder.feed(piece)]
    assert sorted(contents(got)) == sorted((h, b"".join(bs)) for _, h, bs in sent)
    assert decoder.is_ended
    assert decoder.n_incomplete == 0


@given(frames, st.integers(16, 300), st.integers(0, MAX_STREAM))
def test_frames_of_a_stream_keep_their_order(
    sent: list[Sent], segment_bytes: int, stream: int
) -> None:
    one_stream = [(stream, bytes([n]) + header, data) for n, (_, header, data) in enumerate(sent)]
    got = FrameDecoder().feed(on_the_wire(one_stream, segment_bytes))
    assert contents(got) == [(header, b"".join(data)) for _, header, data in one_stream]


@given(frames, sizes)
def test_receiving_in_place_gives_the_same(sent: list[Sent], sizes: list[int]) -> None:
    wire = on_the_wire([(s, h, [d * 900 for d in ds]) for s, h, ds in sent], 100_000)
    in_place, decoder = list[RawFrame](), FrameDecoder()
    for size in itertools.cycle([size * 300 for size in sizes]):
        if not wire:
            break
        target = decoder.buffer()
        count = min(len(target), len(wire), size)
        target[:count] = wire[:count]
        in_place += decoder.advance(count)
        wire = wire[count:]
    assert decoder.n_incomplete == 0
    assert sorted(contents(in_place)) == sorted(
        (h, b"".join(ds) and b"".join(d * 900 for d in ds)) for _, h, ds in sent
    )


@given(st.lists(st.binary(max_size=200), max_size=8))
def test_any_bytes_give_frames_or_a_violation(pieces: list[bytes]) -> None:
    decoder = FrameDecoder()
    try:
        for piece in pieces:
            decoder.feed(piece)
    except ProtocolViolation:
        return
    assert decoder.n_incomplete <= MAX_OPEN_FRAMES


@given(frames, st.integers(16, 300), st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_gives_frames_or_a_violation(
    sent: list[Sent], segment_bytes: int, at: int, change: int
) -> None:
    wire = bytearray(on_the_wire(sent, segment_bytes) or bytes(4))
    wire[at % len(wire)] ^= change
    decoder = FrameDecoder()
    try:
        decoder.feed(wire)
    except ProtocolViolation:
        return
    assert decoder.n_incomplete <= MAX_OPEN_FRAMES


@given(st.binary(min_size=1, max_size=30), st.lists(st.binary(min_size=1, max_size=300)))
def test_the_short_way_is_the_same_as_the_queue(header: bytes, buffers: list[bytes]) -> None:
    views = [memoryview(data) for data in buffers]
    pieces = single_segment(5, header, views)
    assert pieces is not None
    got = FrameDecoder().feed(b"".join(pieces))
    assert contents(got) == [(header, b"".join(buffers))]


@given(st.integers(2, 60))
def test_an_urgent_frame_waits_for_one_segment_at_most(n_segments: int) -> None:
    queue = FrameQueue(segment_bytes=100)
    queue.push(5, b"h", [memoryview(bytes(100 * n_segments))])
    first = queue.next_segment()
    queue.push(URGENT_STREAM, b"ping", [])
    second = queue.next_segment()
    assert first is not None
    assert second is not None
    assert contents(FrameDecoder().feed(b"".join(second))) == [(b"ping", b"")]
