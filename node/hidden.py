"""Hidden states as they cross a link: numpy arrays in, wire tensors out, and back.

The engine's arrays are float32, or uint16 holding bfloat16 bits (`engine/tensors.py`). The codec
`exact` sends them as they are; `fp16` halves an fp32 border and leaves bf16 alone; `int8` and
`int4` are those of `wire_codecs.py`, for both. What each loses is measured by
`benchmarks/bench_codecs.py`. Values that a codec cannot hold are refused, since infinity further
down would only hide where it began.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from covey.transport.errors import ErrorCode, ProtocolViolation
from covey.transport.frame import Tensor, WireDType
from covey.transport.messages import Codec

from .engine.tensors import EngineDtype, HiddenStates
from .errors import NodeError
from .wire_codecs import LossyCodec, NotDecodable, NotEncodable, decode, encode, row_bytes

_NUMPY: Mapping[str, np.dtype[Any]] = {
    "fp32": np.dtype("<f4"),
    "bf16": np.dtype("<u2"),
    "fp16": np.dtype("<f2"),
}
_BF16_EXPONENT = np.uint16(0x7F80)  # all ones in NaN and infinity


class WrongTensor(ProtocolViolation):
    """A tensor that the session's plan does not allow; the peer that sent it is wrong."""

    code = ErrorCode.WRONG_TENSOR


class BeyondCodec(NodeError):
    """Hidden states that the border's codec cannot carry; the session cannot go on."""


def pack(hidden: HiddenStates, dtype: EngineDtype, codec: Codec) -> Tensor:
    """Encode `hidden` [n_tokens, hidden_size]; no copy for `exact`, so do not modify it later.

    Raises:
        BeyondCodec: a value beyond fp16's range (65504) under the codec `fp16`, or one that
            `int8` or `int4` cannot hold.
    """
    if codec == "int8" or codec == "int4":
        return _pack_lossy(hidden, dtype, codec)
    hidden = hidden if hidden.flags.c_contiguous else hidden.copy()
    if codec == "fp16" and dtype == "fp32":
        with np.errstate(over="ignore"):
            halved = hidden.astype(_NUMPY["fp16"])
        if not np.isfinite(halved).all():
            raise BeyondCodec("hidden states exceed the range of fp16")
        return Tensor("fp16", hidden.shape, halved.data.cast("B"))
    return Tensor(dtype, hidden.shape, hidden.data.cast("B"))


def unpack(
    tensor: Tensor | None, dtype: EngineDtype, codec: Codec, *, hidden_size: int, max_tokens: int
) -> HiddenStates:
    """Decode what `pack` made; the result is read-only when no conversion was needed.

    Raises:
        WrongTensor: missing, of another dtype or shape, or with more rows than `max_tokens`.
    """
    if tensor is None:
        raise WrongTensor("a forward frame carries no hidden states")
    if codec == "int8" or codec == "int4":
        _check_tensor(tensor, "u8", row_bytes(codec, hidden_size), max_tokens)
        return _unpack_lossy(tensor, dtype, codec, hidden_size)
    expected: WireDType = "fp16" if codec == "fp16" and dtype == "fp32" else dtype
    _check_tensor(tensor, expected, hidden_size, max_tokens)
    array: HiddenStates = np.frombuffer(tensor.data, _NUMPY[expected]).reshape(tensor.shape)
    return array.astype(np.float32) if expected == "fp16" else array


def _check_tensor(tensor: Tensor, dtype: WireDType, width: int, max_tokens: int) -> None:
    if tensor.dtype != dtype:
        raise WrongTensor(f"hidden states are {tensor.dtype}, the plan says {dtype}")
    if len(tensor.shape) != 2 or tensor.shape[1] != width:
        raise WrongTensor(f"hidden states have shape {tensor.shape}, not [n, {width}]")
    if not 1 <= tensor.shape[0] <= max_tokens:
        raise WrongTensor(f"{tensor.shape[0]} rows are outside 1 to {max_tokens}")


def _pack_lossy(hidden: HiddenStates, dtype: EngineDtype, codec: LossyCodec) -> Tensor:
    try:
        data = encode(codec, _bf16_to_fp32(hidden) if dtype == "bf16" else hidden)
    except NotEncodable as error:
        raise BeyondCodec(f"{codec}: {error}") from error
    return Tensor("u8", data.shape, data.data.cast("B"))


def _unpack_lossy(
    tensor: Tensor, dtype: EngineDtype, codec: LossyCodec, hidden_size: int
) -> HiddenStates:
    data = np.frombuffer(tensor.data, np.uint8).reshape(tensor.shape)
    try:
        rows = decode(codec, data, hidden_size)
    except NotDecodable as error:
        raise WrongTensor(f"{codec}: {error}") from error
    return _fp32_to_bf16(rows) if dtype == "bf16" else rows


def _bf16_to_fp32(bits: HiddenStates) -> HiddenStates:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _fp32_to_bf16(rows: HiddenStates) -> HiddenStates:
    """Rounded to the nearest, ties to even; for finite values."""
    bits = rows.view(np.uint32)
    rounded: HiddenStates = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return rounded.astype(np.uint16)


def is_finite(hidden: HiddenStates, dtype: EngineDtype) -> bool:
    """Whether no value is NaN or infinite, which none that an honest stage sends is."""
    if dtype == "bf16":
        return not bool(((hidden & _BF16_EXPONENT) == _BF16_EXPONENT).any())
    return bool(np.isfinite(hidden).all())
