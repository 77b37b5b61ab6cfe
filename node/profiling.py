"""What this device can do, measured through the engine that will run.

A device's figures are kept in its home, keyed by everything that could change them, so a
restart is instant. What is not a property of the machine, its spare memory and what else runs on
it, is looked at each time.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace

import psutil

from covey import __version__
from covey.partition.errors import PartitionError
from covey.partition.profile import BATCHES, DeviceProfile

from .catalog import LocalModel
from .config import NodeConfig
from .disk import disk_read_speed
from .engine.measure import Progress, cold_caches, measure_blocks, rising, time_in_turn
from .engine.shard import Slice
from .engine.stage import Stage, Step
from .head_batch import NextToken, sample_all
from .home import Home
from .model.sampling import Sampler, SamplingParams
from .overhead import step_overhead_s

MEASURES = 5  # counts what is measured here, and how: figures of another are not used
MANY_BYTES = 64 << 20  # of blocks: more than most caches hold
FEW_BYTES = 8 << 20  # enough that no step is over in no time
MIN_BLOCKS = 2
SPARE_MEMORY = 0.7  # of what is free now: the machine has an owner who uses it
BLOCKS_BUDGET_S = 1.5
HEAD_BUDGET_S = 0.5
SPLIT_BUDGET_S = 0.3
BUSY_LOOK_S = 0.15


def device_profile(
    model: LocalModel,
    config: NodeConfig,
    peer_id: str,
    home: Home,
    *,
    progress: Progress = lambda _: None,
) -> DeviceProfile:
    """Measure this device on one model, or recall what was measured; takes a few seconds.

    Runs the engine: call it on a worker. `progress` is told there how far it is.
    """
    key = _cache_key(model)
    kept = home.load("profile.json") or {}
    known = _recall(kept.get(key), model)
    if known is None:
        known = _measure(model, peer_id, progress)
        home.save("profile.json", {**kept, key: known.to_value()})
    budget = config.memory_bytes
    if budget is None:
        budget = int(psutil.virtual_memory().available * SPARE_MEMORY)
    progress(1.0)
    return replace(
        known,
        peer_id=peer_id,
        memory_bytes=budget,
        max_blocks=config.max_blocks,
        n_cores=model.threads,
        busy_share=busy_share(model.threads, look_s=BUSY_LOOK_S),
    )


def _recall(value: object, model: LocalModel) -> DeviceProfile | None:
    try:
        known = DeviceProfile.from_value(value)
    except PartitionError:
        return None
    return known if (known.model_digest, known.engine) == (model.digest, model.engine) else None


def _measure(model: LocalModel, peer_id: str, progress: Progress) -> DeviceProfile:
    checkpoint = model.checkpoint
    stage = model.load_stage(
        (0, _n_measured(model, MANY_BYTES)), on_block=lambda done, of: progress(0.3 * done / of)
    )
    few = model.load_stage((0, _n_measured(model, FEW_BYTES)))
    blocks = measure_blocks(
        stage,
        few,
        context_length=checkpoint.config.context_length,
        batches=BATCHES,
        budget_s=BLOCKS_BUDGET_S,
        progress=lambda share: progress(0.3 + 0.5 * share),
    )
    step_s = step_overhead_s(model.load_stage((0, 1)))
    progress(0.85)
    head_s, *batch_head_s = (seconds + step_s for seconds in _head_times(model, few))
    progress(0.95)
    return DeviceProfile(
        peer_id=peer_id,
        model_digest=model.digest,
        engine=model.engine,
        decode_s_per_block=blocks.decode_s,
        prefill_s_per_token_per_block=blocks.prefill_s_per_token,
        head_s=head_s,
        memory_bytes=0,
        disk_bytes_per_s=disk_read_speed(checkpoint.path),
        measured_at=time.time(),
        batch_decode_s_per_block=blocks.batch_decode_s,
        batch_head_s=tuple(batch_head_s),
        depth_s_per_block=blocks.depth_s,
        prefill_s_per_block=blocks.prefill_s,
        step_s=step_s,
        split_s_per_block=_split_s_per_block(model, few),
    )


def _split_s_per_block(model: LocalModel, few: Stage) -> float:
    """What a token's block takes longer in two halves, as members of groups run it, sums apart."""
    layout, session = model.layout, "measure-split"
    if not layout.can_split:
        return 0.0
    whole = Slice((0, layout.n_kv_heads), (0, layout.mlp_columns))
    shard = model.load_shard(few.span, whole)
    row = model.head.embed([0])
    step = Step(session, 0, row)

    def in_halves() -> None:
        shard.begin([step])
        for block_idx in range(*shard.span):
            shard.attention(block_idx, row)
            shard.mlp(block_idx, row)
        shard.end(is_done=True)

    cool = cold_caches()
    for each in (few, shard):
        each.open_session(session, 1)
    try:
        times = time_in_turn(
            {"whole": lambda: few.forward(session, 0, row), "halves": in_halves},
            budget_s=SPLIT_BUDGET_S,
            before=lambda _: cool(),
        )
    finally:
        for each in (few, shard):
            each.close_session(session)
    return max(0.0, times["halves"] - times["whole"]) / (shard.span[1] - shard.span[0])


def _n_measured(model: LocalModel, n_bytes: int) -> int:
    n_blocks = model.checkpoint.config.n_blocks
    largest = max(model.layout.block_bytes)
    return min(n_blocks, max(MIN_BLOCKS, -(-n_bytes // largest)))


def _head_times(model: LocalModel, stage: Stage) -> list[float]:
    """Seconds of the head's own work for one token, and for batches of each of `BATCHES`."""
    stage.open_session("measure-head", 1)
    try:
        row = stage.forward("measure-head", 0, model.head.embed([0]))
    finally:
        stage.close_session("measure-head")
    sampler = Sampler(SamplingParams(), model.head.vocab_size)
    wish = NextToken(row, sampler, (0,), is_last=False)

    def work(n: int) -> Callable[[], object]:
        return lambda: sample_all(model, [wish] * n)

    cool = cold_caches()
    times = time_in_turn(
        {n: work(n) for n in (1, *BATCHES)}, budget_s=HEAD_BUDGET_S, before=lambda _: cool()
    )
    return rising([times[n] for n in (1, *BATCHES)])


def busy_share(n_cores: int, *, look_s: float) -> float:
    """Of `n_cores` that an engine wants, the share that other processes keep it from now."""
    ours = psutil.Process()
    before, own = psutil.cpu_times(), _cpu_s(ours)
    time.sleep(look_s)
    after = psutil.cpu_times()
    own = _cpu_s(ours) - own
    idle_s = after.idle - before.idle + getattr(after, "iowait", 0) - getattr(before, "iowait", 0)
    n_all = psutil.cpu_count() or 1
    n_busy = n_all * (1 - min(1.0, max(0.0, idle_s / (n_all * look_s)))) - own / look_s
    n_missing = n_busy - (n_all - n_cores)  # others take the cores first that we do not want
    return min(1.0, max(0.0, n_missing / n_cores))


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _cache_key(model: LocalModel) -> str:
    parts = (
        *(__version__, MEASURES, model.digest, model.engine),
        *(model.threads, model.speed, psutil.cpu_count()),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()
