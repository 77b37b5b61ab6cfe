"""The values that go in and come out of the client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict


class SamplingOptions(TypedDict, total=False):
    """Keywords of `generate`; what is left out is the node's default (OpenAI's)."""

    max_tokens: int
    temperature: float  # 0: always the most probable token
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: str | Sequence[str]
    logit_bias: Mapping[int, float]
    deadline_s: float  # give up after so many seconds, wherever the text is


class ChatOptions(SamplingOptions, total=False):
    """Keywords of `chat`."""

    chat_template_kwargs: Mapping[str, Any]


class PlanOptions(TypedDict, total=False):
    """Keywords of `plan`: the question that plans are made for, and what else to say of them."""

    max_ttft_s: float  # choose among plans with the first token by then
    min_throughput: float  # and with so many tokens/s for all sessions together
    prompt_tokens: int  # of the question that TTFT is predicted for
    sessions: int  # in flight at once
    advice: bool  # say what would help most; takes up to some seconds
    why: str  # a member: why is it left out?
    what_if: Sequence[str]  # changes of devices and links: ["add=pi5,link=lan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of text, never empty."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one generation."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt: not computed again

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTiming:
    """What one stage did over a whole generation; `span` is blocks [start, end)."""

    peer_id: str
    span: tuple[int, int]
    compute_s: float
    queue_s: float
    received_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Where the time of the decode steps went, summed; what is missing to the total is links."""

    total_s: float
    stages_s: float
    head_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Where the time of one generation went."""

    ttft_s: float
    decode_s: float  # first token to last token
    tok_per_s: float | None  # of decoding; None for fewer than two tokens
    steps: Steps
    returned_bytes: int  # hidden states that came back to the head
    stages: tuple[StageTiming, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A whole answer."""

    text: str
    finish_reason: str  # "stop" or "length"
    usage: Usage
    timing: Timing | None  # None when the server is not Covey


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model of the swarm."""

    id: str
    is_ready: bool
    context_length: int | None
    digest: str | None
