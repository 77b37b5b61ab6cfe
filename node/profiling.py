"""What this device can do, measured through the engine and links that will run.

A device's figures are kept in its home, keyed by everything that could change them, so a
restart is instant.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from covey import __version__
from covey.partition.profile import DeviceProfile

from .catalog import LocalModel
from .config import NodeConfig
from .engine.measure import measure_blocks
from .home import Home

N_MEASURED_BLOCKS = 2  # together larger than most caches, and read in well under a second
SPARE_MEMORY = 0.7  # of what is free now: the machine has an owner who uses it
READ_BYTES = 32 << 20  # of the model's file, to time the disk with


def device_profile(
    model: LocalModel, config: NodeConfig, peer_id: str, home: Home
) -> DeviceProfile:
    """Measure this device on one model, or recall what was measured; takes a few seconds.

    Runs the engine: call it on a worker.
    """
    key = _cache_key(model)
    known = home.load("profile.json") or {}
    figures: dict[str, float] = known[key] if _is_usable(known.get(key)) else {}
    if not figures:
        figures = _measure(model)
        home.save("profile.json", {**known, key: figures})
    budget = config.memory_bytes
    if budget is None:
        budget = int(psutil.virtual_memory().available * SPARE_MEMORY)
    return DeviceProfile(
        peer_id=peer_id,
        model_digest=model.digest,
        engine=model.engine,
        decode_s_per_block=figures["decode_s_per_block"],
        prefill_s_per_token_per_block=figures["prefill_s_per_token_per_block"],
        head_s=figures["head_s"],
        memory_bytes=budget,
        disk_bytes_per_s=figures["disk_bytes_per_s"],
        max_blocks=config.max_blocks,
        measured_at=figures["measured_at"],
    )


_FIGURES = (
    "decode_s_per_block",
    "prefill_s_per_token_per_block",
    "head_s",
    "disk_bytes_per_s",
    "measured_at",
)


def _is_usable(figures: object) -> bool:
    return isinstance(figures, dict) and all(
        isinstance(figures.get(name), float) and figures[name] > 0 for name in _FIGURES
    )


def _measure(model: LocalModel) -> dict[str, float]:
    checkpoint = model.checkpoint
    n_blocks = min(N_MEASURED_BLOCKS, checkpoint.config.n_blocks)
    stage = model.load_stage((0, n_blocks))
    blocks = measure_blocks(stage)
    head = model.head
    return {
        "decode_s_per_block": blocks.decode_s,
        "prefill_s_per_token_per_block": blocks.prefill_s_per_token,
        "head_s": _median_s(lambda: head.logits(head.embed([0]))),
        "disk_bytes_per_s": _read_speed(checkpoint.path),
        "measured_at": time.time(),
    }


def _median_s(work: Callable[[], object], rounds: int = 5) -> float:
    times: list[float] = []
    for _ in range(rounds):
        began_at = time.perf_counter()
        work()
        times.append(time.perf_counter() - began_at)
    return statistics.median(times)


def _read_speed(path: Path) -> float:
    """Bytes per second of reading the model's file as it is now, cached by the system or not."""
    began_at = time.perf_counter()
    with path.open("rb") as file:
        n_read = len(file.read(READ_BYTES))
    return max(1.0, n_read / max(time.perf_counter() - began_at, 1e-9))


def _cache_key(model: LocalModel) -> str:
    parts = (
        *(__version__, model.digest, model.engine),
        *(model.threads, model.speed, psutil.cpu_count()),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()
