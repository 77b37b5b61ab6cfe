"""This device's profile, kept true while it serves: moving averages of what its own steps take.

The quick measurement at the start saw some blocks for a second or two. What a stage takes later,
with all its blocks, other people's programs and the weather in the case, corrects those figures: by
a factor for each batch of decode and of the head's work, and one for prefill. They are published
again only when one has changed by more than a tenth, and not often, since every publication costs
all members and may make them plan anew. A device that has not been used for long is what it was
measured to be.

Groups and stages that stream from disk are left out: their steps wait for more than this device
computes.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Literal

from covey.partition.profile import (
    MAX_SECONDS,
    MIN_SECONDS,
    STEP_BATCHES,
    DeviceProfile,
)
from covey.partition.speed import PREFILL_DEPTH_SHARE, block_step_s, head_step_s, prefill_s

from .engine.measure import rising

LOOK_S = 5.0
PUBLISH_EVERY_S = 30.0
NOTABLE = 0.1
FORGET_S = 3600.0  # without a step
WEIGHT = 0.3  # of a new sample in the moving average, once there are a few
SAMPLE_STEPS = 16  # decode steps that one sample is the median of; prefill chunks are longer
SAMPLE_CHUNKS = 3
MIN_CHUNK = 16  # rows; fewer are neither decode nor prefill
MAX_KEPT = 4096  # timings between two looks
LOWEST, HIGHEST = 0.1, 100.0  # factors beyond say that something else is wrong

Kind = tuple[Literal["decode", "prefill", "head"], int]  # and for how many sessions at once


@dataclass(frozen=True, slots=True)
class Timing:
    """One batch of steps on this node's engine."""

    model_digest: str
    n_blocks: int
    rows: tuple[int, ...]  # of each session
    positions: tuple[int, ...]  # where they begin
    seconds: float


@dataclass(frozen=True, slots=True)
class HeadTiming:
    """One batch of the head's own work: logits, sampling, the next embedding."""

    model_digest: str
    n_sessions: int
    seconds: float


Timings = deque[Timing | HeadTiming]


@dataclass(slots=True)
class Refinement:
    """One model's profile, and by what factors its steps differ from it. Pure."""

    base: DeviceProfile
    factors: dict[Kind, float] = field(default_factory=dict)
    _samples: dict[Kind, list[float]] = field(default_factory=dict)
    _n_samples: dict[Kind, int] = field(default_factory=dict)

    def add(self, timing: Timing | HeadTiming) -> None:
        """Take a batch into account, if its kind was measured."""
        expected = self._expected(timing)
        if expected is None or expected[1] <= 0:
            return
        kind, expected_s = expected
        samples = self._samples.setdefault(kind, [])
        samples.append(timing.seconds / expected_s)
        if len(samples) >= (SAMPLE_CHUNKS if kind[0] == "prefill" else SAMPLE_STEPS):
            sample = min(max(median(samples), LOWEST), HIGHEST)
            known = self.factors.get(kind, 1.0)
            n_before = self._n_samples.get(kind, 0)
            # Of the first ones the plain mean: what was measured at the start, when nodes are
            # busiest, is not to hold them back.
            weight = max(WEIGHT, 1 / (n_before + 1))
            self.factors[kind] = known + weight * (sample - known)
            self._n_samples[kind] = n_before + 1
            samples.clear()

    def profile(self) -> DeviceProfile:
        """The figures of `base` as they are now; of batches that nobody saw, as the nearest."""
        base, prefill = self.base, self.factors.get(("prefill", 1), 1.0)
        alone, *batches = self._refined(
            "decode", base.decode_s_per_block, *base.batch_decode_s_per_block
        )
        # A step's overhead is in each of the head's figures, and no part of what was timed.
        head, *batch_head = self._refined(
            "head", *(s - base.step_s for s in (base.head_s, *base.batch_head_s))
        )
        return replace(
            base,
            decode_s_per_block=alone,
            batch_decode_s_per_block=tuple(batches),
            head_s=_bounded(head + base.step_s),
            batch_head_s=tuple(_bounded(seconds + base.step_s) for seconds in batch_head),
            depth_s_per_block=_bounded(base.depth_s_per_block * self._factor("decode", 1), low=0.0),
            prefill_s_per_token_per_block=_bounded(base.prefill_s_per_token_per_block * prefill),
            prefill_s_per_block=tuple(
                (n_tokens, _bounded(seconds * prefill))
                for n_tokens, seconds in base.prefill_s_per_block
            ),
        )

    def forget(self) -> None:
        """What was seen until now was long ago."""
        self.factors.clear()
        self._samples.clear()
        self._n_samples.clear()

    def differs(self, published: Mapping[Kind, float]) -> bool:
        """Whether a factor is another than the published ones by more than noise."""
        kinds = self.factors.keys() | published.keys()
        return any(
            abs(self.factors.get(kind, 1.0) / published.get(kind, 1.0) - 1.0) > NOTABLE
            for kind in kinds
        )

    def _expected(self, timing: Timing | HeadTiming) -> tuple[Kind, float] | None:
        """The kind of a batch, and what it takes by `base`; None if that does not say."""
        if isinstance(timing, HeadTiming):
            seconds = head_step_s(self.base, timing.n_sessions) - self.base.step_s
            return ("head", _nearest(timing.n_sessions)), seconds
        n_sessions = len(timing.rows)
        if max(timing.rows) == 1:
            depth = round(fmean(timing.positions))
            seconds = timing.n_blocks * block_step_s(self.base, n_sessions, depth)
            return ("decode", _nearest(n_sessions)), seconds
        if n_sessions == 1 and timing.rows[0] >= MIN_CHUNK:
            rows, before = timing.rows[0], timing.positions[0]
            depth_s = PREFILL_DEPTH_SHARE * rows * before * self.base.depth_s_per_block
            return ("prefill", 1), timing.n_blocks * (prefill_s(self.base, rows) + depth_s)
        return None

    def _refined(self, work: Literal["decode", "head"], *seconds: float) -> list[float]:
        """Figures of each of `STEP_BATCHES`, or of the first alone, as they are now."""
        return rising(
            [
                _bounded(each * self._factor(work, batch))
                for batch, each in zip(STEP_BATCHES, seconds, strict=False)
            ]
        )

    def _factor(self, work: Literal["decode", "head"], batch: int) -> float:
        seen = [of for kind, of in self.factors if kind == work]
        if not seen:
            return 1.0
        return self.factors[work, min(seen, key=lambda of: (abs(of - batch), of))]


