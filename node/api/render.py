"""Events of a generation as the JSON of OpenAI's API: chunks of a stream, or one answer.

Pure. The field `covey` is our own (where the time went); OpenAI's clients ignore it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from covey.node.service import Delta, Finished, Started, StepTiming, TokenLogprob

Json = dict[str, Any]

LOWEST_LOGPROB = -9999.0  # what OpenAI sends for "never"; JSON has no infinity

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def sse(data: Json) -> bytes:
    """One server-sent event.

    ASCII only: many clients split lines at U+2028 and U+0085 too, which JSON may hold as they are.
    """
    return b"data: " + json.dumps(data, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the client wants to see."""

    model: str
    created: int  # unix seconds
    n_top: int | None = None  # alternatives with each token; None: no log-probabilities
    include_usage: bool = False


class Renderer(ABC):
    """One generation: either `opening`, each `delta` and `closing`, or `whole`."""

    id_prefix: ClassVar[str]
    chunk_kind: ClassVar[str]  # the `object` of a chunk, and of a whole answer
    whole_kind: ClassVar[str]

    def __init__(self, shape: Shape, started: Started) -> None:
        self.shape = shape
        self._id = f"{self.id_prefix}-{started.session}"
        self._steps = StepTiming(total_s=0.0, stages_s=0.0, head_s=0.0)  # sum of all

    def opening(self) -> list[Json]:
        """Chunks as soon as the session is admitted, before anything is computed."""
        return []

    def delta(self, delta: Delta) -> list[Json]:
        """The text; nothing while it is held back, unless log-probabilities were asked for."""
        self._add(delta.timing)
        logprobs = self._logprobs([delta])
        if not delta.text and logprobs is None:
            return []
        return [self._chunk(self._piece(delta.text, logprobs))]

    def closing(self, finished: Finished) -> list[Json]:
        """Text held back till now, the reason without content, and the usage if asked for."""
        chunks = [self._chunk(self._piece(finished.text))] if finished.text else []
        chunks.append(self._chunk(self._end(finished)))
        if self.shape.include_usage:
            chunks.append(self._envelope(self.chunk_kind, []) | totals(finished, self._steps))
        return chunks

    def whole(self, deltas: Sequence[Delta], finished: Finished) -> Json:
        """The answer of a request that did not ask for a stream."""
        for delta in deltas:
            self._add(delta.timing)
        text = "".join(delta.text for delta in deltas) + finished.text
        choice = self._answer(text, self._logprobs(deltas), finished)
        return self._envelope(self.whole_kind, [choice]) | totals(finished, self._steps)

    @abstractmethod
    def _piece(self, text: str, logprobs: Json | None = None) -> Json:
        """The choice of a chunk with text."""

    @abstractmethod
    def _end(self, finished: Finished) -> Json:
        """The choice of the chunk that says why it ended."""

    @abstractmethod
    def _answer(self, text: str, logprobs: Json | None, finished: Finished) -> Json:
        """The choice of a whole answer."""

    @abstractmethod
    def _logprobs(self, deltas: Sequence[Delta]) -> Json | None:
        """Log-probabilities of these tokens; None when none were asked for."""

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self._id,
            "object": kind,
            "created": self.shape.created,
            "model": self.shape.model,
            "choices": choices,
        }

    def _chunk(self, choice: Json) -> Json:
        chunk = self._envelope(self.chunk_kind, [choice])
        return chunk | {"usage": None} if self.shape.include_usage else chunk

    def _add(self, step: StepTiming | None) -> None:
        if step is not None:
            so_far = self._steps
            self._steps = StepTiming(
                total_s=so_far.total_s + step.total_s,
                stages_s=so_far.stages_s + step.stages_s,
                head_s=so_far.head_s + step.head_s,
            )


class ChatRenderer(Renderer):
    """`chat.completion` and its chunks."""

    id_prefix = "chatcmpl"
    chunk_kind = "chat.completion.chunk"
    whole_kind = "chat.completion"

    def opening(self) -> list[Json]:
        """The role."""
        return [self._chunk(_chat_choice({"role": "assistant", "content": ""}))]

    def _piece(self, text: str, logprobs: Json | None = None) -> Json:
        return _chat_choice({"content": text}, logprobs)

    def _end(self, finished: Finished) -> Json:
        return _chat_choice({}, reason=finished.reason)

    def _answer(self, text: str, logprobs: Json | None, finished: Finished) -> Json:
        return {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": finished.reason,
        }

    def _logprobs(self, deltas: Sequence[Delta]) -> Json | None:
        n_top = self.shape.n_top
        if n_top is None:
            return None
        content = [
            _token(token) | {"top_logprobs": [_token(other) for other in token.top[:n_top]]}
            for delta in deltas
            if (token := delta.logprob) is not None
        ]
        return {"content": content, "refusal": None}


class CompletionRenderer(Renderer):
    """`text_completion`, whole or in chunks."""

    id_prefix = "cmpl"
    chunk_kind = whole_kind = "text_completion"

    def __init__(self, shape: Shape, started: Started) -> None:
        super().__init__(shape, started)
        self._n_chars = 0  # of the text so far, for text_offset

    def _piece(self, text: str, logprobs: Json | None = None) -> Json:
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _end(self, finished: Finished) -> Json:
        return {"index": 0, "text": "", "logprobs": None, "finish_reason": finished.reason}

    def _answer(self, text: str, logprobs: Json | None, finished: Finished) -> Json:
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finished.reason}

    def _logprobs(self, deltas: Sequence[Delta]) -> Json | None:
        n_top = self.shape.n_top
        if n_top is None:
            return None
        columns: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for delta in deltas:
            if (token := delta.logprob) is not None:
                columns["tokens"].append(token.text)
                columns["token_logprobs"].append(_finite(token.logprob))
                columns["top_logprobs"].append(
                    {other.text: _finite(other.logprob) for other in token.top[:n_top]}
                )
                columns["text_offset"].append(self._n_chars)
            self._n_chars += len(delta.text)
        return columns


def totals(finished: Finished, steps: StepTiming) -> Json:
    """`usage` as OpenAI has it, and `covey`: where the time went, in seconds and bytes.

    `steps` is over the tokens after the first; its total less stages and head is what links,
    queues and hand-overs took.
    """
    usage = {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": finished.cached_tokens},
    }
    tok_per_s = None  # of decoding: the first token belongs to the prefill
    if finished.decode_s > 0 and finished.completion_tokens > 1:
        tok_per_s = (finished.completion_tokens - 1) / finished.decode_s
    stages = [
        {
            "peer_id": stage.peer_id,
            "span": list(stage.span),
            "compute_s": stage.compute_s,
            "queue_s": stage.queue_s,
            "received_bytes": stage.received_bytes,
        }
        for stage in finished.stages
    ]
    timing = {
        "ttft_s": finished.ttft_s,
        "decode_s": finished.decode_s,
        "tok_per_s": tok_per_s,
        "steps": {
            "total_s": steps.total_s,
            "stages_s": steps.stages_s,
            "head_s": steps.head_s,
        },
        "returned_bytes": finished.returned_bytes,
        "stages": stages,
    }
    return {"usage": usage, "covey": timing}


def _chat_choice(delta: Json, logprobs: Json | None = None, *, reason: str | None = None) -> Json:
    return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _token(token: TokenLogprob) -> Json:
    return {
        "token": token.text,
        "logprob": _finite(token.logprob),
        "bytes": list(token.data),
    }


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
