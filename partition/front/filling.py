"""Blocks handed out within limits so that a sum over units is least: to the cheapest first."""

from __future__ import annotations

import numpy as np

from .instance import Floats, Ints


def filled(per_block_s: Floats, caps: Ints, n_blocks: Ints | int) -> Ints:
    """[r, k]: of `n_blocks`, what each unit gets; at least one each, at most its cap.

    Args:
        per_block_s: [r, k] what a block costs with each unit; of equal ones the first is filled.
        caps: [r, k], at least 1.
        n_blocks: [r] or one for all rows; from k up to all caps together.
    """
    order = np.argsort(per_block_s, axis=1, kind="stable")
    more = np.take_along_axis(caps, order, axis=1) - 1
    before = np.cumsum(more, axis=1) - more
    left = np.asarray(n_blocks).reshape(-1, 1) - caps.shape[1]
    n = np.empty_like(caps)
    np.put_along_axis(n, order, 1 + np.clip(left - before, 0, more), axis=1)
    return n


def caps_within(limit_s: Floats, fixed_s: Floats, per_block_s: Floats, caps: Ints) -> Ints:
    """The most blocks, up to `caps`, with `fixed_s + n * per_block_s <= limit_s`, to the bit."""
    with np.errstate(invalid="ignore"):
        n = np.floor((limit_s - fixed_s) / per_block_s)
    n = np.clip(np.where(np.isnan(n), 0, n), 0, caps).astype(np.int64)
    n += (n < caps) & (fixed_s + (n + 1) * per_block_s <= limit_s)
    n -= (n > 0) & (fixed_s + n * per_block_s > limit_s)
    return n
