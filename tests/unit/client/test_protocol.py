"""Bodies out, answers in: values, or the error that tells the caller what to do."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.client.errors import (
    BadRequest,
    ClientError,
    ConnectionLost,
    GenerationFailed,
    ModelNotFound,
    NotReady,
    ServerBusy,
    Unauthorized,
)
from covey.client.protocol import (
    TextParser,
    base_url,
    error_of,
    generation_body,
    invite_of,
    models_of,
    only_model,
)
from covey.client.types import Model, Steps, Usage

USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "prompt_tokens_details": {"cached_tokens": 1},
}
TIMING = {
    "ttft_s": 0.25,
    "decode_s": 1,
    "tok_per_s": None,
    "steps": {"total_s": 1.0, "stages_s": 0.5, "head_s": 0.25},
    "returned_bytes": 8,
    "stages": [
        {"peer_id": "p", "span": [0, 2], "compute_s": 0.5, "queue_s": 0, "received_bytes": 4}
    ],
}


def chat_event(content: str | None = None, reason: str | None = None) -> bytes:
    delta = {} if content is None else {"content": content}
    return event({"choices": [{"delta": delta, "finish_reason": reason}]})


def event(data: object) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def test_a_chat_stream_is_read() -> None:
    parser = TextParser()
    chunks = parser.feed(chat_event("") + chat_event("Hel"))
    chunks += parser.feed(chat_event("lo") + chat_event(reason="stop"))
    chunks += parser.feed(event({"choices": [], "usage": USAGE, "covey": TIMING}) + DONE)
    assert [chunk.text for chunk in chunks] == ["Hel", "lo"]
    result = parser.result()
    assert (result.text, result.finish_reason) == ("Hello", "stop")
    assert result.usage == Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
    assert result.usage.total_tokens == 5
    assert result.timing is not None
    assert result.timing.steps == Steps(total_s=1.0, stages_s=0.5, head_s=0.25)
    assert result.timing.stages[0].span == (0, 2)


def test_a_completion_stream_is_read() -> None:
    parser = TextParser()
    (chunk,) = parser.feed(event({"choices": [{"text": "a", "finish_reason": None}]}))
    parser.feed(event({"choices": [{"text": "", "finish_reason": "length"}]}) + DONE)
    assert chunk.text == "a"
    assert parser.result().finish_reason == "length"


def test_a_server_that_is_not_covey_has_no_timing() -> None:
    parser = TextParser()
    parser.feed(chat_event("a", "stop") + DONE)
    assert parser.result().timing is None


def test_an_error_event_is_a_failed_generation() -> None:
    parser = TextParser()
    with pytest.raises(GenerationFailed, match="it is gone") as caught:
        parser.feed(event({"error": {"message": "it is\ngone", "code": "peer_lost"}}))
    assert caught.value.code == "peer_lost"


def test_text_before_an_error_is_not_lost() -> None:
    parser = TextParser()
    chunks = parser.feed(chat_event("a") + event({"error": {"message": "gone"}}))
    assert [chunk.text for chunk in chunks] == ["a"]
    with pytest.raises(GenerationFailed, match="gone"):
        parser.result()
    with pytest.raises(GenerationFailed, match="gone"):
        parser.feed(b"")


@pytest.mark.parametrize("stream", [b"", chat_event("a"), chat_event("a", "stop"), DONE])
def test_an_end_before_everything_was_said_is_a_lost_connection(stream: bytes) -> None:
    parser = TextParser()
    parser.feed(stream)
    with pytest.raises(ConnectionLost):
        parser.result()


def test_what_comes_after_the_end_does_not_count() -> None:
    parser = TextParser()
    assert parser.feed(chat_event("a", "stop") + DONE + chat_event("b"))[-1].text == "a"
    assert parser.result().text == "a"


@pytest.mark.parametrize(
    "data",
    [
        3,
        {},
        {"choices": 3},
        {"choices": [{}]},
        {"choices": [{"delta": 3}]},
        {"choices": [{"text": 3}]},
        {"choices": [], "usage": {"prompt_tokens": "a"}},
        {"choices": [], "usage": 3},
        {"choices": [], "covey": {}},
        {"choices": [], "covey": TIMING | {"stages": [{"span": [1]}]}},
        {"choices": [], "covey": TIMING | {"ttft_s": True}},
        {"choices": [], "covey": TIMING | {"stages": 3}},
    ],
)
def test_a_stream_of_something_else_is_an_error(data: object) -> None:
    with pytest.raises(ClientError, match="is it Covey"):
        TextParser().feed(event(data))


@given(st.binary(max_size=40))
def test_any_bytes_are_text_or_a_client_error(received: bytes) -> None:
    def read() -> None:
        parser = TextParser()
        parser.feed(b"data: " + received + b"\n\n")
        parser.result()

    with pytest.raises(ClientError):
        read()


def reply(status: int, code: str | None = None, **headers: str) -> ClientError:
    body = {"error": {"message": "what to\n do", "type": "t", "code": code, "param": "top_k"}}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return error_of(status, named, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "invalid_value", BadRequest),
        (404, "path_not_found", BadRequest),
        (413, None, BadRequest),
        (401, None, Unauthorized),
        (403, None, Unauthorized),
        (404, "model_not_found", ModelNotFound),
        (429, None, ServerBusy),
        (503, None, NotReady),
        (502, "peer_lost", GenerationFailed),
        (504, None, GenerationFailed),
        (500, None, ClientError),
        (302, None, ClientError),
    ],
)
def test_a_status_is_an_error_by_what_to_do_next(
    status: int, code: str | None, kind: type[ClientError]
) -> None:
    error = reply(status, code)
    assert type(error) is kind
    assert str(error) == "what to do"


def test_errors_carry_the_facts() -> None:
    bad = reply(400)
    assert isinstance(bad, BadRequest)
    assert bad.param == "top_k"
    busy = reply(429, Retry_After="3")
    assert isinstance(busy, ServerBusy)
    assert busy.retry_after_s == 3.0
    not_ready = reply(503, Retry_After="1", Retry_After_Ms="250")
    assert isinstance(not_ready, NotReady)
    assert not_ready.retry_after_s == 0.25


@pytest.mark.parametrize("value", ["", "soon", "-1", "1e9", "9" * 99, "²"])
def test_a_senseless_retry_time_is_a_second(value: str) -> None:
    busy = reply(429, Retry_After=value)
    assert isinstance(busy, ServerBusy)
    assert busy.retry_after_s == 1.0


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error": 3}', b'{"error": {}}'])
def test_an_error_page_of_something_else_is_named_by_its_status(body: bytes) -> None:
    assert str(error_of(500, {}, body)) == "the node answered with status 500"


def test_a_body_holds_what_was_given_and_nothing_else() -> None:
    body = generation_body(
        "m",
        {"temperature": 0.0, "stop": ("a",), "logit_bias": {5: -1.0}, "seed": None},
        prompt=(1, 2),
    )
    assert body == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "prompt": [1, 2],
        "temperature": 0.0,
        "stop": ["a"],
        "logit_bias": {"5": -1.0},
    }


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_the_url_of_an_openai_client_will_do(url: str) -> None:
    assert base_url(url) == "http://h:1"


def test_models() -> None:
    covey = {"is_ready": False, "context_length": 9, "digest": "d"}
    body = {"data": [{"id": "a", "covey": covey}, {"id": "b"}]}
    first, second = models_of(json.dumps(body).encode())
    assert first == Model(id="a", is_ready=False, context_length=9, digest="d")
    assert second == Model(id="b", is_ready=True, context_length=None, digest=None)
    assert only_model([first, second]) == "b"
    assert only_model([first]) == "a"
    with pytest.raises(ModelNotFound):
        only_model([])


@pytest.mark.parametrize("body", [b"{", b"{}", b'{"data": 3}', b'{"data": [3]}', b'{"data": [{}]}'])
def test_a_list_of_something_else_is_an_error(body: bytes) -> None:
    with pytest.raises(ClientError):
        models_of(body)


@pytest.mark.parametrize("body", [b"{", b"{}", b'{"invite": 3}'])
def test_an_answer_without_an_invite_is_an_error(body: Any) -> None:
    with pytest.raises(ClientError):
        invite_of(body)
