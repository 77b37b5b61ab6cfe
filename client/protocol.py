"""What goes over HTTP, without HTTP: bodies of requests, and answers read into values or errors.

Sans-IO; the sync and the async client differ in nothing but their awaits. Every generation is
asked for as a stream, also when the caller wants it whole: then a silent node is noticed within
seconds (it sends keep-alives) and closing the connection cancels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import (
    BadRequest,
    ClientError,
    ConnectionLost,
    GenerationFailed,
    ModelNotFound,
    NotReady,
    ServerBusy,
    Unauthorized,
)
from .sse import SseDecoder
from .types import Chunk, Generation, Model, StageTiming, Steps, Timing, Usage

Json = dict[str, Any]

DEFAULT_RETRY_S = 1.0  # when a busy node does not say
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


def base_url(url: str) -> str:
    """`http://host:port` of what a person gives, with or without the `/v1` of OpenAI's clients."""
    return url.rstrip("/").removesuffix("/v1")


def generation_body(
    model: str,
    options: Mapping[str, object],
    *,
    prompt: str | Sequence[int] | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
) -> Json:
    """The body of a request for text; `options` are `ChatOptions`."""
    body: Json = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if messages is not None:
        body["messages"] = [dict(message) for message in messages]
    if prompt is not None:
        body["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
    for name, value in options.items():
        if isinstance(value, Mapping):
            body[name] = {str(key): item for key, item in value.items()}
        elif isinstance(value, Sequence) and not isinstance(value, str):
            body[name] = list(value)
        elif value is not None:
            body[name] = value
    return body


class TextParser:
    """Reads the stream of one generation.

    `feed` what arrives; when the connection ends, `result()` is the whole answer or says what
    is missing.
    """

    def __init__(self) -> None:
        self._sse = SseDecoder()
        self._texts: list[str] = []
        self._finish_reason: str | None = None
        self._usage: Usage | None = None
        self._timing: Timing | None = None
        self._failure: ClientError | None = None
        self._is_done = False  # the node has said all

    def feed(self, received: bytes) -> list[Chunk]:
        """Take the next bytes; returns the text in them. After the end nothing counts.

        Raises:
            GenerationFailed: the node gave up.
            ClientError: this is not the stream of a generation.
        """
        chunks: list[Chunk] = []
        for data in self._sse.feed(received):
            if self._is_done or self._failure is not None:
                break
            if data == b"[DONE]":
                self._is_done = True
            else:
                try:
                    text = self._take(_object(data))
                except ClientError as error:
                    self._failure = error
                else:
                    self._texts.append(text)
                    chunks += [Chunk(text=text)] if text else []
        if self._failure is not None and not chunks:
            raise self._failure  # or the text before it would be lost; then `result` raises it
        return chunks

    def result(self) -> Generation:
        """The whole answer.

        Raises:
            GenerationFailed: the node gave up, see `feed`.
            ConnectionLost: the stream ended before the node had said all.
        """
        if self._failure is not None:
            raise self._failure
        if not self._is_done or self._finish_reason is None:
            raise ConnectionLost("the node went away in the middle of the text: ask again")
        return Generation(
            text="".join(self._texts),
            finish_reason=self._finish_reason,
            usage=self._usage or Usage(prompt_tokens=0, completion_tokens=0, cached_tokens=0),
            timing=self._timing,
        )

    def _take(self, event: Json) -> str:
        if "error" in event:
            error = _mapping(event["error"])
            raise GenerationFailed(_message(error, "the generation failed"), _code(error))
        try:
            if event.get("usage") is not None:
                self._usage = _usage(event["usage"])
            if event.get("covey") is not None:
                self._timing = _timing(event["covey"])
            if not event["choices"]:
                return ""
            choice = event["choices"][0]
            if choice.get("finish_reason") is not None:
                self._finish_reason = str(choice["finish_reason"])
            text = choice["delta"].get("content") if "delta" in choice else choice["text"]
            return _typed(text, str) if text is not None else ""
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ClientError("the node's stream is not a generation: is it Covey?") from error


def error_of(status: int, headers: Mapping[str, str], body: bytes) -> ClientError:
    """The error that an answer with this status stands for; `headers` in any case."""
    try:
        error = _mapping(_object(body).get("error"))
    except ClientError:
        error = {}
    message = _message(error, f"the node answered with status {status}")
    code = _code(error)
    param = error.get("param")
    match status:
        case 401 | 403:
            return Unauthorized(message)
        case 404 if code == "model_not_found":
            return ModelNotFound(message)
        case 429:
            return ServerBusy(message, _retry_after_s(headers))
        case 503:
            return NotReady(message, _retry_after_s(headers))
        case 502 | 504:
            return GenerationFailed(message, code)
        case _ if 400 <= status < 500:
            return BadRequest(message, param if isinstance(param, str) else None)
        case _:
            return ClientError(message)


def models_of(body: bytes) -> list[Model]:
    """The answer of GET /v1/models."""
    try:
        return [_model(entry) for entry in _typed(_object(body)["data"], list)]
    except (KeyError, TypeError) as error:
        raise ClientError("the node's list of models is not one: is it Covey?") from error


def object_of(body: bytes) -> Json:
    """An answer of the control endpoints."""
    return _object(body)


def invite_of(body: bytes) -> str:
    """The answer of POST /covey/invite."""
    invite = _object(body).get("invite")
    if not isinstance(invite, str):
        raise ClientError("the node's answer holds no invite: is it Covey?")
    return invite


def only_model(models: Sequence[Model]) -> str:
    """The model to use when the caller names none: the first that is ready, else the first.

    Raises:
        ModelNotFound: there is none.
    """
    for model in models:
        if model.is_ready:
            return model.id
    if not models:
        raise ModelNotFound(
            "this swarm offers no model yet: start a node with one, `covey up MODEL`"
        )
    return models[0].id


def _object(data: bytes) -> Json:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ClientError("the node's answer is not JSON: is it Covey?") from error
    if not isinstance(value, dict):
        raise ClientError("the node's answer is not a JSON object: is it Covey?")
    return value


def _mapping(value: object) -> Json:
    return value if isinstance(value, dict) else {}


def _message(error: Json, default: str) -> str:
    message = error.get("message")
    return " ".join(message.split()) if isinstance(message, str) and message else default


def _code(error: Json) -> str | None:
    code = error.get("code")
    return code if isinstance(code, str) else None


def _retry_after_s(headers: Mapping[str, str]) -> float:
    lower = {name.lower(): value for name, value in headers.items()}
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = lower.get(name, "")
        if value.isascii() and value.isdigit() and len(value) < 10:
            return int(value) * unit_s
    return DEFAULT_RETRY_S


def _typed(value: object, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} instead of {kind.__name__}")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{type(value).__name__} instead of a number")
    return float(value)


