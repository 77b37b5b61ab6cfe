"""Contests: several engines do the same work in turn, and what counts is the ratio of a round.

Each contestant is a process of its own, because two builds of one library cannot be loaded
together. One computes while all others wait for a line on their standard input. Whatever else
the machine does moves the speeds of a round together, and their ratio hardly.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Self

REST_S = 0.03  # after a turn, until the last one's threads have stopped spinning
SCREENING = 2  # rounds after which a candidate that is far behind leaves
FAR_BEHIND = 0.75  # of the best candidate's speed

Turn = Callable[[], float]  # does its work once; returns units per second


class ContestantFailed(Exception):
    """A contestant could not do its work; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a child process is: which engine on which file, with how many threads."""

    engine: str  # a key of `contestants.ENGINES`
    path: str = ""
    threads: int = 1
    n_tokens: int = 0  # room for a sequence
    n_sequences: int = 1
    library: str = ""  # the folder of llama.cpp's Python package, or a compiled library
    flash: int = -1  # llama.cpp's flash attention: 0 off, 1 on, -1 as it likes
    unified: bool = True  # llama.cpp's one KV buffer for all sequences
    isa: str = ""  # the instruction set that the native engine is told to use
    cpus: tuple[int, ...] = ()  # the only ones it may run on; none named: all


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One turn's work; a field that a kind of work does not use stays as it is."""

    kind: str  # decode, prefill, batch, read, burn, rest
    n_tokens: int = 0  # decode steps, tokens of a prompt
    depth: int = 0  # positions before the first decode step
    chunk: int = 0  # tokens per forward call of our prefill; 0: as the node does it
    n_sequences: int = 1


class Child:
    """A contestant's process, from its construction to `close`."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        environment = dict(os.environ)
        if spec.isa:
            environment["COVEY_KERNELS"] = spec.isa
        # Its standard error; lives as long as the process.
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.contestants", json.dumps(asdict(spec))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env=environment,
        )
        self.facts: dict[str, Any] | None = None

    def call(self, task: Task) -> float:
        """Have it work; returns units per second.

        Raises:
            ContestantFailed: it refused, or its process ended.
        """
        if self.facts is None:
            self.facts = self._answer()
        try:
            json.dump(asdict(task), self._to)
            self._to.write("\n")
            self._to.flush()
        except BrokenPipeError:
            raise ContestantFailed(self._last_words()) from None
        answer = self._answer()
        time.sleep(REST_S)
        return float(answer["speed"])

    def turn(self, **task: Any) -> Turn:
        """A turn that does the same work each time."""
        return lambda: self.call(Task(**task))

    @property
    def weight_bytes(self) -> int:
        """What it reads per decoded token; after its first turn only."""
        return int((self.facts or {}).get("weight_bytes", 0))

    def _answer(self) -> dict[str, Any]:
        line = self._from.readline()
        if not line:
            raise ContestantFailed(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"its process ended with status {status}"

    @property
    def _to(self) -> Any:
        return self._process.stdin

    @property
    def _from(self) -> Any:
        return self._process.stdout

    def close(self) -> None:
        """End it; again does nothing."""
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):  # what it was not there to read
            self._to.close()
        self._from.close()
        self._complaints.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(slots=True)
class Contest:
    """What was measured: speeds by contestant, one of each round; and who could not take part."""

    speeds: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)  # who was far behind, and its speed

    def speed(self, name: str) -> float:
        """Median of a contestant's rounds."""
        return statistics.median(self.speeds[name])

    def ratio(self, name: str, others: Iterable[str]) -> float | None:
        """Median of per-round ratios, over that one of `others` that leaves the least of it.

        None if `name` could not take part, or one of `others`: it might have been the best.
        """
        others = [other for other in others if other not in self.left]
        if not others or {name, *others} - set(self.speeds):
            return None
        return min(
            statistics.median(
                ours / its for ours, its in zip(self.speeds[name], self.speeds[other], strict=True)
            )
            for other in others
        )

    def best(self, names: Iterable[str]) -> str:
        """Whose median is the highest."""
        return max((name for name in names if name in self.speeds), key=self.speed)


def hold(
    turns: Mapping[str, Turn],
    rounds: int,
    *,
    candidates: Sequence[Collection[str]] = (),
    screening: int = SCREENING,
    on_turn: Callable[[str], None] = lambda _: None,
) -> Contest:
    """Let everybody work in turn, `rounds` times, after one round that warms up.

    Args:
        turns: by name of the contestant.
        rounds: that are measured.
        candidates: groups of whom only the best matters; those far behind leave.
        screening: rounds after which they do; 0: after the one that warms up.
        on_turn: told who is next.
    """
    result = Contest()
    for round_idx in range(-1, rounds):
        if round_idx == screening:
            for group in candidates:
                _screen(result, group)
        if round_idx == 0:
            result.speeds = {name: [] for name in result.speeds}
        for name, turn in turns.items():
            if name in result.failures or name in result.left:
                continue
            on_turn(name)
            try:
                result.speeds.setdefault(name, []).append(turn())
            except ContestantFailed as failed:
                result.failures[name] = str(failed)
                result.speeds.pop(name, None)
    return result


def _screen(result: Contest, group: Collection[str]) -> None:
    fastest = {name: max(result.speeds[name]) for name in group if name in result.speeds}
    for name, speed in fastest.items():
        if speed < FAR_BEHIND * max(fastest.values()):
            result.left[name] = speed
            del result.speeds[name]
