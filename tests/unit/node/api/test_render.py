"""The JSON of answers, chunk by chunk."""

from __future__ import annotations

import json
from typing import Any

import pytest

from covey.node.api.render import ChatRenderer, CompletionRenderer, Renderer, Shape, sse
from support.fake_service import delta, delta_with_logprob, finished, started


def shape(*, n_top: int | None = None, include_usage: bool = False) -> Shape:
    return Shape(model="tiny", created=7, n_top=n_top, include_usage=include_usage)


def chat(**options: Any) -> Renderer:
    return ChatRenderer(shape(**options), started())


def completion(**options: Any) -> Renderer:
    return CompletionRenderer(shape(**options), started())


def test_an_event_is_one_ascii_line_whatever_the_text() -> None:
    event = sse({"text": "a\nb\r\u2028\x85é"})
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert event.isascii()
    assert event.count(b"\n") == 2
    assert json.loads(event[6:]) == {"text": "a\nb\r\u2028\x85é"}


def test_the_first_delta_of_a_chat_has_the_role() -> None:
    (chunk,) = chat().opening()
    assert chunk == {
        "id": "chatcmpl-s1",
        "object": "chat.completion.chunk",
        "created": 7,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
        ],
    }


def test_a_token_without_text_yet_makes_no_chunk() -> None:
    assert chat().delta(delta("")) == []
    assert completion().delta(delta("")) == []


def test_a_token_without_text_makes_a_chunk_if_its_logprob_was_asked_for() -> None:
    (chunk,) = chat(n_top=0).delta(delta_with_logprob(""))
    assert chunk["choices"][0]["delta"] == {"content": ""}
    assert len(chunk["choices"][0]["logprobs"]["content"]) == 1


def test_the_last_chunk_of_a_chat_has_the_reason_and_no_content() -> None:
    held, last = chat().closing(finished("!", reason="length"))
    assert held["choices"][0]["delta"] == {"content": "!"}
    assert held["choices"][0]["finish_reason"] is None
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "length"
    assert "usage" not in last


@pytest.mark.parametrize("make", [chat, completion])
def test_usage_comes_in_a_chunk_of_its_own_and_is_null_before(make: Any) -> None:
    renderer = make(include_usage=True)
    chunks = [*renderer.opening(), *renderer.delta(delta("x")), *renderer.closing(finished())]
    *others, last = chunks
    assert all(chunk["usage"] is None for chunk in others)
    assert all(chunk["choices"] for chunk in others)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_our_own_field_tells_where_the_time_went() -> None:
    renderer = chat(include_usage=True)
    renderer.delta(delta("a"))
    renderer.delta(delta("b", step_s=0.5))
    renderer.delta(delta("", step_s=0.25))
    timing = renderer.closing(finished())[-1]["covey"]
    assert timing["ttft_s"] == 0.25
    assert timing["tok_per_s"] == 2.0  # the second token took half a second
    assert timing["steps"] == {"total_s": 0.75, "stages_s": 0.375, "head_s": 0.1875}
    assert timing["returned_bytes"] == 32
    assert timing["stages"] == [
        {
            "peer_id": "peer",
            "span": [0, 2],
            "compute_s": 0.1,
            "queue_s": 0.0,
            "received_bytes": 64,
        }
    ]


def test_one_token_has_no_speed() -> None:
    answer = chat().whole([delta("a")], finished(n_tokens=1))
    assert answer["covey"]["tok_per_s"] is None


def test_a_whole_chat() -> None:
    answer = chat().whole([delta("Hel"), delta("lo", step_s=0.5)], finished("!"))
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"]["total_tokens"] == 5
    assert answer["covey"]["steps"]["total_s"] == 0.5


def test_logprobs_of_a_chat_have_text_bytes_and_alternatives_without_infinities() -> None:
    answer = chat(n_top=2).whole([delta_with_logprob("é")], finished())
    (token,) = answer["choices"][0]["logprobs"]["content"]
    assert (token["token"], token["logprob"], token["bytes"]) == ("é", -0.5, [0xC3, 0xA9])
    assert [other["token"] for other in token["top_logprobs"]] == ["é", "never"]
    assert token["top_logprobs"][1]["logprob"] == -9999.0
    json.dumps(answer, allow_nan=False)


def test_no_more_alternatives_than_asked_for() -> None:
    answer = chat(n_top=0).whole([delta_with_logprob("a")], finished())
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_a_whole_completion_with_logprobs() -> None:
    deltas = [delta_with_logprob("ab"), delta_with_logprob("c")]
    answer = completion(n_top=1).whole(deltas, finished("!"))
    (choice,) = answer["choices"]
    assert answer["id"] == "cmpl-s1"
    assert answer["object"] == "text_completion"
    assert (choice["text"], choice["finish_reason"]) == ("abc!", "stop")
    assert choice["logprobs"] == {
        "tokens": ["ab", "c"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"ab": -0.5}, {"c": -0.5}],
        "text_offset": [0, 2],
    }


def test_offsets_go_on_from_chunk_to_chunk() -> None:
    renderer = completion(n_top=0)
    renderer.delta(delta_with_logprob("ab"))
    (chunk,) = renderer.delta(delta_with_logprob("c"))
    assert chunk["choices"][0]["logprobs"]["text_offset"] == [2]


def test_a_completion_ends_with_an_empty_text_and_the_reason() -> None:
    renderer = completion()
    assert renderer.opening() == []
    (last,) = renderer.closing(finished())
    assert (last["choices"][0]["text"], last["choices"][0]["finish_reason"]) == ("", "stop")
