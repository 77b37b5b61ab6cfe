"""Bodies of requests: what becomes of them, and which field a refusal names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from covey.errors import CoveyError
from covey.node.api.requests import (
    ChatRequest,
    CompletionRequest,
    InviteRequest,
    field_name,
    parse,
)
from covey.node.errors import InvalidRequest
from covey.node.model.errors import InvalidParams
from covey.node.model.sampling import MAX_TOKENS
from covey.node.service import GenerationRequest

HI = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> GenerationRequest:
    body = {"model": "tiny", "messages": HI, **fields}
    asked = parse(ChatRequest, json.dumps(body).encode())
    asked.check()
    return asked.to_generation()


def complete(**fields: Any) -> GenerationRequest:
    body = {"model": "tiny", "prompt": "once", **fields}
    asked = parse(CompletionRequest, json.dumps(body).encode())
    asked.check()
    return asked.to_generation()


def refused_field(**fields: Any) -> str:
    with pytest.raises(CoveyError) as caught:
        chat(**fields)
    return field_of(caught.value)


def field_of(error: CoveyError) -> str:
    """The field that a refusal names."""
    assert isinstance(error, (InvalidRequest, InvalidParams))
    return error.field


def test_defaults_are_those_of_openai() -> None:
    request = chat()
    assert request.params.temperature == 1.0
    assert request.params.top_p == 1.0
    assert request.params.max_tokens == MAX_TOKENS  # until the context is full
    assert request.params.logprobs == 0
    assert complete().params.max_tokens == 16


def test_a_deadline_is_handed_on() -> None:
    assert chat(deadline_s=2.5).deadline_s == 2.5
    assert complete(deadline_s=3).deadline_s == 3.0
    assert chat().deadline_s is None


def test_every_sampling_field_arrives() -> None:
    params = chat(
        temperature=0,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        seed=-4,
        logit_bias={"17": -100, "3": 1.5},
        stop=["a", "b"],
        max_tokens=5,
        logprobs=True,
        top_logprobs=3,
    ).params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.0, 0.9, 40, 0.1)
    assert params.repetition_penalty == 1.1
    assert (params.presence_penalty, params.frequency_penalty) == (0.2, 0.3)
    assert params.seed == -4
    assert dict(params.logit_bias) == {17: -100.0, 3: 1.5}
    assert params.stop == ("a", "b")
    assert (params.max_tokens, params.logprobs) == (5, 3)


def test_null_means_the_default() -> None:
    names = ("temperature", "top_p", "top_k", "seed", "stop", "logit_bias", "max_tokens", "stream")
    assert chat(**dict.fromkeys(names)) == chat()


def test_max_completion_tokens_is_the_newer_name_and_wins() -> None:
    assert chat(max_completion_tokens=7, max_tokens=9).params.max_tokens == 7


def test_a_single_stop_text_is_a_list_of_one() -> None:
    assert chat(stop="END").params.stop == ("END",)


def test_text_parts_become_lines() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    request = chat(messages=[{"role": "user", "content": parts}])
    assert request.messages == [{"role": "user", "content": "one\ntwo"}]


def test_developer_is_todays_name_of_system() -> None:
    request = chat(messages=[{"role": "developer", "content": "x"}, *HI])
    assert request.messages is not None
    assert request.messages[0]["role"] == "system"


def test_a_name_reaches_the_template() -> None:
    request = chat(messages=[{"role": "user", "content": "x", "name": "Ann"}])
    assert request.messages == [{"role": "user", "content": "x", "name": "Ann"}]


def test_an_answer_can_be_sent_back_as_the_openai_client_dumps_it() -> None:
    dumped = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None}
    request = chat(messages=[*HI, dumped, *HI])
    assert request.messages is not None
    assert request.messages[1] == {"role": "assistant", "content": "hi"}


def test_template_keywords_arrive() -> None:
    assert chat(chat_template_kwargs={"enable_thinking": False}).template_kwargs == {
        "enable_thinking": False
    }


@pytest.mark.parametrize("prompt", ["once", ["once"]])
def test_one_text_is_a_prompt(prompt: object) -> None:
    request = complete(prompt=prompt)
    assert (request.prompt, request.prompt_ids) == ("once", None)


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2]]])
def test_token_ids_are_a_prompt(prompt: object) -> None:
    request = complete(prompt=prompt)
    assert (request.prompt, request.prompt_ids) == (None, (1, 2))


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        [[]],
        ["a", "b"],
        [[1], [2]],
        [1, "a"],
        [True],
        [-1],
        [2**31],
        [1.5],
        None,
        3,
        {},
        [[["a"]]],
    ],
)
def test_other_prompts_are_refused_by_name(prompt: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        complete(prompt=prompt)
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "hot"),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 1.5),
        ("min_p", 2),
        ("deadline_s", 0),
        ("deadline_s", "soon"),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("seed", "x"),
        ("seed", 2**65),
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("max_tokens", 10**30),
        ("max_completion_tokens", -1),
        ("stop", 5),
        ("stop", [5]),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("logit_bias", []),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"1": "a"}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": 10**400}),
        ("logprobs", 3),
        ("top_logprobs", 3),  # without logprobs
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),  # without stream
        ("chat_template_kwargs", [1]),
        ("chat_template_kwargs", {"messages": []}),
        ("chat_template_kwargs", {"bos": ""}),
        ("model", ""),
        ("model", None),
        ("messages", []),
        ("messages", "hi"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(field: str, value: object) -> None:
    assert refused_field(**{field: value}) == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("function_call", {"name": "f"}),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("modalities", ["audio"]),
        ("reasoning_effort", "high"),
        ("grammar", "root ::= x"),
        ("guided_json", {}),
        ("min_tokens", 3),
    ],
)
def test_a_feature_that_would_change_the_answer_is_refused_by_name(
    field: str, value: object
) -> None:
    assert refused_field(**{field: value}) == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1),
        ("tools", []),
        ("tools", None),
        ("tool_choice", "auto"),
        ("response_format", {"type": "text"}),
        ("user", "me"),
        ("metadata", {"a": "b"}),
        ("service_tier", "auto"),
        ("parallel_tool_calls", True),
    ],
)
def test_a_field_that_changes_nothing_is_accepted(field: str, value: object) -> None:
    assert chat(**{field: value}) == chat()


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "wizard", "content": "x"}, "messages[1].role"),
        ({"role": "tool", "content": "x"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "user", "content": 5}, "messages[1].content"),
        ({"role": "user", "content": ["x"]}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content"),
        ({"role": "assistant", "content": "", "tool_calls": [{}]}, "messages[1].tool_calls"),
        ("x", "messages[1]"),
    ],
)
def test_a_wrong_message_is_refused_by_its_place(message: object, field: str) -> None:
    assert refused_field(messages=[*HI, message]) == field


def test_the_refusal_of_an_image_says_what_to_send() -> None:
    with pytest.raises(InvalidRequest, match="image_url parts are not supported: send text"):
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])


@pytest.mark.parametrize("field", ["best_of", "echo", "suffix"])
def test_a_completions_own_features_are_refused_by_name(field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        complete(**{field: 2})
    assert caught.value.field == field


def test_a_completion_without_alternatives_still_asks_for_the_tokens_own() -> None:
    assert complete(logprobs=0).params.logprobs == 1


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"model": "\\ud800"}', b"[" * 5000])
def test_malformed_json_is_a_refusal(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="malformed JSON"):
        parse(ChatRequest, body)


@pytest.mark.parametrize("body", [b"[]", b"3", b"null", b'"x"'])
def test_json_that_is_no_object_is_a_refusal(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="must be a JSON object"):
        parse(ChatRequest, body)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(value: str) -> None:
    body = f'{{"model": "m", "prompt": "x", "temperature": {value}}}'.encode()
    with pytest.raises(InvalidRequest) as caught:
        parse(CompletionRequest, body)
    assert caught.value.field in {"temperature", "body"}


def test_an_invite_has_limits() -> None:
    assert parse(InviteRequest, b"{}").uses == 1
    with pytest.raises(InvalidRequest):
        parse(InviteRequest, b'{"ttl_s": 1e9}')
    with pytest.raises(InvalidRequest):
        parse(InviteRequest, b'{"uses": 0}')


def test_field_name_stops_at_what_is_no_field() -> None:
    assert field_name(("messages", 0, "content")) == "messages[0].content"
    assert field_name(("logit_bias", "50256")) == "logit_bias"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, "n", "tools"})


# The first text that Hypothesis draws in a fresh clone waits for a table of all characters.
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_any_body_is_a_request_or_a_refusal_with_a_field(fields: dict[str, Any]) -> None:
    for read in (chat, complete):
        wrong = ""
        try:
            request = read(**fields)
        except CoveyError as error:
            wrong = field_of(error)
        else:
            assert request.model
        assert wrong != "body"


@given(st.binary(max_size=64))
def test_any_bytes_are_a_request_or_a_refusal(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(ChatRequest, body)
