"""What a step costs on this node beside its computation: framing, checks, changes of thread.

Measured by sending frames through everything they pass on a node, but for the link itself: that is
in the round-trip time of the links.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable

import numpy as np

from covey.transport.codec import decode_frame, encode_frame
from covey.transport.frame import Frame
from covey.transport.messages import Forward, StageTrace

from .batching import Batcher
from .engine.stage import Stage, Step
from .engine.tensors import NUMPY_DTYPES, HiddenStates
from .hidden import pack, unpack
from .worker import Worker

N_STEPS = 48
N_WARM = 8
_SESSION = "measure-step"


def step_overhead_s(stage: Stage, *, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that a step of one token takes on its way through this node, its compute apart.

    Runs an event loop of its own: not for a thread that has one.
    """
    stage.open_session(_SESSION, 1)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            times = runner.run(_steps(stage, clock))
    finally:
        stage.close_session(_SESSION)
    return max(0.0, statistics.median(times[N_WARM:]))


async def _steps(stage: Stage, clock: Callable[[], float]) -> list[float]:
    worker = Worker("covey-measure")
    batcher: Batcher[Step, HiddenStates] = Batcher(worker, stage.forward_batch)
    out: HiddenStates = np.zeros((1, stage.hidden_size), NUMPY_DTYPES[stage.dtype])
    times: list[float] = []
    try:
        for idx in range(N_WARM + N_STEPS):
            began_at = clock()
            hidden = _over_a_border(out, stage, idx)
            # As a step that is too long for the loop's own thread: a short one costs less.
            done = await batcher.submit(_SESSION, Step(_SESSION, 0, hidden))
            times.append(clock() - began_at - done.compute_s)
            out = done.value
    finally:
        worker.close()
    return times


def _over_a_border(hidden: HiddenStates, stage: Stage, step: int) -> HiddenStates:
    """Framed as it leaves one node, and read as the next one does."""
    message = Forward(
        session=_SESSION,
        epoch=1,
        stage_idx=1,
        step=step,
        position=0,
        n_return=1,
        trace=[StageTrace(0, 0, 0)],
    )
    tensors = {"hidden": pack(hidden, stage.dtype, "exact")}
    header, buffers = encode_frame(Frame(message=message, tensors=tensors))
    frame = decode_frame(header, b"".join(buffers))
    return unpack(
        frame.tensors["hidden"], stage.dtype, "exact", hidden_size=stage.hidden_size, max_tokens=1
    )


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Of the loop that nodes run on, where it exists."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
