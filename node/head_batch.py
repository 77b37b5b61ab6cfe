"""What the head does for each token of several sessions: logits, sampling, the next embedding.

The output matrix is as large as many blocks, so it too is read once for all that wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from covey.errors import CoveyError

from .batching import Batcher
from .catalog import LocalModel
from .engine.tensors import HiddenStates
from .model.sampling import SampledToken, Sampler
from .refining import HeadTiming, Timings
from .worker import Done, Worker

#: The next token and, unless it is the last, the hidden states that it begins with.
Sampled = tuple[SampledToken, HiddenStates | None]


@dataclass(frozen=True, slots=True)
class NextToken:
    """One session's wish: the token that follows `tokens`, given their last hidden states."""

    hidden: HiddenStates  # [1, D]
    sampler: Sampler
    tokens: Sequence[int]
    is_last: bool


class HeadBatches:
    """One batch for each model and number of stages."""

    def __init__(self, worker: Worker, timings: Timings) -> None:
        self._worker = worker
        self._timings = timings
        self._batchers: dict[tuple[str, int], Batcher[NextToken, Sampled]] = {}

    def submit(
        self, model: LocalModel, n_stages: int, session: str, wish: NextToken
    ) -> asyncio.Future[Done[Sampled]]:
        """See `Batcher.submit`."""
        key = (model.digest, n_stages)
        if key not in self._batchers:
            self._batchers[key] = Batcher(
                self._worker, lambda wishes: self._sample(model, wishes), n_groups=n_stages
            )
        return self._batchers[key].submit(session, wish, is_short=True)

    def _sample(self, model: LocalModel, wishes: Sequence[NextToken]) -> list[Sampled | CoveyError]:
        """On the worker's thread."""
        began_at = time.perf_counter()
        sampled = sample_all(model, wishes)
        seconds = time.perf_counter() - began_at
        self._timings.append(HeadTiming(model.digest, len(wishes), seconds))
        return sampled

    def forget(self, session: str) -> None:
        """The session has ended."""
        for batcher in self._batchers.values():
            batcher.forget(session)


def sample_all(model: LocalModel, wishes: Sequence[NextToken]) -> list[Sampled | CoveyError]:
    """One outcome for each of `wishes`, in order."""
    head, eos_ids = model.head, model.tokenizer.eos_ids
    sampled: list[Sampled | CoveyError] = []
    logits_of_each = head.logits_of_each([wish.hidden for wish in wishes])
    for wish, logits in zip(wishes, logits_of_each, strict=True):
        try:
            token = wish.sampler.sample(logits, wish.tokens)
            ends = wish.is_last or token.id in eos_ids
            sampled.append((token, None if ends else head.embed([token.id])))
        except CoveyError as error:
            sampled.append(error)
    return sampled
