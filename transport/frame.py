"""A frame: one message, its place in a request, and the tensors that travel with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

from .messages import AnyMessage

WireDType = Literal["fp32", "fp16", "bf16", "u8", "i32"]
ITEMSIZE: Mapping[WireDType, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "u8": 1, "i32": 4}

Buffer = bytes | bytearray | memoryview


class Tensor(Struct, frozen=True):
    """Raw little-endian elements in C order; `len(data)` is the product of shape and itemsize."""

    dtype: WireDType
    shape: tuple[int, ...]
    data: Buffer


class Frame(Struct, frozen=True, kw_only=True):
    """What a link carries: delivered whole, in order, once, or not at all.

    `request` numbers a frame that wants an answer; the answer carries it as `reply_to`. `number`
    and `ack` belong to the link (`steady/ledger.py`) and are 0 everywhere else.
    """

    message: AnyMessage
    tensors: Mapping[str, Tensor] = {}
    request: int | None = None
    reply_to: int | None = None
    number: int = 0
    ack: int = 0
