"""A tensor-parallel group in one process: the driver that adds the partial sums up."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from covey.node.engine.errors import EngineError
from covey.node.engine.shard import Shard, Slice
from covey.node.engine.stage import Step, StepResult


def slices(*shares: tuple[int, int]) -> list[Slice]:
    """Members in rank order, each with so many KV heads and MLP columns."""
    heads = pairwise(accumulate((share[0] for share in shares), initial=0))
    columns = pairwise(accumulate((share[1] for share in shares), initial=0))
    return [Slice(*each) for each in zip(heads, columns, strict=True)]


class ShardGroup:
    """Shards of one span that behave like a stage; sums are in float32, in rank order."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = shards
        self.span = shards[0].span

    def open_session(self, session: str, n_tokens: int, prefix: Sequence[bytes] = ()) -> int:
        return min(shard.open_session(session, n_tokens, prefix) for shard in self.shards)

    def close_session(self, session: str) -> None:
        for shard in self.shards:
            shard.close_session(session)

    def begin(self, steps: Sequence[Step]) -> list[EngineError | None]:
        """What all of them answer; it is the same, or this raises AssertionError."""
        answers = [shard.begin(steps) for shard in self.shards]
        for other in answers[1:]:
            assert [repr(error) for error in other] == [repr(error) for error in answers[0]]
        return answers[0]

    def through(self, hidden: Any, n_halves: int | None = None) -> Any:
        """Hidden states behind so many halves of blocks; all of them by default."""
        halves = [
            (half, block_idx) for block_idx in range(*self.span) for half in ("attention", "mlp")
        ]
        for half, block_idx in halves[:n_halves]:
            total = as_floats(hidden)
            for shard in self.shards:
                part = getattr(shard, half)(block_idx, hidden)
                if part is not None:
                    total = total + as_floats(part)
            hidden = total if hidden.dtype == np.float32 else as_bf16(total)
        return hidden

    def end(self, *, is_done: bool) -> None:
        for shard in self.shards:
            shard.end(is_done=is_done)

    def forward_batch(self, steps: Sequence[Step]) -> list[StepResult]:
        answers = self.begin(steps)
        ready = [step for step, error in zip(steps, answers, strict=True) if error is None]
        if not ready:
            return [error for error in answers if error]
        out = self.through(np.concatenate([step.hidden for step in ready]))
        self.end(is_done=True)
        ends = accumulate((len(step.hidden) for step in ready), initial=0)
        rows = iter([out[start:end] for start, end in pairwise(ends)])
        return [error or next(rows) for error in answers]

    def forward(self, session: str, position: int, hidden: Any) -> Any:
        [result] = self.forward_batch([Step(session, position, hidden)])
        if isinstance(result, EngineError):
            raise result
        return result


def as_floats(hidden: Any) -> Any:
    """Float32, whatever the engine's dtype; a copy."""
    if hidden.dtype == np.float32:
        return hidden.copy()
    return (hidden.astype(np.uint32) << 16).view(np.float32)


def as_bf16(values: Any) -> Any:
    """The bits of bfloat16, rounded to the nearest."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
