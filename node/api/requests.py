"""The bodies of requests: JSON in, a `GenerationRequest` out, or `InvalidRequest` by field.

Pure. Types are strict ("0.7" is no number). A feature of OpenAI's API that would change the
answer and that Covey does not have is refused by name; fields that change nothing (`user`,
`metadata`) are accepted. Defaults are OpenAI's: temperature 1, top_p 1, 16 tokens for a
completion, and a chat goes on until the model stops or the context is full.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError

from covey.node.errors import InvalidRequest
from covey.node.model.sampling import MAX_TOKENS, MAX_TOP_LOGPROBS, SamplingParams
from covey.node.service import GenerationRequest

ModelName = Annotated[str, Field(min_length=1, max_length=256)]

COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
MAX_TOKEN_ID = 2**31 - 1
MAX_DEADLINE_S = 24 * 3600.0
MAX_PINGS = 50
MAX_INVITE_S = 30 * 24 * 3600.0  # arbitrary; an invite is to be used soon

# Fields whose effect we do not have, with the values that ask for nothing (null always does).
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "store": (False,),
    # Not OpenAI's, but sent by clients of llama.cpp and vLLM.
    "grammar": ("",),
    "json_schema": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
    "mirostat": (0,),
    "typical_p": (1,),
}
# Variables of a chat template that are the node's to set.
TEMPLATE_OWN = frozenset(
    {"template", "messages", "bos", "eos", "bos_token", "eos_token", "now", "strftime_now"}
)
UNSUPPORTED_IN_MESSAGE: Mapping[str, tuple[object, ...]] = {
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "audio": (),
    "refusal": ("",),
}


def _invalid(reason: str) -> PydanticCustomError:
    return PydanticCustomError("covey", "{reason}", {"reason": reason})


def _text_of(content: object) -> str:
    """A message's content: a text, or text parts on lines of their own."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _invalid("must be a text or a list of text parts")
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            named = f"{kind} parts are" if isinstance(kind, str) else "this kind of part is"
            raise _invalid(f"{named} not supported: send text parts")
        if not isinstance(part.get("text"), str):
            raise _invalid("a text part needs its text")
        texts.append(part["text"])
    return "\n".join(texts)


def _stops(stop: object) -> tuple[str, ...]:
    if stop is None:
        return ()
    if isinstance(stop, str):
        return (stop,)
    if isinstance(stop, list) and all(isinstance(text, str) for text in stop):
        return tuple(stop)
    raise _invalid("must be a text or a list of texts")


