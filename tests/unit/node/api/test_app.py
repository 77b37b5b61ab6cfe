"""The API as a client sees it, without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from covey.errors import CoveyError
from covey.node.api import create_app
from covey.node.api.guard import MAX_BODY_BYTES
from covey.node.errors import (
    Busy,
    InvalidRequest,
    NotReady,
    PromptTooLong,
    SessionFailed,
    UnknownModel,
)
from covey.node.model.errors import InvalidParams, ModelError
from support.fake_service import (
    MODEL,
    FakeService,
    Step,
    delta,
    delta_with_logprob,
    finished,
    hello,
    started,
)

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "once"}
BOTH = pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)]
)
CONTROL = {"Authorization": "Bearer control"}


@asynccontextmanager
async def client_of(
    service: FakeService,
    *,
    api_key: str | None = None,
    host: str = "127.0.0.1",
    shows_bugs: bool = True,
) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(service, api_key=api_key, control_key="control", host=host, clock=lambda: 99.5)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=shows_bugs)
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}:8080") as client:
        yield client


def events_of(response: httpx.Response) -> list[str]:
    """The data of each event."""
    events = response.text.split("\n\n")
    assert events.pop() == ""
    return [event.removeprefix("data: ") for event in events]


async def post(path: str, body: object, *script: Step) -> httpx.Response:
    async with client_of(FakeService(*script)) as client:
        return await client.post(path, json=body)


async def test_a_chat() -> None:
    service = FakeService(*hello())
    async with client_of(service) as client:
        response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 200
    answer = response.json()
    assert answer["choices"][0]["message"]["content"] == "Hello!"
    assert answer["created"] == 99
    assert answer["id"] == "chatcmpl-s1"
    (request,) = service.requests
    assert request.model == MODEL
    assert request.messages == [{"role": "user", "content": "hi"}]


async def test_a_completion() -> None:
    service = FakeService(*hello())
    async with client_of(service) as client:
        response = await client.post("/v1/completions", json=COMPLETION)
    assert response.json()["choices"][0]["text"] == "Hello!"
    assert service.requests[0].prompt == "once"


async def test_a_streamed_chat_to_the_letter() -> None:
    body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    response = await post("/v1/chat/completions", body, *hello())
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *data, done = events_of(response)
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in data]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {"content": "!"},
        {},
    ]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]]
    assert reasons == [None, None, None, None, "stop"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 2


async def test_a_streamed_completion() -> None:
    response = await post("/v1/completions", COMPLETION | {"stream": True}, *hello())
    *data, done = events_of(response)
    assert done == "[DONE]"
    texts = [json.loads(event)["choices"][0]["text"] for event in data]
    assert texts == ["Hel", "lo", "!", ""]


async def test_logprobs_are_streamed_with_their_token() -> None:
    body = CHAT | {"stream": True, "logprobs": True, "top_logprobs": 1}
    script = (started(), delta_with_logprob("a"), finished())
    data = events_of(await post("/v1/chat/completions", body, *script))
    choice = json.loads(data[1])["choices"][0]
    assert choice["logprobs"]["content"][0]["bytes"] == [97]


@BOTH
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (UnknownModel("x", ("tiny",)), 404, "model_not_found"),
        (NotReady("x", "no plan", 3.2), 503, "not_ready"),
        (Busy("full", 0.25), 429, "busy"),
        (InvalidRequest("logit_bias", "no such token"), 400, "invalid_value"),
        (InvalidParams("seed", 1, "less"), 400, "invalid_value"),
        (PromptTooLong(9, 8), 400, "context_length_exceeded"),
        (SessionFailed("peer_lost", "gone"), 502, "peer_lost"),
        (SessionFailed("deadline_exceeded", "late"), 504, "deadline_exceeded"),
    ],
)
async def test_an_error_before_the_first_event_has_its_own_status(
    path: str, body: dict[str, Any], stream: bool, error: CoveyError, status: int, code: str
) -> None:
    response = await post(path, body | {"stream": stream}, error)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    reply = response.json()["error"]
    assert set(reply) == {"message", "type", "code", "param"}
    assert reply["code"] == code


async def test_who_may_ask_again_is_told_when() -> None:
    response = await post("/v1/chat/completions", CHAT, NotReady("x", "no plan", 3.2))
    assert response.headers["retry-after"] == "4"
    response = await post("/v1/chat/completions", CHAT, Busy("full", 0.25))
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("1", "250")


@BOTH
async def test_a_long_prompt_is_called_what_the_route_calls_it(
    path: str, body: dict[str, Any]
) -> None:
    reply = (await post(path, body, PromptTooLong(9, 8))).json()["error"]
    name = "messages" if "messages" in body else "prompt"
    assert reply["param"] == name
    assert reply["message"].startswith(name)


@BOTH
async def test_an_error_in_a_stream_is_its_last_event(path: str, body: dict[str, Any]) -> None:
    script = (started(), delta("a"), SessionFailed("peer_lost", "it is gone"))
    response = await post(path, body | {"stream": True}, *script)
    assert response.status_code == 200
    last = json.loads(events_of(response)[-1])
    assert last["error"]["code"] == "peer_lost"
    assert "[DONE]" not in response.text


@BOTH
async def test_an_error_in_the_middle_of_a_whole_answer_is_a_status(
    path: str, body: dict[str, Any]
) -> None:
    response = await post(path, body, started(), delta("a"), SessionFailed("peer_lost", "gone"))
    assert response.status_code == 502


async def test_the_generator_is_closed_before_the_last_words() -> None:
    service = FakeService(*hello())
    closed_at_done: list[bool] = []

    async def send(message: dict[str, Any]) -> None:
        if b"[DONE]" in message.get("body", b""):
            closed_at_done.append(service.closed.is_set())

    await call(service, CHAT | {"stream": True}, send)
    assert closed_at_done == [True]


async def test_silence_is_filled_with_comments() -> None:
    gate = asyncio.Event()
    service = FakeService(started(), gate, *hello()[1:])
    sent = bytearray()

    async def send(message: dict[str, Any]) -> None:
        sent.extend(message.get("body", b""))
        if b": keep-alive\n\n" in sent:
            gate.set()  # or the generation would wait for ever

    await call(service, CHAT | {"stream": True}, send, keepalive_s=0.001)
    assert sent.endswith(b"data: [DONE]\n\n")


async def test_a_client_that_leaves_cancels() -> None:
    service = FakeService(started(), delta("a"), asyncio.Event())
    left = asyncio.Event()

    async def send(message: dict[str, Any]) -> None:
        if b'"a"' in message.get("body", b""):
            left.set()

    await call(service, CHAT | {"stream": True}, send, left=left)
    assert service.closed.is_set()


async def test_a_client_that_takes_nothing_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("covey.node.api.generation.WRITE_STALL_S", 0.001)
    service = FakeService(*hello())

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    await call(service, CHAT | {"stream": True}, send)
    assert service.closed.is_set()


async def call(
    service: FakeService,
    body: dict[str, Any],
    send: Any,
    *,
    left: asyncio.Event | None = None,
    keepalive_s: float = 10.0,
) -> None:
    """One chat over bare ASGI, with the client's side in the hands of the test."""
    app = create_app(service, api_key=None, control_key="control", keepalive_s=keepalive_s)
    is_sent = False

    async def receive() -> dict[str, Any]:
        nonlocal is_sent
        if not is_sent:
            is_sent = True
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        await (left or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1")],
    }
    async with asyncio.timeout(5):
        await app(scope, receive, send)


