"""A `Service` that follows a script: the seam of the HTTP API, without an engine behind it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from covey.node.errors import MemberUnreachable, NotAllowed, UnknownModel
from covey.node.service import (
    Delta,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    ModelEntry,
    PlanQuery,
    StageTiming,
    Started,
    StepTiming,
    TokenLogprob,
)

MODEL = "tiny"

#: What a generation does next: yield, wait until the event is set, or raise.
Step = Event | asyncio.Event | Exception


class FakeService:
    """Plays `script` for every generation and notes what it was asked."""

    def __init__(self, *script: Step, is_ready: bool = True) -> None:
        self.script = script
        self.is_ready = is_ready
        self.requests: list[GenerationRequest] = []
        self.invites: list[tuple[float, int]] = []
        self.opened = asyncio.Event()  # some generation has begun
        self.closed = asyncio.Event()  # some generation has ended, in whatever way
        self.was_stopped = False
        self.status_facts: dict[str, Any] = {"members": [], "links": []}

    def models(self) -> Sequence[ModelEntry]:
        return [
            ModelEntry(
                id=MODEL, created=7, digest="d1", context_length=2048, is_ready=self.is_ready
            )
        ]

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        self.opened.set()
        try:
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    yield step
        finally:
            self.closed.set()

    def status(self) -> dict[str, Any]:
        return self.status_facts

    async def plan(self, query: PlanQuery) -> dict[str, Any]:
        if query.model != MODEL:
            raise UnknownModel(query.model, (MODEL,))
        return asdict(query)

    def pin_plan(self, model: str, plan: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": model, "pinned": plan}

    def unpin_plan(self, model: str) -> dict[str, Any]:
        return {"model": model, "was_pinned": True}

    def invite(self, *, ttl_s: float, uses: int) -> str:
        self.invites.append((ttl_s, uses))
        return "covey1abc"

    def members_facts(self) -> dict[str, Any]:
        return {"members": [], "removed": []}

    async def doctor(self) -> dict[str, Any]:
        return {"nat": {"tcp": "open"}, "findings": []}

    async def ping(self, member: str, *, count: int) -> dict[str, Any]:
        if member != "kitchen":
            raise MemberUnreachable(f"cannot reach {member}")
        return {"name": member, "sent": count}

    def remove_member(self, member: str, *, with_invited: bool) -> dict[str, Any]:
        if member != "kitchen":
            raise NotAllowed("ask the founder")
        return {"removed": [member, with_invited]}

    def allow_member(self, member: str) -> dict[str, Any]:
        return {"allowed": {"peer_id": "p", "name": member}}

    def request_stop(self) -> None:
        self.was_stopped = True


def started(session: str = "s1") -> Started:
    return Started(session=session, prompt_tokens=3, stages=((0, 2),))


def delta(text: str, token_id: int = 5, *, step_s: float | None = None) -> Delta:
    timing = None
    if step_s is not None:
        timing = StepTiming(total_s=step_s, stages_s=step_s / 2, head_s=step_s / 4)
    return Delta(text=text, token_id=token_id, timing=timing)


def delta_with_logprob(text: str) -> Delta:
    never = TokenLogprob(token_id=9, text="never", data=b"never", logprob=-math.inf)
    own = TokenLogprob(
        token_id=5,
        text=text,
        data=text.encode(),
        logprob=-0.5,
        top=(TokenLogprob(token_id=5, text=text, data=text.encode(), logprob=-0.5), never),
    )
    return Delta(text=text, token_id=5, logprob=own)


def finished(text: str = "", *, reason: FinishReason = "stop", n_tokens: int = 2) -> Finished:
    return Finished(
        reason=reason,
        text=text,
        prompt_tokens=3,
        completion_tokens=n_tokens,
        cached_tokens=1,
        ttft_s=0.25,
        decode_s=0.5,
        stages=(
            StageTiming(peer_id="peer", span=(0, 2), compute_s=0.1, queue_s=0.0, received_bytes=64),
        ),
        returned_bytes=32,
    )


def hello() -> tuple[Step, ...]:
    """A whole generation of "Hello!"."""
    return (started(), delta("Hel"), delta("lo", step_s=0.5), finished("!", n_tokens=2))
