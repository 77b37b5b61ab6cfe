"""What a node offers to whoever asks it for text: the seam between HTTP and the engine.

`api/` knows this page and nothing below it; `head.py` implements it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from covey.partition.choose import Prefer

from .model.sampling import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One generation. Exactly one of `messages`, `prompt` and `prompt_ids` is set."""

    model: str
    params: SamplingParams
    messages: Sequence[Mapping[str, Any]] | None = None
    prompt: str | None = None
    prompt_ids: Sequence[int] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The session is admitted on every stage; nothing has been computed yet."""

    session: str
    prompt_tokens: int
    stages: tuple[tuple[int, int], ...]  # spans, half-open


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token with its natural log-probability and the most probable ones in its place."""

    token_id: int
    text: str  # may hold a replacement character where the token is part of one character
    data: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTiming:
    """Where the time of one decode step went; the rest is links, queues and hand-overs."""

    total_s: float  # from the last token to this one, a reader slower than that included
    stages_s: float  # compute of all stages, as they report it
    head_s: float  # logits, sampling and the next embedding


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """Text that became final, possibly empty, and the token that made it so."""

    text: str
    token_id: int
    logprob: TokenLogprob | None = None
    timing: StepTiming | None = None  # None for the first token, see `Finished.ttft_s`


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTiming:
    """What one stage did over a whole generation."""

    peer_id: str
    span: tuple[int, int]
    compute_s: float
    queue_s: float
    received_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The last event of a generation that ended well.

    `reason` is the API's `finish_reason`.
    """

    reason: FinishReason
    text: str  # what was still held back (a stop string that did not complete)
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    ttft_s: float
    decode_s: float  # first token to last token
    stages: tuple[StageTiming, ...]
    returned_bytes: int  # hidden states that came back to the head


Event = Started | Delta | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanQuery:
    """What to say of a model's plans. Options of a question, never of the plan that runs."""

    model: str
    prefer: Prefer | None = None  # None: the node's own
    max_ttft_s: float | None = None
    min_throughput_tok_per_s: float | None = None
    prompt_tokens: int | None = None  # None: those that the node plans for
    n_sessions: int | None = None
    advice: bool = False  # search for what would help most; up to seconds of work
    why: str | None = None  # a member: why is it left out?
    what_if: tuple[str, ...] = ()  # changes of devices and links, see `covey plan --help`


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One model of the swarm, as `/v1/models` lists it."""

    id: str
    created: int  # unix seconds
    digest: str
    context_length: int
    is_ready: bool


class Service(Protocol):
    """A running node, seen from its HTTP API."""

    def models(self) -> Sequence[ModelEntry]:
        """Models that some member offers."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Run one generation; closing the generator cancels it on every stage.

        Raises (at the first `anext`):
            UnknownModel, NotReady, Busy, InvalidRequest, PromptTooLong, InvalidParams.
        Raises (later):
            SessionFailed: a stage was lost, or the deadline passed.
        """

    def status(self) -> dict[str, Any]:
        """JSON facts: identity, members, spans, links, sessions, speeds."""

    async def plan(self, query: PlanQuery) -> dict[str, Any]:
        """JSON facts: the Pareto front, the active plan and why, one machine alone.

        Raises:
            UnknownModel.
            InvalidRequest: a limit, a member's name or a change cannot be understood.
        """

    def pin_plan(self, model: str, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Have the whole swarm run a plan for as long as it can; the facts of what was pinned.

        Args:
            plan: `{"pipelines": ...}`, as the facts of a plan have it.

        Raises:
            UnknownModel.
            InvalidRequest: not a plan of this model, or one that cannot run now.
        """

    def unpin_plan(self, model: str) -> dict[str, Any]:
        """Let the swarm choose its plan again; whether one was pinned. Raises UnknownModel."""

    def invite(self, *, ttl_s: float, uses: int) -> str:
        """A new invite, one pasteable string."""

    def members_facts(self) -> dict[str, Any]:
        """JSON facts: who is in the swarm, who was removed and by whom."""

    def remove_member(self, member: str, *, with_invited: bool) -> dict[str, Any]:
        """Remove a member for good; the facts of what was done.

        Args:
            member: name, peer id, or the last characters of one.
            with_invited: those too that are in only by its word.

        Raises:
            InvalidRequest: none or several are called so, or it cannot be removed.
            NotAllowed: this node may not remove it.
        """

    def allow_member(self, member: str) -> dict[str, Any]:
        """Let a member remove others; only the founder may. Arguments and errors as above."""

    async def doctor(self) -> dict[str, Any]:
        """JSON facts: the NAT in the way, what could be changed, how members are reached."""

    async def ping(self, member: str, *, count: int) -> dict[str, Any]:
        """JSON facts: what carries the link to a member, round trips, loss, throughput.

        Raises:
            InvalidRequest: none or several are called so.
            MemberUnreachable: there is no link to it, and none can be made.
        """

    def request_stop(self) -> None:
        """Ask the node to stop gracefully."""