async def test_a_bug_is_a_500_that_tells_nothing() -> None:
    async with client_of(FakeService(ZeroDivisionError("secret")), shows_bugs=False) as client:
        response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"


async def test_a_generation_that_ends_without_a_reason_is_a_bug() -> None:
    async with client_of(FakeService(started()), shows_bugs=False) as client:
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 500


@BOTH
async def test_a_wrong_field_is_a_400_by_name(path: str, body: dict[str, Any]) -> None:
    response = await post(path, body | {"temperature": "hot"})
    assert response.status_code == 400
    reply = response.json()["error"]
    assert (reply["type"], reply["param"]) == ("invalid_request_error", "temperature")


async def test_broken_json_is_a_400() -> None:
    async with client_of(FakeService()) as client:
        response = await client.post("/v1/chat/completions", content=b"{")
    assert response.status_code == 400
    assert "malformed JSON" in response.json()["error"]["message"]


async def test_an_unknown_path_is_a_404_in_our_form() -> None:
    async with client_of(FakeService()) as client:
        response = await client.get("/v1/embeddings")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "path_not_found"


async def test_a_wrong_method_is_a_405_that_says_which_one() -> None:
    async with client_of(FakeService()) as client:
        response = await client.get("/v1/chat/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert response.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("declares", [True, False])
async def test_a_body_beyond_the_limit_is_a_413(declares: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b" " * (MAX_BODY_BYTES // 4)

    async with client_of(FakeService()) as client:
        content = b" " * (MAX_BODY_BYTES + 1) if declares else pieces()
        response = await client.post("/v1/chat/completions", content=content)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


async def test_the_models_of_the_swarm() -> None:
    async with client_of(FakeService()) as client:
        listed = (await client.get("/v1/models")).json()
        one = await client.get(f"/v1/models/{MODEL}")
        none = await client.get("/v1/models/org/other")
    assert listed["object"] == "list"
    assert listed["data"] == [one.json()]
    assert one.json()["id"] == MODEL
    assert one.json()["covey"]["context_length"] == 2048
    assert none.status_code == 404
    assert "org/other" in none.json()["error"]["message"]


async def test_health_needs_no_key_and_says_why_not() -> None:
    async with client_of(FakeService(), api_key="secret") as client:
        assert (await client.get("/health")).json() == {"status": "ok"}
    async with client_of(FakeService(is_ready=False), api_key="secret") as client:
        response = await client.get("/health")
    assert response.status_code == 503
    assert MODEL in response.json()["reason"]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/metrics"])
async def test_a_key_is_asked_for_and_the_control_key_will_do(path: str) -> None:
    async with client_of(FakeService(), api_key="sécret") as client:
        for wrong in (b"", b"Bearer", b"Bearer x", b"Bearer s\xff", "Basic sécret".encode()):
            response = await client.get(path, headers={b"Authorization": wrong})
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
        right = {b"Authorization": "bearer sécret".encode()}
        assert (await client.get(path, headers=right)).status_code == 200
        assert (await client.get(path, headers=CONTROL)).status_code == 200


async def test_without_a_key_nothing_is_generated() -> None:
    service = FakeService(*hello())
    async with client_of(service, api_key="secret") as client:
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 401
    assert service.requests == []


async def test_control_needs_its_key_even_without_an_api_key() -> None:
    service = FakeService()
    async with client_of(service, api_key="secret") as client:
        for headers in ({}, {"Authorization": "Bearer secret"}, {"Authorization": "control"}):
            assert (await client.get("/covey/status", headers=headers)).status_code == 401
            assert (await client.get("/covey/plan?model=x", headers=headers)).status_code == 401
            assert (await client.post("/covey/invite", headers=headers)).status_code == 401
            assert (await client.post("/covey/stop", headers=headers)).status_code == 401
    assert not service.was_stopped
    assert service.invites == []


async def test_control() -> None:
    service = FakeService()
    async with client_of(service) as client:
        client.headers.update(CONTROL)
        assert (await client.get("/covey/status")).json() == service.status_facts
        plan = await client.get("/covey/plan", params={"model": MODEL, "prefer": "latency"})
        assert (plan.json()["model"], plan.json()["prefer"]) == (MODEL, "latency")
        invite = await client.post("/covey/invite", json={"ttl_s": 60, "uses": 2})
        assert invite.json() == {"invite": "covey1abc"}
        await client.post("/covey/invite")
        assert service.invites == [(60.0, 2), (3600.0, 1)]
        await client.post("/covey/stop")
    assert service.was_stopped


async def test_a_look_at_plans_may_ask_for_more() -> None:
    async with client_of(FakeService()) as client:
        query: Mapping[str, str | float | list[str]] = {
            "model": MODEL,
            "max_ttft_s": 2.5,
            "min_throughput": 7,
            "prompt_tokens": 64,
            "sessions": 2,
            "advice": True,
            "why": "kitchen",
            "what_if": ["add=pi5,link=lan", "remove=attic"],
        }
        asked = (await client.get("/covey/plan", params=query, headers=CONTROL)).json()
    assert asked == {
        "model": MODEL,
        "prefer": None,
        "max_ttft_s": 2.5,
        "min_throughput_tok_per_s": 7.0,
        "prompt_tokens": 64,
        "n_sessions": 2,
        "advice": True,
        "why": "kitchen",
        "what_if": ["add=pi5,link=lan", "remove=attic"],
    }


async def test_a_plan_is_pinned_and_let_go() -> None:
    async with client_of(FakeService()) as client:
        client.headers.update(CONTROL)
        body = {"model": MODEL, "plan": {"pipelines": []}}
        done = await client.post("/covey/plan/pin", json=body)
        assert done.json() == {"model": MODEL, "pinned": {"pipelines": []}}
        done = await client.post("/covey/plan/unpin", json={"model": MODEL})
        assert done.json() == {"model": MODEL, "was_pinned": True}


@pytest.mark.parametrize("body", [{}, {"model": MODEL}, {"model": MODEL, "plan": []}])
async def test_a_pin_names_a_model_and_holds_a_plan(body: dict[str, object]) -> None:
    async with client_of(FakeService()) as client:
        answer = await client.post("/covey/plan/pin", json=body, headers=CONTROL)
    assert answer.status_code == 400


async def test_members_are_listed_removed_and_allowed() -> None:
    async with client_of(FakeService()) as client:
        client.headers.update(CONTROL)
        assert (await client.get("/covey/members")).json() == {"members": [], "removed": []}
        removed = await client.post("/covey/members/remove", json={"member": "kitchen"})
        assert removed.json() == {"removed": ["kitchen", False]}
        body = {"member": "kitchen", "with_invited": True}
        removed = await client.post("/covey/members/remove", json=body)
        assert removed.json() == {"removed": ["kitchen", True]}
        allowed = await client.post("/covey/members/allow", json={"member": "attic"})
        assert allowed.json() == {"allowed": {"peer_id": "p", "name": "attic"}}


async def test_a_removal_that_this_node_may_not_make_is_forbidden() -> None:
    async with client_of(FakeService()) as client:
        client.headers.update(CONTROL)
        answer = await client.post("/covey/members/remove", json={"member": "attic"})
        assert answer.status_code == 403
        assert answer.json()["error"]["message"] == "ask the founder"


@pytest.mark.parametrize("body", [{}, {"member": ""}, {"member": 7}, {"member": "x" * 129}])
async def test_a_removal_names_one_member(body: dict[str, object]) -> None:
    async with client_of(FakeService()) as client:
        client.headers.update(CONTROL)
        for what in ("remove", "allow"):
            assert (await client.post(f"/covey/members/{what}", json=body)).status_code == 400


async def test_the_doctor_and_a_ping_are_asked_for() -> None:
    async with client_of(FakeService()) as client:
        client.headers.update(CONTROL)
        assert (await client.get("/covey/doctor")).json()["nat"] == {"tcp": "open"}
        ping = await client.post("/covey/ping", json={"member": "kitchen", "count": 3})
        assert ping.json() == {"name": "kitchen", "sent": 3}
        lost = await client.post("/covey/ping", json={"member": "attic"})
        assert lost.status_code == 502
        assert lost.json()["error"]["code"] == "member_unreachable"


@pytest.mark.parametrize(
    "body", [{}, {"member": ""}, {"member": "a", "count": 0}, {"member": "a", "count": 51}]
)
async def test_a_ping_has_its_limits(body: dict[str, object]) -> None:
    async with client_of(FakeService()) as client:
        client.headers.update(CONTROL)
        assert (await client.post("/covey/ping", json=body)).status_code == 400


async def test_the_doctor_needs_the_control_key() -> None:
    async with client_of(FakeService(), api_key="key") as client:
        headers = {"Authorization": "Bearer key"}
        assert (await client.get("/covey/doctor", headers=headers)).status_code == 401
        assert (await client.post("/covey/ping", headers=headers)).status_code == 401


async def test_members_need_the_control_key() -> None:
    async with client_of(FakeService(), api_key="key") as client:
        for headers in ({}, {"Authorization": "Bearer key"}):
            assert (await client.get("/covey/members", headers=headers)).status_code == 401
            for what in ("remove", "allow"):
                answer = await client.post(f"/covey/members/{what}", headers=headers)
                assert answer.status_code == 401


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ("", 400, "model"),
        ("?model=tiny&prefer=magic", 400, "prefer"),
        ("?model=other", 404, "model"),
        ("?model=tiny&max_ttft_s=0", 400, "max_ttft_s"),
        ("?model=tiny&min_throughput=nan", 400, "min_throughput"),
        ("?model=tiny&sessions=many", 400, "sessions"),
        ("?model=tiny" + "&what_if=x" * 17, 400, "what_if"),
    ],
)
async def test_a_wrong_query_is_refused_by_name(query: str, status: int, param: str) -> None:
    async with client_of(FakeService()) as client:
        response = await client.get(f"/covey/plan{query}", headers=CONTROL)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "", "[::1", "10.0.0.1"]
)
async def test_on_loopback_a_foreign_host_is_refused(host: str) -> None:
    async with client_of(FakeService()) as client:
        response = await client.get("/v1/models", headers={"Host": host})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "forbidden_origin"


