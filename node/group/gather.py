"""One small number of each member, told to the hub."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .all_reduce import AllReduce


def gather(reduce: AllReduce, value: int, epoch: int) -> Sequence[int]:
    """At the hub every member's value (below 2^24), in order; nothing elsewhere.

    Raises:
        ReduceAborted: somebody's did not come.
    """
    shape = (1, reduce.n_members)
    own = np.zeros(shape, np.float32)
    own[0, reduce.rank] = value
    found = reduce.reduce(own, shape, epoch=epoch)
    # What a spoke says is its own business; it must be a number.
    return [] if found is None else np.nan_to_num(found[0], nan=0.0).astype(np.int64).tolist()
