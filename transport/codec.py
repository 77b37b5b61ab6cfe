"""Frames to bytes and back: a msgpack header, and tensor bytes that are never copied.

The header is decoded straight into the types of `messages.py`: lengths, patterns and ranges are
checked while reading, so an untyped tree of a peer's making never exists in memory. What comes out
of `decode_frame` keeps every promise that `Frame` and `Tensor` make.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from .errors import FrameTooLarge, MalformedFrame
from .frame import ITEMSIZE, Buffer, Frame, Tensor, WireDType
from .messages import AnyMessage

MAX_HEADER_BYTES = 2 << 20  # a StoreSync body of 1 MiB, or a Welcome with 256 members
MAX_BODY_BYTES = 64 << 20  # a prefill chunk of 2048 x 8192 fp32
MAX_TENSORS = 4
MAX_DIMS = 8

_Number = Annotated[int, Meta(ge=0, le=1 << 53)]


class _Descriptor(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor of the body; its place follows from those before it."""

    name: Annotated[str, Meta(min_length=1, max_length=32, pattern="^[a-z0-9_]+$")]
    dtype: WireDType
    shape: Annotated[
        tuple[Annotated[int, Meta(ge=0, le=MAX_BODY_BYTES)], ...], Meta(max_length=MAX_DIMS)
    ]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


class _Header(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    message: AnyMessage
    tensors: Annotated[tuple[_Descriptor, ...], Meta(max_length=MAX_TENSORS)] = ()
    request: _Number | None = None
    reply_to: _Number | None = None
    number: _Number = 0
    ack: _Number = 0


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Header)


def encode_frame(frame: Frame) -> tuple[bytes, list[memoryview]]:
    """The header, and the tensors' own memory, flat, in the order of the body.

    Raises:
        FrameTooLarge: the header, the body or the number of tensors is beyond its limit.
        ValueError: a tensor's shape does not fit its data.
    """
    if len(frame.tensors) > MAX_TENSORS:
        raise FrameTooLarge(f"a frame carries at most {MAX_TENSORS} tensors")
    # Wide elements first, so that each tensor starts on a multiple of its own itemsize.
    tensors = sorted(frame.tensors.items(), key=lambda item: -ITEMSIZE[item[1].dtype])
    descriptors: list[_Descriptor] = []
    buffers: list[memoryview] = []
    for name, tensor in tensors:
        descriptor = _Descriptor(name, tensor.dtype, tuple(tensor.shape))
        data = memoryview(tensor.data)
        if data.nbytes != descriptor.nbytes:
            raise ValueError(f"tensor {name!r} has {data.nbytes} bytes, not {descriptor.nbytes}")
        descriptors.append(descriptor)
        if data.nbytes:
            buffers.append(data.cast("B"))
    header = _encoder.encode(
        _Header(
            frame.message,
            tuple(descriptors),
            frame.request,
            frame.reply_to,
            frame.number,
            frame.ack,
        )
    )
    check_lengths(len(header), sum(len(data) for data in buffers))
    return header, buffers


def decode_frame(header: Buffer, body: Buffer) -> Frame:
    """The frame; its tensors are views of `body`.

    Raises:
        MalformedFrame: the header is not one, or does not describe the body exactly.
    """
    try:
        decoded = _decoder.decode(header)
    except ValueError as error:  # msgspec's errors and UnicodeDecodeError are among its kinds
        raise MalformedFrame("a frame's header cannot be read") from error
    return Frame(
        message=decoded.message,
        tensors=_tensors(decoded.tensors, memoryview(body)) if decoded.tensors or body else {},
        request=decoded.request,
        reply_to=decoded.reply_to,
        number=decoded.number,
        ack=decoded.ack,
    )


def check_lengths(header_bytes: int, body_bytes: int) -> None:
    """Refuse a frame that is too large; called before memory is taken for it.

    Raises:
        FrameTooLarge: one of the two is beyond its limit.
    """
    if header_bytes > MAX_HEADER_BYTES:
        raise FrameTooLarge(f"a frame's header has {header_bytes} bytes, over {MAX_HEADER_BYTES}")
    if body_bytes > MAX_BODY_BYTES:
        raise FrameTooLarge(f"a frame's body has {body_bytes} bytes, over {MAX_BODY_BYTES}")


def _tensors(descriptors: tuple[_Descriptor, ...], body: memoryview) -> Mapping[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    offset = 0
    for descriptor in descriptors:
        end = offset + descriptor.nbytes
        if end > len(body) or descriptor.name in tensors:
            raise MalformedFrame("a frame's tensors do not fit its body")
        tensors[descriptor.name] = Tensor(descriptor.dtype, descriptor.shape, body[offset:end])
        offset = end
    if offset != len(body):
        raise MalformedFrame("a frame's body is longer than its tensors")
    return tensors
