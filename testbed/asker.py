"""Asks the node of one machine for texts, many at a time, and for facts, without a process for it.

A command on a machine costs half a second of a core that emulated nodes want. So threads of this
process go to the machine instead, and stay there with their connections.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from covey.client import BadRequest, Client, Generation, TextStream
from covey.errors import CoveyError

from .machines import Machine

T = TypeVar("T")

TIMEOUT_S = 120.0  # of silence
# Token ids that are ordinary words, or parts of them, in every model that labs use.
WORDS = range(1000, 30000)
# Of the same models: ends of text, which would make a short text of a long one.
ENDS = {0: -100.0, 1: -100.0, 2: -100.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One text, as it came; instants are of `time.monotonic`."""

    asked_at: float
    came_at: tuple[float, ...]  # pieces of text: nearly always one for each token
    text: str
    n_tokens: int
    ttft_s: float  # as the node says, like the next
    tpot_s: float
    stages_s: float  # compute of all stages in one decode step, as they say
    head_s: float  # the head's own work in one


class _Meeting:
    """When texts that are asked for at once have all been coming for a while."""

    def __init__(self, n_texts: int, seconds: float) -> None:
        self.over_at = math.inf
        self._n_missing = n_texts
        self._seconds = seconds
        self._lock = threading.Lock()

    def join(self, now: float) -> None:
        """The first piece of one of them has come."""
        with self._lock:
            self._n_missing -= 1
            if self._n_missing == 0:
                self.over_at = now + self._seconds

    def give_up(self) -> None:
        """One of them does not come: the others need not go on."""
        with self._lock:
            self._n_missing, self.over_at = -1, -math.inf


class Asker:
    """Threads on one machine that ask its node; `with` ends them."""

    def __init__(self, machine: Machine, model: str, *, n_threads: int, seed: int = 0) -> None:
        """Go there; the node must be up.

        Args:
            machine: where its node is, or was restarted.
            model: what all texts are asked of.
            n_threads: texts at once.
            seed: of the prompts; no two prompts of one asker are alike.
        """
        self._model = model
        self._random = random.Random(seed)  # noqa: S311  words of prompts, no secrets
        self._pool = ThreadPoolExecutor(n_threads, initializer=machine.host.stay)
        self._client = self._on_machine(lambda: Client(home=machine.home, timeout=TIMEOUT_S))

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close its connections, which ends texts that still come."""
        self._client.close()
        self._pool.shutdown(cancel_futures=True)

    def call(self, ask: Callable[[Client], T]) -> T:
        """What a call of the client returns or raises."""
        return self._on_machine(lambda: ask(self._client))

    def plan(self) -> dict[str, Any]:
        """The facts of `covey plan`."""
        return self.call(lambda client: client.plan(self._model))

    def is_planned_with(self, member: str) -> bool:
        """Whether the node knows a member, and what it can do with the model."""
        try:
            facts = self.call(lambda client: client.plan(self._model, why=member))
        except BadRequest:  # nobody is called so, yet
            return False
        return bool(facts["why"]["reason"] != "unplanned")

    def status(self) -> dict[str, Any]:
        """The facts of `covey status`."""
        return self.call(lambda client: client.status())

    def session(self, n_prompt: int, n_tokens: int) -> Session:
        """One text alone."""
        return self.begin(n_prompt, n_tokens).result()

    def begin(
        self, n_prompt: int, n_tokens: int, *, prompt: Sequence[int] | None = None
    ) -> Future[Session]:
        """Begin a text of exactly so many tokens; raises CoveyError in the future.

        Args:
            n_prompt: tokens of a prompt that nobody has seen before.
            n_tokens: of the text, which no end-of-text token ends.
            prompt: instead of one of that many random words.
        """
        if prompt is None:
            prompt = self._words(n_prompt)
        return self._pool.submit(self._ask, list(prompt), n_tokens)

    def begin_until(
        self, n_prompt: int, max_tokens: int, meeting: _Meeting
    ) -> Future[tuple[float, ...]]:
        """Begin a text that ends when all of a meeting have come for long enough."""
        return self._pool.submit(self._ask_until, self._words(n_prompt), max_tokens, meeting)

    def _words(self, n_prompt: int) -> list[int]:
        return [self._random.choice(WORDS) for _ in range(n_prompt)]

    def _ask_until(
        self, prompt: list[int], max_tokens: int, meeting: _Meeting
    ) -> tuple[float, ...]:
        came_at: list[float] = []
        try:
            with self._stream(prompt, max_tokens) as stream:
                for _ in stream:
                    came_at.append(time.monotonic())
                    if len(came_at) == 1:
                        meeting.join(came_at[0])
                    if came_at[-1] > meeting.over_at:
                        break
        except CoveyError:
            meeting.give_up()
            raise
        if not came_at:
            raise CoveyError("a text without a single piece came")
        return tuple(came_at)

    def _stream(self, prompt: list[int], n_tokens: int) -> TextStream:
        return self._client.generate(
            prompt,
            model=self._model,
            stream=True,
            max_tokens=n_tokens,
            temperature=0.0,
            logit_bias=ENDS,
        )

    def _ask(self, prompt: list[int], n_tokens: int) -> Session:
        asked_at = time.monotonic()
        with self._stream(prompt, n_tokens) as stream:
            came_at = [time.monotonic() for _ in stream]
            answer = stream.result
        return _session(asked_at, came_at, answer, n_tokens)

    def _on_machine(self, job: Callable[[], T]) -> T:
        return self._pool.submit(job).result()


def together(
    askers: Sequence[Asker], n_prompt: int, n_sessions: int, *, seconds: float, max_tokens: int
) -> list[tuple[float, ...]]:
    """Several texts at once, ended when all of them have come for so many seconds.

    They are asked for at each of `askers` in turn.

    Returns:
        For each of them the instants when its pieces came; the last ones are later than that
        unless a text had all its tokens before.
    """
    meeting = _Meeting(n_sessions, seconds)
    texts = [
        askers[idx % len(askers)].begin_until(n_prompt, max_tokens, meeting)
        for idx in range(n_sessions)
    ]
    wait(texts)
    return [text.result() for text in texts]


def _session(
    asked_at: float, came_at: Sequence[float], answer: Generation, n_tokens: int
) -> Session:
    timing, n_came = answer.timing, answer.usage.completion_tokens
    if timing is None or n_came != n_tokens or n_tokens < 2:
        raise CoveyError(f"a text of {n_came} tokens came where {n_tokens} were asked for")
    n_steps = n_tokens - 1
    return Session(
        asked_at=asked_at,
        came_at=tuple(came_at),
        text=answer.text,
        n_tokens=n_tokens,
        ttft_s=timing.ttft_s,
        tpot_s=timing.decode_s / n_steps,
        stages_s=timing.steps.stages_s / n_steps,
        head_s=timing.steps.head_s / n_steps,
    )


def tokens_per_s(came_at: Sequence[Sequence[float]], tokens_per_piece: float) -> float:
    """How fast tokens come while all of several sessions decode.

    Between the moment when the last of them has its first piece and the moment when the first of
    them has its last one.

    Args:
        came_at: for each session the instants when its pieces came.
        tokens_per_piece: on average.

    Raises:
        CoveyError: there is no such time; they were too short.
    """
    begin = max(instants[0] for instants in came_at)
    end = min(instants[-1] for instants in came_at)
    if end <= begin:
        raise CoveyError("no moment saw all sessions decode: their texts are too short")
    n_pieces = sum(begin < at <= end for instants in came_at for at in instants)
    return n_pieces * tokens_per_piece / (end - begin)