@pytest.mark.parametrize(
    "host", ["localhost:1", "127.0.0.1", "[::1]:8080", "LOCALHOST", "127.0.0.7"]
)
async def test_on_loopback_our_own_names_are_let_in(host: str) -> None:
    async with client_of(FakeService(), host="127.0.0.7") as client:
        response = await client.get("/v1/models", headers={"Host": host})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:3000", "http://["]
)
async def test_on_loopback_another_web_page_is_refused(origin: str) -> None:
    service = FakeService(*hello())
    async with client_of(service) as client:
        headers = {"Origin": origin}
        response = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert response.status_code == 403
    assert service.requests == []


async def test_our_own_page_is_let_in_and_no_cors_header_is_sent() -> None:
    async with client_of(FakeService()) as client:
        response = await client.get("/v1/models", headers={"Origin": "http://127.0.0.1:8080"})
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("access-control")]


async def test_with_a_key_on_another_address_any_host_will_do() -> None:
    async with client_of(FakeService(), host="10.0.0.1", api_key="secret") as client:
        headers = {"Host": "node.home", "Authorization": "Bearer secret"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200


def test_an_empty_key_is_no_key() -> None:
    with pytest.raises(ValueError, match="empty key"):
        create_app(FakeService(), api_key="", control_key="x")
    with pytest.raises(ValueError, match="empty key"):
        create_app(FakeService(), api_key=None, control_key="")


def member(peer_id: str, link: object, *, is_live: bool = True) -> dict[str, object]:
    """A row of the status, as far as the metrics read it."""
    return {"peer_id": peer_id, "is_live": is_live, "link": link}


async def test_metrics_count_what_happened() -> None:
    service = FakeService(*hello())
    service.status_facts = {
        "members": [
            member("a", {"kind": "direct", "rtt_s": 0.002, "bytes_sent": 7, "bytes_received": 9}),
            member("b", {"kind": "relayed", "rtt_s": None}),
            member("c", None, is_live=False),
            "what is this",
        ]
    }
    async with client_of(service) as client:
        await client.post("/v1/chat/completions", json=CHAT)
        await client.post("/v1/completions", json=COMPLETION | {"stream": True})
        service.script = (Busy("full"),)
        await client.post("/v1/chat/completions", json=CHAT)
        service.script = (started(), SessionFailed("peer_lost", "gone"))
        await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
        await client.get("/anything")
        await client.get("/v1/models/tiny")
        lines = (await client.get("/metrics")).text.splitlines()
    for expected in (
        'covey_http_requests_total{route="/v1/chat/completions",status="200"} 2.0',
        'covey_http_requests_total{route="/v1/chat/completions",status="429"} 1.0',
        'covey_http_requests_total{route="/v1/models/{model:path}",status="200"} 1.0',
        'covey_http_requests_total{route="none",status="404"} 1.0',
        'covey_generations_total{outcome="stop"} 2.0',
        'covey_generations_total{outcome="refused"} 1.0',
        'covey_generations_total{outcome="failed"} 1.0',
        "covey_generated_tokens_total 4.0",
        "covey_prompt_tokens_total 9.0",
        "covey_active_generations 0.0",
        "covey_time_to_first_token_seconds_sum 0.5",
        "covey_time_per_output_token_seconds_count 2.0",
        'covey_members{state="live"} 2.0',
        'covey_members{state="silent"} 1.0',
        'covey_links{kind="direct"} 1.0',
        'covey_links{kind="relayed"} 1.0',
        'covey_link_rtt_seconds{peer_id="a"} 0.002',
        'covey_link_sent_bytes_total{peer_id="a"} 7.0',
        'covey_link_received_bytes_total{peer_id="a"} 9.0',
    ):
        assert expected in lines


@pytest.mark.parametrize("facts", [{}, {"members": None}, {"members": [{}, {"link": 3}]}])
async def test_a_status_that_lacks_something_does_not_fail_a_scrape(facts: dict[str, Any]) -> None:
    service = FakeService()
    service.status_facts = facts
    async with client_of(service) as client:
        assert (await client.get("/metrics")).status_code == 200


@BOTH
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_nobody_foresaw_has_our_form_and_is_logged(
    path: str, body: dict[str, Any], stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    script = (started(), ModelError("the logits are not finite"))
    response = await post(path, body | {"stream": stream}, *script)
    reply = json.loads(events_of(response)[-1]) if stream else response.json()
    assert response.status_code == (200 if stream else 500)
    assert reply["error"]["message"] == "the logits are not finite"
    assert reply["error"]["code"] == "internal"
    assert [record.exc_info is not None for record in caplog.records] == [True]


async def test_two_apps_in_one_process_count_for_themselves() -> None:
    async with client_of(FakeService()) as first, client_of(FakeService()) as second:
        await first.get("/health")
        assert 'route="/health"' not in (await second.get("/metrics")).text
