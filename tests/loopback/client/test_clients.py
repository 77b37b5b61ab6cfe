"""Both clients against the real API on a socket, with a scripted service behind it."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from covey.client import (
    AsyncClient,
    BadRequest,
    Client,
    ClientError,
    ConnectionLost,
    GenerationFailed,
    ModelNotFound,
    NotReady,
    ServerBusy,
    Unauthorized,
)
from covey.node.api import ApiServer
from covey.node.errors import Busy, SessionFailed, UnknownModel
from covey.node.errors import NotReady as NodeNotReady
from support.fake_service import MODEL, FakeService, Step, delta, hello, started

pytestmark = pytest.mark.network

T = TypeVar("T")
HI = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def serving(
    *script: Step, api_key: str | None = None
) -> AsyncIterator[tuple[FakeService, str]]:
    service = FakeService(*script)
    server = ApiServer(service, "127.0.0.1", 0, api_key, "control")
    await server.start()
    try:
        yield service, server.url
    finally:
        await server.stop(0.0)


async def in_thread(work: Callable[[], T]) -> T:
    """Run the sync client beside the server's loop."""
    async with asyncio.timeout(10):
        return await asyncio.to_thread(work)


async def test_async_generate_and_chat() -> None:
    async with serving(*hello()) as (service, url), AsyncClient(url) as client:
        generation = await client.generate("once", max_tokens=4, temperature=0, stop=["x"])
        assert generation.text == "Hello!"
        assert generation.finish_reason == "stop"
        assert generation.usage.completion_tokens == 2
        assert generation.timing is not None
        assert generation.timing.tok_per_s == 2.0
        assert (await client.chat(HI, model=MODEL, seed=3)).text == "Hello!"
    first, second = service.requests
    assert (first.model, first.prompt, first.params.max_tokens) == (MODEL, "once", 4)
    assert first.params.stop == ("x",)
    assert (second.messages, second.params.seed) == (HI, 3)


async def test_sync_generate_and_chat() -> None:
    async with serving(*hello()) as (service, url):

        def work() -> None:
            with Client(url) as client:
                assert client.generate([1, 2], logit_bias={5: -1.0}).text == "Hello!"
                assert client.chat(HI, chat_template_kwargs={"a": 1}).text == "Hello!"

        await in_thread(work)
    first, second = service.requests
    assert first.prompt_ids == (1, 2)
    assert dict(first.params.logit_bias) == {5: -1.0}
    assert second.template_kwargs == {"a": 1}


async def test_an_async_stream_has_its_result_at_the_end() -> None:
    async with serving(*hello()) as (_, url), AsyncClient(url) as client:
        stream = await client.chat(HI, stream=True)
        with pytest.raises(RuntimeError, match="to its end first"):
            _ = stream.result
        assert [chunk.text async for chunk in stream] == ["Hel", "lo", "!"]
        assert stream.result.text == "Hello!"
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_a_sync_stream_has_its_result_at_the_end() -> None:
    async with serving(*hello()) as (_, url):

        def work() -> None:
            with Client(url) as client, client.generate("once", stream=True) as stream:
                assert [chunk.text for chunk in stream] == ["Hel", "lo", "!"]
                assert stream.result.text == "Hello!"
                assert list(stream) == []

        await in_thread(work)


async def test_closing_an_async_stream_cancels() -> None:
    script = (started(), delta("a"), asyncio.Event())
    async with serving(*script) as (service, url), AsyncClient(url) as client:
        async with await client.chat(HI, stream=True) as stream:
            assert (await anext(stream)).text == "a"
        async with asyncio.timeout(5):
            await service.closed.wait()
        assert [chunk async for chunk in stream] == []


def leave_the_loop(client: Client) -> None:
    for chunk in client.chat(HI, stream=True):
        assert chunk.text == "a"
        break


def read_nothing(client: Client) -> None:
    client.chat(HI, stream=True)


@pytest.mark.parametrize("use", [leave_the_loop, read_nothing])
async def test_dropping_a_sync_stream_cancels(use: Callable[[Client], None]) -> None:
    async with serving(started(), delta("a"), asyncio.Event()) as (service, url):
        go_on = threading.Event()

        def work() -> None:
            with Client(url) as client:
                use(client)
                go_on.wait(5)  # the client itself is still open

        working = asyncio.create_task(asyncio.to_thread(work))
        async with asyncio.timeout(3):
            await service.closed.wait()
        go_on.set()
        await working