def _model(entry: Json) -> Model:
    ours = _mapping(_typed(entry, dict).get("covey"))
    length, digest = ours.get("context_length"), ours.get("digest")
    return Model(
        id=_typed(entry["id"], str),
        is_ready=ours.get("is_ready") is not False,
        context_length=length if isinstance(length, int) else None,
        digest=digest if isinstance(digest, str) else None,
    )


def _usage(usage: Json) -> Usage:
    cached = _mapping(usage.get("prompt_tokens_details")).get("cached_tokens")
    return Usage(
        prompt_tokens=_typed(usage["prompt_tokens"], int),
        completion_tokens=_typed(usage["completion_tokens"], int),
        cached_tokens=cached if isinstance(cached, int) else 0,
    )


def _timing(timing: Json) -> Timing:
    steps, speed = timing["steps"], timing["tok_per_s"]
    return Timing(
        ttft_s=_number(timing["ttft_s"]),
        decode_s=_number(timing["decode_s"]),
        tok_per_s=None if speed is None else _number(speed),
        steps=Steps(
            total_s=_number(steps["total_s"]),
            stages_s=_number(steps["stages_s"]),
            head_s=_number(steps["head_s"]),
        ),
        returned_bytes=_typed(timing["returned_bytes"], int),
        stages=tuple(_stage(stage) for stage in timing["stages"]),
    )


def _stage(stage: Json) -> StageTiming:
    start, end = stage["span"][:2]
    return StageTiming(
        peer_id=_typed(stage["peer_id"], str),
        span=(_typed(start, int), _typed(end, int)),
        compute_s=_number(stage["compute_s"]),
        queue_s=_number(stage["queue_s"]),
        received_bytes=_typed(stage["received_bytes"], int),
    )