class Refining:
    """Keeps this node's own profiles true; `run` is its one loop.

    Args:
        devices: the profiles by model digest, changed in place.
        timings: what the engine's thread adds to.
        publish: called when `devices` has changed.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        devices: MutableMapping[str, DeviceProfile],
        timings: Timings,
        publish: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._devices = devices
        self._timings = timings
        self._publish = publish
        self._clock = clock
        self._models: dict[str, Refinement] = {}
        self._published: dict[str, dict[Kind, float]] = {}  # the factors, by model
        self._published_at: dict[str, float] = {}
        self._used_at: dict[str, float] = {}

    async def run(self) -> None:
        """Look every few seconds, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """Take in what the engine did since, and publish what is new."""
        now = self._clock()
        for timing in self._taken():
            digest = timing.model_digest
            if digest not in self._devices:
                continue
            if digest not in self._models:
                self._models[digest] = Refinement(self._devices[digest])
            self._models[digest].add(timing)
            self._used_at[digest] = now
        is_changed = False
        for digest, refinement in self._models.items():
            if now - self._used_at[digest] > FORGET_S:
                refinement.forget()
            is_changed |= self._refine(digest, refinement, now)
        if is_changed:
            self._publish()

    def _taken(self) -> Sequence[Timing | HeadTiming]:
        return [self._timings.popleft() for _ in range(len(self._timings))]

    def _refine(self, digest: str, refinement: Refinement, now: float) -> bool:
        published = self._published.get(digest, {})
        is_due = now - self._published_at.get(digest, -PUBLISH_EVERY_S) >= PUBLISH_EVERY_S
        device = self._devices.get(digest)
        if device is None or not is_due or not refinement.differs(published):
            return False
        self._published[digest] = dict(refinement.factors)
        self._published_at[digest] = now
        self._devices[digest] = replace(
            refinement.profile(), version=device.version + 1, measured_at=time.time()
        )
        return True


def _nearest(n_sessions: int) -> int:
    """The batch that was measured and is most like one of so many."""
    return min(STEP_BATCHES, key=lambda batch: abs(batch - n_sessions))


def _bounded(seconds: float, low: float = MIN_SECONDS) -> float:
    return min(max(seconds, low), MAX_SECONDS)
