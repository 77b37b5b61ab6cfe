"""How fast this device runs blocks, measured through the engine that will run them.

The planner needs seconds, not FLOPs: a figure from another kernel would be off by factors. Every
figure is the median of rounds that take each kind of step in turn, so that a machine that slows
down or gets busy meanwhile spoils all of them alike; one sample is the mean of some steps, because
a paced engine (`kernels/pacer.py`) makes up in one step for what it slept too long in another.

In use, a token passes all blocks of a span and the head before it comes to the first block again,
and few devices have caches for so much. Decode is therefore timed on so many blocks that they fit
no cache. Chunks of a prompt, and what depth adds, take too long there: these are timed on a few
blocks, which would fit a desktop's cache, with cold caches before each step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .stage import Stage, Step
from .tensors import NUMPY_DTYPES, HiddenStates

EVICTED_BYTES = 64 << 20  # read before each timed step: more than most caches hold
SHALLOW = 4  # positions behind which decode is timed, on its own and in batches
SAMPLE_S = 0.02  # what one sample should last at least,
MAX_STEPS = 8  # in not more steps than that
MIN_ROUNDS, MAX_ROUNDS = 2, 7
FILL_S = 0.4  # the longest to prefill what one deep session attends to
DEPTHS = (1024, 512, 256, 128)

K = TypeVar("K", bound=Hashable)

Progress = Callable[[float], None]  # told which share is done, from 0 to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTimes:
    """Seconds of one block on this device."""

    decode_s: float  # one token of one session, at the beginning of a text
    batch_decode_s: tuple[float, ...]  # a whole batch of single tokens, of each size asked for
    depth_s: float  # what each position of context adds to a token
    prefill_s: tuple[tuple[int, float], ...]  # (tokens of a chunk, seconds), rising

    @property
    def prefill_s_per_token(self) -> float:
        """In the longest chunk that was timed."""
        n_tokens, seconds = self.prefill_s[-1]
        return seconds / n_tokens


def time_in_turn(
    works: Mapping[K, Callable[[], object]],
    *,
    budget_s: float,
    before: Callable[[K], object] = lambda _: None,
    progress: Progress = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[K, float]:
    """Median seconds of each of `works`, taken in turn until `budget_s` is over.

    Each is done once more before, to warm up; there are `MIN_ROUNDS` whatever they take. `before`
    is called with its key ahead of each time that one is done, and not timed.
    """

    def sample(key: K, n_steps: int) -> float:
        took_s, work = 0.0, works[key]
        for _ in range(n_steps):
            before(key)
            began_at = clock()
            work()
            took_s += clock() - began_at
        return took_s / n_steps

    began_at = clock()
    n_steps: dict[K, int] = {}
    for key in works:
        first_s = sample(key, 1)
        n_steps[key] = max(1, min(MAX_STEPS, round(SAMPLE_S / max(first_s, 1e-9))))
    samples: dict[K, list[float]] = {key: [] for key in works}
    for n_rounds in range(1, MAX_ROUNDS + 1):
        for key in works:
            samples[key].append(sample(key, n_steps[key]))
        spent_s = clock() - began_at
        progress(min(1.0, max(n_rounds / MAX_ROUNDS, spent_s / max(budget_s, 1e-9))))
        if n_rounds >= MIN_ROUNDS and spent_s >= budget_s:
            break
    return {key: statistics.median(values) for key, values in samples.items()}


def measure_blocks(
    stage: Stage,
    few: Stage,
    *,
    context_length: int,
    batches: Sequence[int] = (2, 4, 8),
    chunks: Sequence[int] = (16, 64, 128),
    budget_s: float = 2.0,
    progress: Progress = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> BlockTimes:
    """Time single tokens on `stage`, chunks on `few`; leaves no session behind.

    Args:
        stage: any engine's; of so many blocks that they do not fit the CPU's cache.
        few: the same engine's, of a few blocks; may be `stage` itself.
        context_length: of the model; nothing is timed beyond it.
        batches: sizes of batches, rising.
        chunks: tokens of prefill chunks, rising.
        budget_s: after so long no other round begins; there are `MIN_ROUNDS` whatever they take.
        progress: told how far it is.
        clock: seconds, monotonic.
    """
    chunks = [n_tokens for n_tokens in chunks if n_tokens <= context_length] or [context_length]
    cool = cold_caches()
    bench = _Bench(stage, few, max(batches), max(chunks), min(SHALLOW, context_length - 1))
    try:
        depth = bench.dig(context_length, clock)
        progress(0.2)
        took_s = time_in_turn(
            bench.works(batches, chunks),
            budget_s=budget_s,
            before=lambda name: None if name[0] == "decode" else cool(),
            progress=lambda share: progress(0.2 + 0.8 * share),
            clock=clock,
        )
    finally:
        bench.close()
    per_block = {
        name: seconds / _n_blocks(stage if name[0] == "decode" else few)
        for name, seconds in took_s.items()
    }
    gained = per_block["deep", 1] - per_block["shallow", 1]
    depth_s = max(0.0, gained / max(1, depth - bench.shallow))
    # What the few positions before the timed ones take is left out, but no more than half.
    attention_s = depth_s * bench.shallow
    decode_s, *batch_decode_s = rising(
        [
            max(per_block["decode", n] - attention_s * n, per_block["decode", n] / 2)
            for n in (1, *batches)
        ]
    )
    return BlockTimes(
        decode_s=decode_s,
        batch_decode_s=tuple(batch_decode_s),
        depth_s=depth_s,
        prefill_s=tuple((n_tokens, per_block["prefill", n_tokens]) for n_tokens in chunks),
    )


def _n_blocks(stage: Stage) -> int:
    return stage.span[1] - stage.span[0]


def cold_caches() -> Callable[[], object]:
    """What has to be called before a step, so that it finds nothing in the CPU's caches."""
    ballast = np.zeros(EVICTED_BYTES, np.uint8)
    ballast.fill(1)  # or all its pages would be one
    words = ballast.view(np.uint64)
    return lambda: words.max()


