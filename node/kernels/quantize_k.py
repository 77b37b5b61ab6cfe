"""Float weights as Q4_K, GGUF's four-bit format with a scale and a minimum for every 32 columns.

After llama.cpp's `quantize_row_q4_K_ref` and `make_qkx2_quants` (ggml/src/ggml-quants.c, MIT): a
few ranges are tried for each 32 columns, scale and minimum are fitted to the codes of each by
weighted least squares, and the best fit stays. Scales and minima of 256 columns are then rounded
to six bits. The `gguf` package reads the format but does not write it.

Every member of a swarm must get the same bytes, so only elementwise operations are used, which
IEEE 754 defines to the last bit, and sums are taken in an order that is written down here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

COLUMNS = 256  # of a super-block
BLOCK_BYTES = 144  # of it: d, dmin, 12 bytes of scales and minima, 128 of codes
_GROUP = 32  # columns with one scale and minimum
_GROUPS = COLUMNS // _GROUP
_LARGEST_CODE = 15
_LARGEST_SCALE = 63
_TRIED = np.arange(140, 161, dtype=np.float32) / np.float32(10)  # steps in the range
_FLAT = np.float32(1e-5)  # of numbers with nearly one code only rounding is left to fit a line to
_PIECE = 256  # super-blocks at once: what is computed on stays in the CPU's cache


def quantize_q4_k(values: Floats) -> Bytes:
    """Rows [n, columns] as GGUF stores them: [n, columns / 256 * 144].

    Numbers must be finite. Scales beyond what fp16 holds become infinite; the caller looks.
    """
    blocks = values.reshape(-1, COLUMNS)
    out = np.empty((len(blocks), BLOCK_BYTES), dtype=np.uint8)
    with np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, len(blocks), _PIECE):
            out[first : first + _PIECE] = _quantize(blocks[first : first + _PIECE])
    return out.reshape(len(values), -1)


def _quantize(blocks: Floats) -> Bytes:
    """Super-blocks [n, 256] to [n, 144]."""
    n = len(blocks)
    x = np.ascontiguousarray(blocks.reshape(n * _GROUPS, _GROUP).T)  # so that sums add whole rows
    scales, minima = _fit(x)
    d, scale_codes = _six_bits(scales.reshape(n, _GROUPS))
    dmin, minimum_codes = _six_bits(minima.reshape(n, _GROUPS))
    steps = (d.astype(np.float32) * scale_codes).reshape(-1)
    lowest = (dmin.astype(np.float32) * minimum_codes).reshape(-1)
    codes = np.rint((x + lowest) * _inverse(steps, 1))
    codes = np.nan_to_num(codes, copy=False).clip(0, _LARGEST_CODE).astype(np.uint8)
    # Of 64 columns, the second 32 are in the upper halves of the bytes.
    pairs = codes.T.reshape(n, _GROUPS // 2, 2, _GROUP)
    packed = pairs[:, :, 0] | pairs[:, :, 1] << 4
    return np.concatenate(
        (
            d.view(np.uint8),
            dmin.view(np.uint8),
            _scale_bytes(scale_codes.astype(np.uint8), minimum_codes.astype(np.uint8)),
            packed.reshape(n, -1),
        ),
        axis=1,
    )


def _fit(x: Floats) -> tuple[Floats, Floats]:
    """Scale s and minimum m of each group of x [32, n], so that x is about s * code - m, m >= 0.

    The error of a number counts by its size plus the root mean square of its group.
    """
    low = np.minimum(x.min(axis=0), 0)
    y = x - low
    weights = np.abs(x) + np.sqrt(_sum(x * x) / _GROUP)
    y_weights = y * weights
    sum_yy, sum_w, sum_y = _sum(y * y_weights), _sum(weights.copy()), _sum(y_weights.copy())
    span = y.max(axis=0)
    scale, first = span / _LARGEST_CODE, np.zeros_like(span)  # y is about scale * code + first
    best = np.full_like(span, np.inf)
    codes, scratch = np.empty_like(x), np.empty_like(x)
    for tried in _TRIED:
        np.subtract(y, first, out=codes)
        codes *= _inverse(span - first, tried)
        np.rint(codes, out=codes)
        np.clip(codes, 0, _LARGEST_CODE, out=codes)
        sum_cy = _sum(np.multiply(codes, y_weights, out=scratch))
        np.multiply(codes, weights, out=scratch)
        codes *= scratch
        sum_c, sum_cc = _sum(scratch), _sum(codes)
        determinant = sum_w * sum_cc - sum_c * sum_c
        inverse = _inverse(determinant, 1)
        s = (sum_w * sum_cy - sum_y * sum_c) * inverse
        at = (sum_cc * sum_y - sum_c * sum_cy) * inverse
        # A minimum above zero cannot be stored: then zero, and the scale that fits best to it.
        is_above = at > -low
        np.copyto(s, (sum_cy + low * sum_c) * _inverse(sum_cc, 1), where=is_above)
        np.copyto(at, -low, where=is_above)
        error = sum_yy - 2 * (s * sum_cy + at * sum_y)
        error += s * s * sum_cc + 2 * s * at * sum_c + at * at * sum_w
        is_better = (determinant > _FLAT * sum_w * sum_cc) & (error < best)
        for mine, its in ((scale, s), (first, at), (best, error)):
            np.copyto(mine, its, where=is_better)
    return scale, -(first + low)


def _six_bits(values: Floats) -> tuple[npt.NDArray[np.float16], Floats]:
    """Numbers [n, 8] of at least 0 as fp16 [n, 1] times whole numbers up to 63."""
    largest = values.max(axis=1, keepdims=True)
    codes = np.rint(values * _inverse(largest, _LARGEST_SCALE))
    codes = np.nan_to_num(codes, copy=False).clip(0, _LARGEST_SCALE)
    return (largest / _LARGEST_SCALE).astype(np.float16), codes


def _scale_bytes(scales: Bytes, minima: Bytes) -> Bytes:
    """Six bits each of 8 scales and 8 minima [n, 8], as the format mixes them into [n, 12]."""
    upper = slice(4, 8)
    return np.concatenate(
        (
            scales[:, :4] | scales[:, upper] >> 4 << 6,
            minima[:, :4] | minima[:, upper] >> 4 << 6,
            scales[:, upper] & 15 | (minima[:, upper] & 15) << 4,
        ),
        axis=1,
    )


def _inverse(values: Floats, numerator: float | np.float32) -> Floats:
    """numerator / values, and 0 for 0."""
    return np.divide(np.float32(numerator), values, out=np.zeros_like(values), where=values != 0)


def _sum(x: Floats) -> Floats:
    """The sum over the first axis of 32, whose numbers are overwritten: always in this order."""
    half = _GROUP // 2
    while half:
        np.add(x[:half], x[half : 2 * half], out=x[:half])
        half //= 2
    total: Floats = x[0].copy()
    return total
