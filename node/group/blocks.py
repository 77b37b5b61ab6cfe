"""A span of blocks, computed together: after each half every member's part is added up."""

from __future__ import annotations

from time import perf_counter

import numpy as np

from covey.node.engine.shard import Shard

from .all_reduce import AllReduce
from .codec import Floats


def run_blocks(shard: Shard, hidden: Floats, reduce: AllReduce, epoch: int) -> float:
    """Take `hidden` [n_rows, hidden_size] through all blocks, in place, as every member does.

    `shard.begin` has accepted the rows; here their step is brought to its end. It counts as done
    too when only the last sum is missing: all keys and values are there then, and another member
    may have got that sum. So no session is shorter at a spoke than at the hub.

    Returns:
        Seconds that the sums took, waiting for other members included.

    Raises:
        ReduceAborted: a sum did not come about.
    """
    shape = (len(hidden), shard.hidden_size)
    is_done, sums_s = False, 0.0

    def add(part: Floats | None) -> None:
        nonlocal sums_s
        began_at = perf_counter()
        np.add(hidden, reduce.sum(part, shape, epoch=epoch), out=hidden)
        sums_s += perf_counter() - began_at

    try:
        for block_idx in range(*shard.span):
            add(shard.attention(block_idx, hidden))
            part = shard.mlp(block_idx, hidden)
            is_done = block_idx == shard.span[1] - 1
            add(part)
    finally:
        shard.end(is_done=is_done)
    return sums_s
