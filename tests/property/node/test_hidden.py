"""Hidden states cross a border unchanged, whatever they are."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from covey.node.engine.tensors import HiddenStates
from covey.node.hidden import BeyondCodec, WrongTensor, pack, unpack
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
    st.sampled_from(["exact", "fp16"]),
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