async def test_cancelling_an_async_call_cancels_the_generation() -> None:
    script = (started(), asyncio.Event())
    async with serving(*script) as (service, url), AsyncClient(url) as client:
        call = asyncio.create_task(client.generate("once", model=MODEL))
        async with asyncio.timeout(5):
            await service.opened.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await service.closed.wait()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Busy("full", 0.25), ServerBusy),
        (NodeNotReady("tiny", "no plan", 0.5), NotReady),
        (UnknownModel("x", (MODEL,)), ModelNotFound),
        (SessionFailed("peer_lost", "gone"), GenerationFailed),
    ],
)
async def test_errors_have_their_class(error: Exception, kind: type[ClientError]) -> None:
    async with serving(error) as (_, url), AsyncClient(url) as client:
        with pytest.raises(kind, match=str(error)[:10]):
            await client.generate("once")

        def work() -> None:
            with Client(url) as client, pytest.raises(kind, match=str(error)[:10]):
                client.generate("once", stream=True)

        await in_thread(work)


async def test_who_is_busy_says_for_how_long() -> None:
    async with serving(Busy("full", 0.25)) as (_, url), AsyncClient(url) as client:
        with pytest.raises(ServerBusy) as caught:
            await client.generate("once")
    assert caught.value.retry_after_s == 0.25


async def test_a_wrong_option_is_named() -> None:
    async with serving(*hello()) as (_, url), AsyncClient(url) as client:
        with pytest.raises(BadRequest) as caught:
            await client.generate("once", temperature=9.0)
    assert caught.value.param == "temperature"


async def test_an_error_in_the_middle_comes_after_the_text_before_it() -> None:
    script = (started(), delta("a"), SessionFailed("peer_lost", "gone"))
    async with serving(*script) as (_, url), AsyncClient(url) as client:
        stream = await client.chat(HI, stream=True)
        assert (await anext(stream)).text == "a"
        with pytest.raises(GenerationFailed) as caught:
            await anext(stream)
    assert caught.value.code == "peer_lost"


async def test_a_key_is_sent() -> None:
    async with serving(*hello(), api_key="secret") as (_, url):
        async with AsyncClient(url, api_key="secret") as client:
            assert (await client.models())[0].id == MODEL
        async with AsyncClient(url) as client:
            with pytest.raises(Unauthorized):
                await client.models()


async def test_a_local_node_is_found_and_controlled(tmp_path: Path) -> None:
    async with serving(*hello(), api_key="secret") as (service, url):
        facts = {"url": url, "key": "control", "pid": os.getpid()}
        (tmp_path / "api.json").write_text(json.dumps(facts))
        async with AsyncClient(home=tmp_path) as client:
            assert await client.status() == service.status_facts
            assert (await client.plan(MODEL, "latency"))["prefer"] == "latency"
            assert await client.invite(ttl_s=60, uses=3) == "covey1abc"
            with pytest.raises(ModelNotFound):
                await client.plan("other")

        def work() -> None:
            with Client(home=str(tmp_path)) as client:
                assert client.chat(HI).text == "Hello!"
                assert client.models()[0].is_ready
                assert client.status() == service.status_facts
                assert client.plan(MODEL)["prefer"] is None
                assert client.invite() == "covey1abc"
                client.stop()

        await in_thread(work)
    assert service.invites == [(60.0, 3), (3600.0, 1)]
    assert service.was_stopped


async def test_a_node_that_is_not_there_is_a_lost_connection() -> None:
    async with serving() as (_, url):
        pass
    with Client(url) as client, pytest.raises(ConnectionLost, match="no node answers at http"):
        client.models()


async def test_a_node_that_is_silent_is_a_lost_connection() -> None:
    script = (started(), asyncio.Event())
    async with serving(*script) as (_, url), AsyncClient(url, timeout=0.2) as client:
        with pytest.raises(ConnectionLost, match="fell silent"):
            await client.generate("once")


async def test_a_node_that_dies_in_the_middle_is_a_lost_connection() -> None:
    async def dying(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        event = b'data: {"choices":[{"text":"a"}]}\n\n'
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(dying, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, AsyncClient(f"http://127.0.0.1:{port}") as client:
        stream = await client.generate("once", model=MODEL, stream=True)
        assert (await anext(stream)).text == "a"
        with pytest.raises(ConnectionLost, match="broke"):
            await anext(stream)
