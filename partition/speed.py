"""What one device takes for one step of its work, in seconds, from what it was measured to do.

Pure functions of a profile. Where a profile says nothing of batches, depth or chunks, its two plain
figures stand for them: a batch then takes as long as its sessions one after the other.

`busy_share` is in none of these: a device is measured, and measured again as it serves, while
others use it, so its seconds have their share in them already.

Every result is rounded to a grid of 2^-40 s (0.9 ps). Sums of grid values below 8192 s are exact in
a float, so the order of adding them cannot matter and every member computes the same bits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from .profile import STEP_BATCHES, DeviceProfile, Workload

GRID_S = 2.0**-40

#: Positions of a chunk look back together, so each pays for depth only so much of what a token of
#: its own does. From 0.07 to 0.37 on our kernels, chunks of 128 behind 1920 positions.
PREFILL_DEPTH_SHARE = 0.2

Steps = tuple[float, ...]  # seconds of a whole step of each of STEP_BATCHES sessions


def on_grid(seconds: float) -> float:
    """Round to a multiple of `GRID_S`."""
    return round(seconds / GRID_S) * GRID_S


def block_step_s(device: DeviceProfile, n_sessions: int, depth: int = 0) -> float:
    """Seconds that a token of each of `n_sessions` takes through one block, all together.

    Between the batches that were measured it lies on a straight line, and beyond them on the last.

    Args:
        device: whose block it is, the whole of it.
        n_sessions: in the batch, one token of each.
        depth: positions that each of them looks back on.
    """
    weights_s = _of_batch(device.decode_s_per_block, device.batch_decode_s_per_block, n_sessions)
    return on_grid(weights_s + n_sessions * depth * device.depth_s_per_block)


def block_steps_s(device: DeviceProfile, request: Workload) -> Steps:
    """`block_step_s` of each of `STEP_BATCHES`, at the depth of an ordinary reply."""
    return tuple(block_step_s(device, batch, request.depth) for batch in STEP_BATCHES)


def head_step_s(device: DeviceProfile, n_sessions: int) -> float:
    """Seconds of embedding, final norm, logits and sampling for a token of each session."""
    return on_grid(_of_batch(device.head_s, device.batch_head_s, n_sessions))


def head_steps_s(device: DeviceProfile) -> Steps:
    """`head_step_s` of each of `STEP_BATCHES`."""
    return tuple(head_step_s(device, batch) for batch in STEP_BATCHES)


def chunk_s_per_block(device: DeviceProfile, request: Workload) -> float:
    """Seconds of one prefill chunk of `request` in one block: the mean of all its chunks."""
    return on_grid(prefill_s(device, request.chunk_tokens) + chunk_depth_s(device, request))


def chunk_depth_s(device: DeviceProfile, request: Workload) -> float:
    """Of `chunk_s_per_block`, what looking back on the chunks before adds; measured are first
    ones."""
    depth = (request.n_chunks - 1) / 2 * request.chunk_tokens
    return PREFILL_DEPTH_SHARE * request.chunk_tokens * depth * device.depth_s_per_block


def prefill_s(device: DeviceProfile, n_tokens: float) -> float:
    """Seconds that `n_tokens` of one prompt, run at once, take through one block.

    Between the chunks that were measured it lies on a straight line, of which a decode step is
    the near end; longer ones take in proportion to the longest.
    """
    chunks = device.prefill_s_per_block
    if not chunks:
        return on_grid(device.prefill_s_per_token_per_block * n_tokens)
    longest, longest_s = chunks[-1]
    if n_tokens >= longest:
        return on_grid(longest_s * n_tokens / longest)
    step = (1, device.decode_s_per_block)
    points = [*chunks] if chunks[0][0] == 1 else [step, *chunks]
    return on_grid(_interpolated(points, n_tokens))


def step_overhead_s(device: DeviceProfile) -> float:
    """What each step takes beside its blocks, on the grid."""
    return on_grid(device.step_s)


def _of_batch(alone_s: float, batches_s: Sequence[float], n_sessions: int) -> float:
    if not batches_s:
        return alone_s * n_sessions
    points = list(zip(STEP_BATCHES, (alone_s, *batches_s), strict=True))
    return _interpolated(points, n_sessions)


def _interpolated(points: Sequence[tuple[int, float]], x: float) -> float:
    """On the straight line between the points around x; the outer ones go on beyond the ends.

    Never less than a third of the nearest point, whatever noise has made of the lines.
    """
    after = min(max(bisect_left([point[0] for point in points], x), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    if x == x0:
        return y0
    if x == x1:
        return y1
    return max(y0 + (y1 - y0) * (x - x0) / (x1 - x0), min(y0, y1) / 3)
