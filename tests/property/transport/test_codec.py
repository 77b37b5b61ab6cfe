"""The codec: every frame survives it, and nothing else gets through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.transport.codec import decode_frame, encode_frame
from covey.transport.errors import FrameTooLarge, MalformedFrame
from covey.transport.frame import ITEMSIZE, Frame, Tensor, WireDType
from covey.transport.identity import Identity
from covey.transport.messages import (
    AnyMessage,
    Beat,
    Forward,
    MemberEntry,
    Ping,
    RelayOffer,
    SessionOpened,
    StageTrace,
    StoreSync,
    Welcome,
)

PEER = Identity(bytes(32)).peer_id
N = 1 << 20

shapes = st.lists(st.integers(0, 5), max_size=8).map(tuple)


def tensor(dtype: WireDType, shape: tuple[int, ...]) -> Tensor:
    nbytes = ITEMSIZE[dtype]
    for size in shape:
        nbytes *= size
    return Tensor(dtype, shape, bytes(i % 251 for i in range(nbytes)))


tensors = st.dictionaries(
    st.from_regex(r"\A[a-z0-9_]{1,32}\Z"),
    st.builds(tensor, st.sampled_from(sorted(ITEMSIZE)), shapes),
    max_size=4,
)
traces = st.builds(StageTrace, st.integers(0, N), st.integers(0, N), st.integers(0, N))
keys = st.binary(min_size=32, max_size=32)
messages: st.SearchStrategy[AnyMessage] = st.one_of(
    st.just(Ping()),
    st.builds(Beat, body=st.binary(max_size=100)),
    st.builds(
        RelayOffer, circuit=st.binary(min_size=16, max_size=16), key=keys, origin=st.just(PEER)
    ),
    st.builds(StoreSync, body=st.binary(max_size=1000)),
    st.builds(SessionOpened, session=st.from_regex(r"\A[0-9A-Za-z_-]{1,64}\Z")),
    st.builds(
        Forward,
        session=st.just("s"),
        epoch=st.integers(0, 1 << 31),
        stage_idx=st.integers(0, 64),
        step=st.integers(0, 1 << 40),
        position=st.integers(0, N),
        n_return=st.integers(0, N),
        codec=st.sampled_from(["exact", "fp16"]),
        trace=st.lists(traces, max_size=4),
    ),
)
numbers = st.none() | st.integers(0, 1 << 53)
frames = st.builds(Frame, message=messages, tensors=tensors, request=numbers, reply_to=numbers)


@given(frames)
def test_a_frame_survives(frame: Frame) -> None:
    header, buffers = encode_frame(frame)
    got = decode_frame(header, b"".join(buffers))
    assert (got.message, got.request, got.reply_to) == (
        frame.message,
        frame.request,
        frame.reply_to,
    )
    assert got.tensors == frame.tensors


@given(frames)
def test_each_tensor_starts_on_a_multiple_of_its_itemsize(frame: Frame) -> None:
    header, buffers = encode_frame(frame)
    offset = 0
    for received in decode_frame(header, b"".join(buffers)).tensors.values():
        assert offset % ITEMSIZE[received.dtype] == 0
        offset += len(received.data)


@given(frames, st.binary(max_size=9), st.integers(0, 1 << 16), st.integers(1, 255))
def test_a_changed_header_is_a_frame_or_malformed(
    frame: Frame, tail: bytes, at: int, change: int
) -> None:
    header, buffers = encode_frame(frame)
    changed = bytearray(header)
    changed[at % len(changed)] ^= change
    for candidate in (changed, header + tail, header[: at % len(header)]):
        try:
            got = decode_frame(candidate, b"".join(buffers))
        except MalformedFrame:
            continue
        assert sum(len(t.data) for t in got.tensors.values()) == sum(map(len, buffers))


@given(st.binary(max_size=300), st.binary(max_size=30))
def test_any_bytes_are_a_frame_or_malformed(header: bytes, body: bytes) -> None:
    try:
        decode_frame(header, body)
    except MalformedFrame:
        return


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_body_of_another_length_is_malformed(extra: int) -> None:
    frame = Frame(message=Ping(), tensors={"x": tensor("fp32", (2, 3))})
    header, buffers = encode_frame(frame)
    body = b"".join(buffers)
    with pytest.raises(MalformedFrame):
        decode_frame(header, body[:extra] if extra < 0 else body + bytes(extra))


def test_a_shape_whose_product_is_huge_is_malformed() -> None:
    header, _ = encode_frame(Frame(message=Ping(), tensors={"x": tensor("u8", (1,) * 8)}))
    huge = header.replace(b"\x98" + b"\x01" * 8, b"\x98" + b"\xce\x04\x00\x00\x00" * 8)
    assert huge != header
    with pytest.raises(MalformedFrame):
        decode_frame(huge, b"x")


def test_two_tensors_of_one_name_are_malformed() -> None:
    frame = Frame(message=Ping(), tensors={"a": tensor("u8", (1,)), "b": tensor("u8", (1,))})
    header, _ = encode_frame(frame)
    with pytest.raises(MalformedFrame):
        decode_frame(header.replace(b"\xa1b", b"\xa1a"), b"xy")


def test_too_many_tensors_or_too_large_a_header_are_refused_before_sending() -> None:
    with pytest.raises(FrameTooLarge):
        encode_frame(Frame(message=Ping(), tensors={str(n): tensor("u8", ()) for n in range(5)}))
    with pytest.raises(FrameTooLarge):
        encode_frame(Frame(message=StoreSync(body=bytes(3 * N))))


def test_a_shape_that_does_not_fit_its_data_is_our_mistake() -> None:
    with pytest.raises(ValueError, match="has 3 bytes, not 4"):
        encode_frame(Frame(message=Ping(), tensors={"x": Tensor("fp32", (1,), b"abc")}))


def test_bounds_of_the_messages_are_checked() -> None:
    def welcome(secret: bytes, n_members: int) -> bytes:
        member = MemberEntry(peer_id=PEER, addresses=["10.0.0.1:1"], control_addresses=[])
        message = Welcome(
            swarm="12345678", epoch=0, secret=secret, founder=PEER, members=[member] * n_members
        )
        return encode_frame(Frame(message=message))[0]

    decode_frame(welcome(bytes(32), 256), b"")
    with pytest.raises(MalformedFrame):
        decode_frame(welcome(bytes(31), 1), b"")
    with pytest.raises(MalformedFrame):
        decode_frame(welcome(bytes(32), 257), b"")
