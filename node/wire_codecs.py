"""Lossy codecs of hidden states: rows of float32 to rows of bytes, and back.

Each group of 32 columns has one fp16 scale. A row of `int8` is D signed bytes, then the scales. A
row of `int4` is D values of four bits, two to a byte, low half first, then the scales, then the
largest values of the row, one in 64, as fp16 and their columns as uint16, rising: hidden states
have a few values that are hundreds of times the others, and would be all that a scale sees. All
numbers are little-endian; sizes are those of `partition.plan.border_bytes_per_token`.

Whatever is decoded is finite: what a sender makes of NaN, infinity or more than the codec holds is
an error at the sender, and bytes that would decode to such are one at the receiver.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32]
Bytes: TypeAlias = npt.NDArray[np.uint8]
LossyCodec = Literal["int8", "int4"]

GROUP = 32  # columns of one scale
KEPT = 64  # of so many values one is kept by `int4`
MAX_COLUMNS = 1 << 16  # a column's number has two bytes
_INT8, _INT4 = 127, 7  # the largest steps; both sides alike
_FP16, _UINT16 = np.dtype("<f2"), np.dtype("<u2")


class NotEncodable(ValueError):
    """Values that are not finite, or too large for the codec."""


class NotDecodable(ValueError):
    """Bytes that no encoder makes."""


def row_bytes(codec: LossyCodec, columns: int) -> int:
    """Bytes of one row."""
    scales = 2 * _groups(columns)
    if codec == "int8":
        return columns + scales
    return -(-columns // 2) + scales + 4 * _kept(columns)


def encode(codec: LossyCodec, rows: Floats) -> Bytes:
    """Rows [n, D] as bytes [n, row_bytes]; raises NotEncodable."""
    if codec == "int8":
        return np.concatenate(_quantize(rows, _INT8), axis=1)
    n_rows, columns = rows.shape
    if columns > MAX_COLUMNS:
        raise NotEncodable(f"rows of {columns} columns, and int4 numbers {MAX_COLUMNS}")
    n_kept = _kept(columns)
    places = np.argpartition(np.abs(rows), columns - n_kept, axis=1)[:, columns - n_kept :]
    places.sort(axis=1)
    with np.errstate(over="ignore"):
        kept = np.take_along_axis(rows, places, axis=1).astype(_FP16)
    if not np.isfinite(kept).all():
        raise NotEncodable("hidden states beyond the range of fp16")
    rest = rows.copy()
    np.put_along_axis(rest, places, np.float32(0), axis=1)
    steps, scales = _quantize(rest, _INT4)
    nibbles = np.full((n_rows, columns + columns % 2), 8, np.uint8)
    nibbles[:, :columns] = steps + np.uint8(8)  # of two's complement, so it wraps to 1..15
    packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return np.concatenate(
        (packed, scales, _as_bytes(kept), _as_bytes(places.astype(_UINT16))), axis=1
    )


def decode(codec: LossyCodec, data: Bytes, columns: int) -> Floats:
    """The inverse of `encode`, for bytes [n, row_bytes] of rows of `columns`.

    Raises:
        NotDecodable: a scale or a kept value that is not finite, columns that do not rise.
    """
    scale_bytes = 2 * _groups(columns)
    if codec == "int8":
        steps = data[:, :columns].view(np.int8)
        return _restore(steps, data[:, columns:])
    at = -(-columns // 2)
    nibbles = np.empty((len(data), 2 * at), np.uint8)
    nibbles[:, 0::2] = data[:, :at] & 15
    nibbles[:, 1::2] = data[:, :at] >> 4
    rows = _restore(nibbles[:, :columns].view(np.int8) - np.int8(8), data[:, at : at + scale_bytes])
    at += scale_bytes
    n_kept = _kept(columns)
    kept = _from_bytes(data[:, at : at + 2 * n_kept], _FP16)
    places = _from_bytes(data[:, at + 2 * n_kept :], _UINT16).astype(np.intp)
    if not np.isfinite(kept).all():
        raise NotDecodable("a kept value is not finite")
    if (places >= columns).any() or (np.diff(places, axis=1) <= 0).any():
        raise NotDecodable("places of kept values do not rise within the row")
    np.put_along_axis(rows, places, kept.astype(np.float32), axis=1)
    return rows


def _quantize(rows: Floats, most: int) -> tuple[Bytes, Bytes]:
    """Steps [n, D] in two's complement, and the scales' bytes [n, 2 * groups]."""
    n_rows, columns = rows.shape
    groups = _in_groups(rows)
    largest = np.maximum(groups.max(axis=2), -groups.min(axis=2))  # NaN where there is one
    with np.errstate(over="ignore"):
        scales = (largest / np.float32(most)).astype(_FP16)
    if not np.isfinite(scales).all():
        raise NotEncodable("hidden states are not finite, or beyond what a scale in fp16 holds")
    wide = scales.astype(np.float32)
    wide[wide == 0] = np.inf  # all is zero, or too small to matter
    steps = groups / wide[:, :, None]
    np.rint(steps, out=steps)
    np.clip(steps, -most, most, out=steps)  # the scale was rounded, perhaps down
    flat = steps.astype(np.int8).reshape(n_rows, -1)[:, :columns]
    return flat.view(np.uint8), _as_bytes(scales)


def _restore(steps: npt.NDArray[np.int8], scale_bytes: Bytes) -> Floats:
    scales = _from_bytes(scale_bytes, _FP16).astype(np.float32)
    if not np.isfinite(scales).all():
        raise NotDecodable("a scale is not finite")
    groups = _in_groups(steps.astype(np.float32))
    groups *= scales[:, :, None]
    rows: Floats = groups.reshape(len(steps), -1)[:, : steps.shape[1]]
    return np.ascontiguousarray(rows)


def _in_groups(rows: Floats) -> Floats:
    """[n, D] as [n, groups, 32], the last one filled up with zeros."""
    n_rows, columns = rows.shape
    if columns % GROUP == 0:
        return rows.reshape(n_rows, -1, GROUP)
    padded = np.zeros((n_rows, _groups(columns) * GROUP), np.float32)
    padded[:, :columns] = rows
    return padded.reshape(n_rows, -1, GROUP)


def _groups(columns: int) -> int:
    return -(-columns // GROUP)


def _kept(columns: int) -> int:
    return -(-columns // KEPT)


def _as_bytes(array: npt.NDArray[np.float16] | npt.NDArray[np.uint16]) -> Bytes:
    return np.ascontiguousarray(array).view(np.uint8)


def _from_bytes(data: Bytes, dtype: np.dtype[np.float16] | np.dtype[np.uint16]) -> npt.NDArray:  # type: ignore[type-arg]
    return np.ascontiguousarray(data).view(dtype)
