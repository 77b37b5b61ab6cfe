"""Hidden states on the wire: what is sent, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from covey.node.engine.tensors import HiddenStates
from covey.node.hidden import BeyondCodec, WrongTensor, is_finite, pack, unpack
from covey.node.switch import code_of
from covey.transport.errors import ErrorCode
from covey.transport.frame import Tensor
from covey.transport.messages import Codec
from support.node_core import HIDDEN, rows


def test_exact_sends_the_arrays_own_memory() -> None:
    hidden = rows(3)
    tensor = pack(hidden, "fp32", "exact")
    assert (tensor.dtype, tensor.shape) == ("fp32", (3, HIDDEN))
    hidden[0, 0] = 42
    assert np.frombuffer(tensor.data, np.float32)[0] == 42


def test_a_view_that_is_not_contiguous_is_sent_in_order() -> None:
    hidden = rows(6)[::2]
    tensor = pack(hidden, "fp32", "exact")
    assert np.array_equal(np.frombuffer(tensor.data, np.float32).reshape(3, HIDDEN), hidden)


def test_fp16_halves_an_fp32_border_and_leaves_bf16_alone() -> None:
    assert len(pack(rows(3), "fp32", "fp16").data) == 3 * HIDDEN * 2
    bits = np.arange(8, dtype=np.uint16).reshape(2, 4)
    assert pack(bits, "bf16", "fp16") == pack(bits, "bf16", "exact")


@pytest.mark.parametrize("value", [65520.0, -65520.0, 1e30, np.inf, np.nan])
def test_what_fp16_cannot_hold_is_refused_before_it_becomes_infinite(value: float) -> None:
    hidden = rows(2)
    hidden[1, 2] = value
    with pytest.raises(BeyondCodec) as caught:
        pack(hidden, "fp32", "fp16")
    assert code_of(caught.value) is ErrorCode.INTERNAL  # the receiver did nothing wrong
    hidden[1, 2] = 65504.0
    assert pack(hidden, "fp32", "fp16").dtype == "fp16"


GOOD = Tensor("fp32", (2, HIDDEN), bytes(8 * HIDDEN))


@pytest.mark.parametrize(
    "tensor",
    [
        None,
        Tensor("fp16", (2, HIDDEN), bytes(4 * HIDDEN)),
        Tensor("bf16", (2, HIDDEN), bytes(4 * HIDDEN)),
        Tensor("i32", (2, HIDDEN), bytes(8 * HIDDEN)),
        Tensor("fp32", (HIDDEN, 2), bytes(8 * HIDDEN)),
        Tensor("fp32", (2 * HIDDEN,), bytes(8 * HIDDEN)),
        Tensor("fp32", (1, 2, HIDDEN), bytes(8 * HIDDEN)),
        Tensor("fp32", (), bytes(4)),
        Tensor("fp32", (0, HIDDEN), b""),
        Tensor("fp32", (3, HIDDEN), bytes(12 * HIDDEN)),
    ],
)
def test_a_tensor_that_the_plan_does_not_allow_is_a_violation(tensor: Tensor | None) -> None:
    with pytest.raises(WrongTensor) as caught:
        unpack(tensor, "fp32", "exact", hidden_size=HIDDEN, max_tokens=2)
    assert caught.value.code is ErrorCode.WRONG_TENSOR
    unpack(GOOD, "fp32", "exact", hidden_size=HIDDEN, max_tokens=2)


def test_an_fp16_border_takes_no_fp32() -> None:
    with pytest.raises(WrongTensor):
        unpack(GOOD, "fp32", "fp16", hidden_size=HIDDEN, max_tokens=2)


@pytest.mark.parametrize(
    ("bits", "finite"),
    [
        (0x0000, True),
        (0x7F7F, True),  # the largest
        (0xFF7F, True),
        (0x0001, True),  # subnormal
        (0x7F80, False),  # infinity
        (0xFF80, False),
        (0x7FC0, False),  # NaN
        (0x7F81, False),
    ],
)
def test_bf16_bits_are_judged_by_their_exponent(bits: int, finite: bool) -> None:
    hidden = np.array([[0, bits]], np.uint16)
    assert is_finite(hidden, "bf16") is finite
    as_fp32 = (hidden.astype(np.uint32) << 16).view(np.float32)
    assert bool(np.isfinite(as_fp32).all()) is finite


@pytest.mark.parametrize(("value", "finite"), [(3e38, True), (np.inf, False), (np.nan, False)])
def test_fp32_is_judged_by_its_values(value: float, finite: bool) -> None:
    assert is_finite(np.array([[0.0, value]], np.float32), "fp32") is finite


def lossy(codec: Codec) -> tuple[HiddenStates, Tensor]:
    hidden = np.random.default_rng(1).standard_normal((2, 130)).astype(np.float32)
    return hidden, pack(hidden, "fp32", codec)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_a_value_far_above_the_others_spoils_its_group_under_int8_and_none_under_int4(
    codec: Codec,
) -> None:
    hidden, _ = lossy(codec)
    hidden[0, 5] = 3000.0
    tensor = pack(hidden, "fp32", codec)
    back = unpack(tensor, "fp32", codec, hidden_size=130, max_tokens=2)
    neighbours = np.abs(back - hidden)[0, 6:32].max()
    assert neighbours > 1 if codec == "int8" else neighbours < 0.5


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_lossy_codecs_refuse_what_they_cannot_hold(codec: Codec, value: float) -> None:
    hidden, _ = lossy(codec)
    hidden[1, 7] = value
    with pytest.raises(BeyondCodec):
        pack(hidden, "fp32", codec)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_scales_that_are_not_finite_are_a_violation(codec: Codec) -> None:
    _, tensor = lossy(codec)
    data = bytearray(tensor.data)
    at = 130 if codec == "int8" else 65
    data[at : at + 2] = np.float16(np.inf).tobytes()
    hostile = Tensor("u8", tensor.shape, bytes(data))
    with pytest.raises(WrongTensor):
        unpack(hostile, "fp32", codec, hidden_size=130, max_tokens=2)


@pytest.mark.parametrize("place", [130, 65535, 0])
def test_places_beyond_the_row_or_out_of_order_are_a_violation(place: int) -> None:
    _, tensor = lossy("int4")
    width = tensor.shape[1]
    data = bytearray(tensor.data)
    data[width - 2 : width] = np.uint16(place).tobytes()  # the last of the first row
    with pytest.raises(WrongTensor):
        unpack(
            Tensor("u8", tensor.shape, bytes(data)), "fp32", "int4", hidden_size=130, max_tokens=2
        )


def test_rows_that_are_no_whole_groups_and_rows_of_zeros_survive() -> None:
    codecs: list[Codec] = ["int8", "int4"]
    for codec in codecs:
        for width in (1, 31, 33, 65):
            zeros = np.zeros((3, width), np.float32)
            tensor = pack(zeros, "fp32", codec)
            back = unpack(tensor, "fp32", codec, hidden_size=width, max_tokens=3)
            assert np.array_equal(back, zeros)
