"""Hidden states cross a border unchanged, whatever they are."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from covey.node.engine.tensors import HiddenStates
from covey.node.hidden import BeyondCodec, WrongTensor, is_finite, pack, unpack
from covey.node.wire_codecs import row_bytes
from covey.partition.plan import border_bytes_per_token
from covey.partition.profile import ModelLayout
from covey.transport.codec import decode_frame, encode_frame
from covey.transport.frame import Frame, Tensor
from covey.transport.messages import Forward

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=8)
FP32 = hnp.arrays(np.float32, SHAPES)
BF16 = hnp.arrays(np.uint16, SHAPES)
MESSAGE = Forward(session="s", epoch=0, stage_idx=0, step=0, position=0, n_return=0)


def over_the_wire(tensor: Tensor) -> Tensor:
    header, buffers = encode_frame(Frame(message=MESSAGE, tensors={"hidden": tensor}))
    return decode_frame(header, b"".join(buffers)).tensors["hidden"]


@given(FP32, st.booleans())
def test_exact_fp32_keeps_every_bit(hidden: HiddenStates, is_turned: bool) -> None:
    hidden = hidden.T if is_turned else hidden
    tensor = over_the_wire(pack(hidden, "fp32", "exact"))
    n_tokens, width = hidden.shape
    back = unpack(tensor, "fp32", "exact", hidden_size=width, max_tokens=n_tokens)
    assert back.dtype == np.float32
    assert back.tobytes() == hidden.tobytes()


@given(BF16)
def test_bf16_keeps_every_bit_under_either_codec(hidden: HiddenStates) -> None:
    n_tokens, width = hidden.shape
    for codec in ("exact", "fp16"):
        tensor = over_the_wire(pack(hidden, "bf16", codec))
        back = unpack(tensor, "bf16", codec, hidden_size=width, max_tokens=n_tokens)
        assert back.dtype == np.uint16
        assert np.array_equal(back, hidden)


@given(FP32)
def test_fp16_rounds_what_it_can_hold_and_refuses_the_rest(hidden: HiddenStates) -> None:
    n_tokens, width = hidden.shape
    # 65520 is half way between the largest fp16 and what would be the next: it rounds up.
    fits = bool((np.abs(hidden) < 65520).all())  # False for NaN
    try:
        tensor = over_the_wire(pack(hidden, "fp32", "fp16"))
    except BeyondCodec:
        assert not fits
        return
    assert fits
    back = unpack(tensor, "fp32", "fp16", hidden_size=width, max_tokens=n_tokens)
    assert back.dtype == np.float32
    # Half of the last of 11 bits, or of the smallest subnormal.
    assert (np.abs(back - hidden) <= np.maximum(np.abs(hidden) * 2.0**-11, 2.0**-25)).all()


@given(
    st.sampled_from(["fp32", "fp16", "bf16", "u8", "i32"]),
    st.lists(st.integers(0, 6), max_size=3),
    st.sampled_from(["fp32", "bf16"]),
    st.sampled_from(["exact", "fp16", "int8", "int4"]),
)
def test_any_tensor_is_unpacked_to_the_agreed_form_or_refused(
    wire_dtype: str, shape: list[int], dtype: str, codec: str
) -> None:
    itemsize = {"fp32": 4, "fp16": 2, "bf16": 2, "u8": 1, "i32": 4}[wire_dtype]
    data = bytes(int(np.prod(shape)) * itemsize)
    tensor = Tensor(wire_dtype, tuple(shape), data)  # type: ignore[arg-type]
    try:
        back = unpack(tensor, dtype, codec, hidden_size=3, max_tokens=4)  # type: ignore[arg-type]
    except WrongTensor:
        return
    assert back.dtype == {"fp32": np.float32, "bf16": np.uint16}[dtype]
    assert 1 <= back.shape[0] <= 4
    assert back.shape[1:] == (3,)


def uneven(seed: int, n_tokens: int, width: int, octaves: int) -> HiddenStates:
    """Values whose magnitudes are spread over so many octaves, some of them equal or zero."""
    rng = np.random.default_rng(seed)
    magnitudes = 2.0 ** rng.uniform(15 - octaves, 15, (n_tokens, width))
    rows = np.round(rng.uniform(-1, 1, (n_tokens, width)), 1) * magnitudes
    return rows.astype(np.float32)


ORDINARY = st.builds(
    uneven, st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 130), st.integers(0, 40)
)


def through(hidden: HiddenStates, dtype: str, codec: str) -> HiddenStates:
    n_tokens, width = hidden.shape
    tensor = over_the_wire(pack(hidden, dtype, codec))  # type: ignore[arg-type]
    assert len(tensor.data) == n_tokens * row_bytes(codec, width)  # type: ignore[arg-type]
    return unpack(tensor, dtype, codec, hidden_size=width, max_tokens=n_tokens)  # type: ignore[arg-type]


def largest_in_group(hidden: HiddenStates) -> HiddenStates:
    """The largest magnitude in the group of 32 of each value."""
    starts = range(0, hidden.shape[1], 32)
    parts = [hidden[:, start : start + 32] for start in starts]
    return np.concatenate(
        [np.repeat(np.abs(p).max(1, keepdims=True), p.shape[1], 1) for p in parts], 1
    )


# fp16 rounds a scale by a part in 2048, or by half of its smallest number; times all steps.
TINY = 127 * 2.0**-24


@given(ORDINARY)
def test_int8_is_within_half_a_step_of_each_groups_largest(hidden: HiddenStates) -> None:
    back = through(hidden, "fp32", "int8")
    allowed = largest_in_group(hidden) * (0.5 / 127 + 2.0**-10) + TINY
    assert (np.abs(back - hidden) <= allowed).all()


@given(ORDINARY)
def test_int4_keeps_the_largest_values_and_is_within_half_a_step_of_the_rest(
    hidden: HiddenStates,
) -> None:
    back = through(hidden, "fp32", "int4")
    n_kept = -(-hidden.shape[1] // 64)
    order = np.argsort(np.abs(hidden), axis=1)
    # Of equals others may have been kept, so the largest of the rest is what bounds a step.
    rest = hidden.copy()
    np.put_along_axis(rest, order[:, hidden.shape[1] - n_kept :], 0, axis=1)
    largest = np.abs(rest).max(axis=1, keepdims=True)
    allowed = np.maximum(largest * (0.5 / 7 + 2.0**-10), np.abs(hidden) * 2.0**-11) + TINY
    assert (np.abs(back - hidden) <= allowed).all()


@given(FP32, st.sampled_from(["int8", "int4"]))
def test_lossy_codecs_refuse_what_is_not_finite_and_decode_to_finite_values(
    hidden: HiddenStates, codec: str
) -> None:
    try:
        back = through(hidden, "fp32", codec)
    except BeyondCodec:
        assert not (np.abs(hidden) < 65504).all()
        return
    assert np.isfinite(hidden).all()
    assert np.isfinite(back).all()


@given(BF16, st.sampled_from(["int8", "int4"]))
def test_lossy_codecs_take_bf16_borders_too(hidden: HiddenStates, codec: str) -> None:
    wide = (hidden.astype(np.uint32) << 16).view(np.float32)
    try:
        back = through(hidden, "bf16", codec)
    except BeyondCodec:
        assert not (np.abs(wide) < 65504).all()
        return
    assert back.dtype == np.uint16
    assert is_finite(back, "bf16")
    same = through(wide, "fp32", codec)
    as_fp32 = (back.astype(np.uint32) << 16).view(np.float32)
    assert (np.abs(as_fp32 - same) <= np.abs(same) * 2.0**-8 + 1e-38).all()


@given(st.sampled_from(["int8", "int4"]), st.integers(1, 200), st.data())
def test_hostile_bytes_are_refused_or_finite(codec: str, width: int, data: st.DataObject) -> None:
    n_bytes = row_bytes(codec, width)  # type: ignore[arg-type]
    tensor = Tensor("u8", (1, n_bytes), data.draw(st.binary(min_size=n_bytes, max_size=n_bytes)))
    try:
        back = unpack(tensor, "fp32", codec, hidden_size=width, max_tokens=1)  # type: ignore[arg-type]
    except WrongTensor:
        return
    assert back.shape == (1, width)
    assert np.isfinite(back).all()


@given(st.integers(1, 4096))
def test_a_planner_counts_the_bytes_that_are_sent(width: int) -> None:
    layout = ModelLayout(
        digest="m",
        n_blocks=1,
        hidden_size=width,
        block_bytes=(1,),
        embedding_bytes=0,
        head_bytes=0,
        kv_bytes_per_token_per_block=1,
        wire_bytes_per_token=4 * width,
    )
    for codec in ("int8", "int4"):
        assert row_bytes(codec, width) == border_bytes_per_token(layout, codec)
