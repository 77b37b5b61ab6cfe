"""The API on a real socket: start, stop, disconnects, and a client that is not ours."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest

from covey.node.api import ApiAddressInUse, ApiServer
from covey.node.errors import Busy, ConfigError, SessionFailed
from support.fake_service import MODEL, FakeService, delta, delta_with_logprob, hello, started

pytestmark = pytest.mark.network

ANY = "0.0.0.0"  # noqa: S104  nothing is sent to it
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


@asynccontextmanager
async def serving(
    service: FakeService, *, grace_s: float = 5.0, api_key: str | None = None
) -> AsyncIterator[ApiServer]:
    server = ApiServer(service, "127.0.0.1", 0, api_key, "control")
    await server.start()
    try:
        yield server
    finally:
        async with asyncio.timeout(5):
            await server.stop(grace_s)


async def send_chat(server: ApiServer, *, stream: bool) -> asyncio.StreamWriter:
    """Send a chat on a bare socket; nothing is read."""
    _, writer = await chat_socket(server, stream=stream)
    return writer


async def chat_socket(
    server: ApiServer, *, stream: bool
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    body = json.dumps(CHAT | {"stream": stream}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}"
    writer.write(head.encode() + b"\r\n\r\n" + body)
    await writer.drain()
    return reader, writer


async def test_it_answers_where_its_url_says() -> None:
    async with serving(FakeService()) as server, httpx.AsyncClient() as client:
        assert server.url.startswith("http://127.0.0.1:")
        response = await client.get(f"{server.url}/health")
    assert response.json() == {"status": "ok"}
    assert "server" not in response.headers


async def test_a_port_in_use_is_one_line_that_says_what_to_do() -> None:
    async with serving(FakeService()) as server:
        port = int(server.url.rsplit(":", 1)[1])
        with pytest.raises(ApiAddressInUse, match=f"127.0.0.1:{port} is in use.*--api-port"):
            await ApiServer(FakeService(), "127.0.0.1", port, None, "control").start()


async def test_the_port_is_free_after_a_stop() -> None:
    async with serving(FakeService()) as server, httpx.AsyncClient() as client:
        await client.get(f"{server.url}/health")
    again = ApiServer(
        FakeService(), "127.0.0.1", int(server.url.rsplit(":", 1)[1]), None, "control"
    )
    await again.start()
    await again.stop()


@pytest.mark.parametrize("host", [ANY, "::", "", "192.0.2.1", "node.example"])
def test_other_machines_are_not_let_in_without_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match=r"api_host: .* open to other machines"):
        ApiServer(FakeService(), host, 0, None, "control")


@pytest.mark.parametrize("key", ["", " "])
def test_an_empty_key_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="api_key: is empty"):
        ApiServer(FakeService(), "127.0.0.1", 0, key, "control")


async def test_with_a_key_every_address_can_be_listened_on() -> None:
    server = ApiServer(FakeService(), ANY, 0, "secret", "control")
    await server.start()
    try:
        assert server.url.startswith("http://127.0.0.1:")
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{server.url}/v1/models")).status_code == 401
    finally:
        await server.stop()


async def test_an_address_of_another_machine_is_a_config_error() -> None:
    server = ApiServer(FakeService(), "192.0.2.1", 0, "secret", "control")  # TEST-NET-1
    with pytest.raises(ConfigError, match="api_host: cannot listen on 192"):
        await server.start()


async def test_signals_stay_with_the_node() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    async with serving(FakeService()):
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_hangs_up_cancels(stream: bool) -> None:
    service = FakeService(started(), asyncio.Event())  # a prefill without end
    async with serving(service) as server:
        writer = await send_chat(server, stream=stream)
        async with asyncio.timeout(5):
            await service.opened.wait()
            assert not service.closed.is_set()
            writer.close()
            await service.closed.wait()


async def test_a_client_that_hangs_up_before_the_first_event_cancels() -> None:
    service = FakeService(asyncio.Event())
    async with serving(service) as server:
        writer = await send_chat(server, stream=True)
        writer.close()
        async with asyncio.timeout(5):
            await service.closed.wait()


async def test_a_stop_lets_an_answer_finish() -> None:
    gate = asyncio.Event()
    service = FakeService(started(), delta("a"), gate, *hello()[1:])
    async with serving(service) as server:
        reader, writer = await chat_socket(server, stream=True)
        await reader.readuntil(b'"a"')
        async with asyncio.timeout(5), asyncio.TaskGroup() as group:
            stopping = group.create_task(server.stop())
            while not await refuses(server.url):
                pass
            assert not stopping.done()
            gate.set()
            rest = await reader.read()
        assert b"data: [DONE]" in rest
        writer.close()


async def refuses(url: str) -> bool:
    """Whether nobody listens any more."""
    try:
        async with httpx.AsyncClient() as client:
            await client.get(f"{url}/health")
    except httpx.TransportError:
        return True
    return False


async def test_a_stop_ends_what_takes_too_long_with_an_error() -> None:
    service = FakeService(started(), delta("a"), asyncio.Event())
    async with serving(service) as server:
        reader, writer = await chat_socket(server, stream=True)
        await reader.readuntil(b'"a"')
        async with asyncio.timeout(5):
            await server.stop(0.0)
            rest = await reader.read()
        assert b"shutting_down" in rest
        assert b"[DONE]" not in rest
        assert service.closed.is_set()
        writer.close()


async def test_a_stop_ends_a_whole_answer_with_a_status() -> None:
    service = FakeService(started(), asyncio.Event())
    async with serving(service) as server:
        reader, writer = await chat_socket(server, stream=False)
        async with asyncio.timeout(5):
            await service.opened.wait()
            await server.stop(0.0)
            assert (await reader.readline()).startswith(b"HTTP/1.1 502")
        writer.close()


async def test_a_stop_is_bounded_even_by_a_client_that_reads_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("covey.node.api.server.HARD_STOP_S", 0.05)
    service = FakeService(started(), *[delta("x" * 2**20)] * 64)  # more than sockets hold
    async with serving(service) as server:
        writer = await send_chat(server, stream=True)
        async with asyncio.timeout(5):
            await service.opened.wait()
            await server.stop(0.05)
        assert service.closed.is_set()
        writer.transport.abort()


async def test_a_second_stop_does_nothing() -> None:
    server = ApiServer(FakeService(), "127.0.0.1", 0, None, "control")
    await server.stop()
    await server.start()
    await server.stop()
    await server.stop()


def openai_client(server: ApiServer, key: str = "any") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


async def test_openais_client_streams_a_chat() -> None:
    service = FakeService(*hello())
    async with serving(service) as server, openai_client(server) as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
            temperature=0,
            extra_body={"top_k": 3},
        )
        chunks = [chunk async for chunk in stream]
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(text or "" for text in texts) == "Hello!"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 2, 5)
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 1
    assert service.requests[0].params.top_k == 3


async def test_openais_client_reads_whole_answers_and_models() -> None:
    script = (started(), delta_with_logprob("Hi"), hello()[-1])
    async with serving(FakeService(*script)) as server, openai_client(server) as client:
        chat = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            logprobs=True,
            top_logprobs=2,
        )
        text = await client.completions.create(model=MODEL, prompt="once")
        models = [model.id async for model in client.models.list()]
        model = await client.models.retrieve(MODEL)
    assert chat.choices[0].message.content == text.choices[0].text == "Hi!"
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content is not None
    assert chat.choices[0].logprobs.content[0].top_logprobs[1].bytes == list(b"never")
    assert models == [model.id] == [MODEL]


async def test_openais_client_knows_our_errors() -> None:
    service = FakeService(Busy("full", 0.5))
    async with serving(service, api_key="secret") as server:
        async with openai_client(server) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        async with openai_client(server, "secret") as client:
            with pytest.raises(openai.RateLimitError):
                await client.completions.create(model=MODEL, prompt="once")
            with pytest.raises(openai.BadRequestError) as caught:
                await client.completions.create(model=MODEL, prompt="once", n=2)
            assert caught.value.param == "n"
            service.script = (started(), delta("a"), SessionFailed("peer_lost", "gone"))
            stream = await client.completions.create(model=MODEL, prompt="once", stream=True)
            with pytest.raises(openai.APIError, match="peer lost"):
                async for _ in stream:
                    pass