def _one_prompt(prompt: object) -> str | tuple[int, ...]:
    """A text or token ids, alone or as the only element of a list."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        if len(prompt) > 1:
            raise _invalid(f"{len(prompt)} prompts: send one prompt per request")
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise _invalid("must be a text or a non-empty list of token ids")
    if not all(type(token) is int and 0 <= token <= MAX_TOKEN_ID for token in prompt):
        raise _invalid(f"token ids are whole numbers from 0 to {MAX_TOKEN_ID}")
    return tuple(prompt)


def _bias(bias: object) -> dict[int, float]:
    if bias is None:
        return {}
    if not isinstance(bias, dict):
        raise _invalid("must map token ids to numbers from -100 to 100")
    result: dict[int, float] = {}
    for token, value in bias.items():
        if not (isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 11):
            raise _invalid("its keys must be token ids")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _invalid("its values must be numbers from -100 to 100")
        result[int(token)] = float(max(-1e9, min(1e9, value)))  # an int may exceed any float
    return result


class Strict(BaseModel):
    """Base of bodies: types as JSON has them, no NaN."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """`stream_options`."""

    include_usage: bool | None = None


class Message(Strict):
    """One message of a chat; an assistant's may lack content only if it is empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, PlainValidator(_text_of)]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """What the chat template sees; templates know no `developer`, OpenAI's new `system`."""
        role = "system" if self.role == "developer" else self.role
        shown = {"role": role, "content": self.content}
        return shown if self.name is None else {**shown, "name": self.name}


class GenerationBody(Strict):
    """What both kinds of generation have."""

    prompt_field: ClassVar[str]

    model: ModelName
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: Annotated[dict[int, float], PlainValidator(_bias)] = {}
    stop: Annotated[tuple[str, ...], PlainValidator(_stops)] = ()
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    deadline_s: Annotated[float, Field(gt=0, le=MAX_DEADLINE_S)] | None = None  # ours: then give up

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    @abstractmethod
    def n_top(self) -> int | None:
        """Alternatives to show with each token; None: show no log-probabilities at all."""

    @abstractmethod
    def to_generation(self) -> GenerationRequest:
        """What the node is asked for; raises `InvalidParams`."""

    def check(self) -> None:
        """Raise `InvalidRequest` for what only several fields together tell."""
        _refuse(self.model_extra or {}, UNSUPPORTED)
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options", "only together with stream = true")

    def sampling(self, max_tokens: int) -> SamplingParams:
        """How to choose the tokens; raises `InvalidParams`."""
        given = {
            name: value
            for name in (
                "top_p",
                "top_k",
                "min_p",
                "repetition_penalty",
                "presence_penalty",
                "frequency_penalty",
            )
            if (value := getattr(self, name)) is not None
        }
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            seed=self.seed,
            logit_bias=self.logit_bias,
            stop=self.stop,
            max_tokens=max_tokens,
            # At least one, so that the engine reports the chosen token's own.
            logprobs=0 if self.n_top is None else max(1, self.n_top),
            **given,
        )


class ChatRequest(GenerationBody):
    """The body of POST /v1/chat/completions."""

    prompt_field: ClassVar[str] = "messages"

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def n_top(self) -> int | None:
        """Alternatives to show with each token; None: show no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        """Raise `InvalidRequest` for what only several fields together tell."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs", "only together with logprobs = true")
        if taken := TEMPLATE_OWN & (self.chat_template_kwargs or {}).keys():
            raise InvalidRequest("chat_template_kwargs", f"the node sets {min(taken)} itself")
        for index, message in enumerate(self.messages):
            _refuse(message.model_extra or {}, UNSUPPORTED_IN_MESSAGE, f"messages[{index}].")

    def to_generation(self) -> GenerationRequest:
        """What the node is asked for; raises `InvalidParams`."""
        # The newer name wins. Without a limit the node stops at the end of its context.
        limit = self.max_completion_tokens or self.max_tokens or MAX_TOKENS
        return GenerationRequest(
            model=self.model,
            params=self.sampling(limit),
            messages=[message.for_template() for message in self.messages],
            template_kwargs=self.chat_template_kwargs or {},
            deadline_s=self.deadline_s,
        )


class CompletionRequest(GenerationBody):
    """The body of POST /v1/completions; one prompt, one choice."""

    prompt_field: ClassVar[str] = "prompt"

    prompt: Annotated[str | tuple[int, ...], PlainValidator(_one_prompt)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @property
    def n_top(self) -> int | None:
        """Alternatives to show with each token; None: show no log-probabilities at all."""
        return self.logprobs

    def to_generation(self) -> GenerationRequest:
        """What the node is asked for; raises `InvalidParams`."""
        params = self.sampling(self.max_tokens or COMPLETION_TOKENS)
        return GenerationRequest(
            model=self.model,
            params=params,
            prompt=self.prompt if isinstance(self.prompt, str) else None,
            prompt_ids=None if isinstance(self.prompt, str) else self.prompt,
            deadline_s=self.deadline_s,
        )


class InviteRequest(Strict):
    """The body of POST /covey/invite."""

    ttl_s: Annotated[float, Field(gt=0, le=MAX_INVITE_S)] = 3600.0
    uses: Annotated[int, Field(ge=1, le=1000)] = 1


class MemberRequest(Strict):
    """The body of POST /covey/members/allow."""

    member: Annotated[str, Field(min_length=1, max_length=128)]  # name, peer id or how it ends


class PingRequest(MemberRequest):
    """The body of POST /covey/ping."""

    count: Annotated[int, Field(ge=1, le=MAX_PINGS)] = 10


class RemovalRequest(MemberRequest):
    """The body of POST /covey/members/remove."""

    with_invited: bool = False


BodyT = TypeVar("BodyT", bound=BaseModel)


def parse(kind: type[BodyT], body: bytes) -> BodyT:
    """Read a body as `kind`.

    Raises:
        InvalidRequest: not JSON, or a field is missing, of another type or out of its limits.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        raise InvalidRequest("body", f"malformed JSON ({first['ctx']['error']})")
    if not first["loc"]:
        raise InvalidRequest("body", "must be a JSON object")
    reason = first["msg"]
    raise InvalidRequest(field_name(first["loc"]), reason[:1].lower() + reason[1:])


def field_name(loc: tuple[int | str, ...]) -> str:
    """`messages[0].content` of ("messages", 0, "content"); stops at what is not a field."""
    name = ""
    for step in loc:
        if isinstance(step, int):
            name += f"[{step}]"
        elif step.isidentifier():
            name += f".{step}" if name else step
        else:
            break
    return name


def _refuse(
    extra: Mapping[str, object], table: Mapping[str, tuple[object, ...]], prefix: str = ""
) -> None:
    for name, harmless in table.items():
        value = extra.get(name)
        if value is not None and value not in harmless:
            raise InvalidRequest(f"{prefix}{name}", "not supported: leave it out")