def rising(values: Sequence[float]) -> list[float]:
    """The nearest values that never fall: where they do by noise, their mean takes their place."""
    pools: list[tuple[float, int]] = []  # (mean, how many)
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (mean, n), (other, m) = pools.pop(), pools.pop()
            pools.append(((mean * n + other * m) / (n + m), n + m))
    return [mean for mean, n in pools for _ in range(n)]


class _Bench:
    """Sessions to take steps in: some shallow ones, one that is filled, one that gets deep."""

    def __init__(self, stage: Stage, few: Stage, n_sessions: int, chunk: int, shallow: int) -> None:
        self.shallow = shallow
        self._stage, self._few = stage, few
        # Zeros would be honest too on a CPU without denormals; ones are on all.
        one = np.float32(1.0).view(np.uint32) >> 16 if stage.dtype == "bf16" else 1.0
        self._rows: HiddenStates = np.full(
            (max(chunk, shallow), stage.hidden_size), one, NUMPY_DTYPES[stage.dtype]
        )
        self._names = [f"measure-{idx}" for idx in range(n_sessions)]
        self._shallow, self._filled = "measure-shallow", "measure-chunk"
        self._deep, self._depth = "measure-deep", 0
        for name in self._names:
            stage.open_session(name, shallow + 1)
            stage.forward(name, 0, self._rows[:shallow])
        few.open_session(self._shallow, shallow + 1)
        few.forward(self._shallow, 0, self._rows[:shallow])
        few.open_session(self._filled, chunk)

    def works(
        self, batches: Sequence[int], chunks: Sequence[int]
    ) -> dict[tuple[str, int], Callable[[], object]]:
        """Everything that is timed, by kind and number; `dig` comes first."""
        return {
            **{("decode", n): self._decode(n) for n in (1, *batches)},
            **{("prefill", n): self._prefill(n) for n in chunks},
            ("shallow", 1): lambda: self._few.forward(self._shallow, self.shallow, self._rows[:1]),
            ("deep", 1): self._decode_deep,
        }

    def dig(self, context_length: int, clock: Callable[[], float]) -> int:
        """Fill one session as deep as time allows; the positions that its steps attend to."""
        chunk, room = len(self._rows), context_length - 1
        self._prefill(chunk)()  # warms up
        began_at = clock()
        self._prefill(chunk)()
        most = chunk * FILL_S / max(clock() - began_at, 1e-9)
        depth = next((n for n in DEPTHS if n <= min(room, most)), min(DEPTHS[-1], room))
        self._few.open_session(self._deep, depth + 1)
        for position in range(0, depth, chunk):
            self._few.forward(self._deep, position, self._rows[: min(chunk, depth - position)])
        self._depth = depth
        return depth

    def close(self) -> None:
        """Leave no session behind."""
        for name in self._names:
            self._stage.close_session(name)
        for name in (self._shallow, self._filled, self._deep):
            self._few.close_session(name)

    def _decode(self, n: int) -> Callable[[], object]:
        row, names = self._rows[:1], self._names[:n]
        steps = [Step(name, self.shallow, row) for name in names]
        return lambda: self._stage.forward_batch(steps)

    def _decode_deep(self) -> object:
        return self._few.forward(self._deep, self._depth, self._rows[:1])

    def _prefill(self, n_tokens: int) -> Callable[[], object]:
        return lambda: self._few.forward(self._filled, 0, self._rows[:n_tokens])
