"""How fast this device runs blocks, measured through the engine that will run them.

The planner needs seconds, not FLOPs: a figure from another kernel would be off by factors.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .generate import PREFILL_CHUNK
from .stage import Stage
from .tensors import NUMPY_DTYPES

_SESSION = "measure"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTimes:
    """Medians for one block on this device."""

    prefill_s_per_token: float  # of a full chunk
    decode_s: float  # one token of one session, behind one chunk of context


def measure_blocks(
    stage: Stage,
    *,
    rounds: int = 5,
    decode_steps: int = 8,
    clock: Callable[[], float] = time.perf_counter,
) -> BlockTimes:
    """Time `stage` on a chunk and on single tokens; leaves no session behind.

    Args:
        stage: any engine's; a few blocks are enough, and one is if it exceeds the CPU's cache.
        rounds: how often each is timed, after one round that warms up.
        decode_steps: tokens per round of decode.
        clock: seconds, monotonic.
    """
    if rounds < 1 or decode_steps < 1:
        raise ValueError(f"{rounds=}, {decode_steps=}")
    n_blocks = stage.span[1] - stage.span[0]
    # Zeros would be honest too on a CPU without denormals; ones are on all.
    one = np.float32(1.0).view(np.uint32) >> 16 if stage.dtype == "bf16" else 1.0
    shape = (PREFILL_CHUNK, stage.hidden_size)
    hidden = np.full(shape, one, NUMPY_DTYPES[stage.dtype])
    prefill: list[float] = []
    decode: list[float] = []
    stage.open_session(_SESSION, PREFILL_CHUNK + decode_steps)
    try:
        for _ in range(rounds + 1):
            began_at = clock()
            stage.forward(_SESSION, 0, hidden)
            filled_at = clock()
            for step in range(decode_steps):
                stage.forward(_SESSION, PREFILL_CHUNK + step, hidden[:1])
            decode.append((clock() - filled_at) / decode_steps)
            prefill.append(filled_at - began_at)
    finally:
        stage.close_session(_SESSION)
    return BlockTimes(
        prefill_s_per_token=statistics.median(prefill[1:]) / PREFILL_CHUNK / n_blocks,
        decode_s=statistics.median(decode[1:]) / n_blocks,
    )
