"""The client for asyncio programs; `sync_client.py` with awaits, what both know is elsewhere."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import httpx

from .errors import ClientError
from .head import START_TIMEOUT_S, HeadOnlyNode
from .local import LocalNode
from .protocol import (
    CHAT,
    COMPLETIONS,
    TextParser,
    error_of,
    generation_body,
    invite_of,
    models_of,
    object_of,
    only_model,
)
from .target import (
    MAX_ANSWER_BYTES,
    HeadToStart,
    find_target,
    http_settings,
    target_of,
    translated,
    without_nones,
)
from .types import ChatOptions, Chunk, Generation, Model, PlanOptions, SamplingOptions


class AsyncClient:
    """Talks to one node, from one event loop. Close it, or use `async with`."""

    def __init__(
        self,
        url_or_invite: str | None = None,
        *,
        api_key: str | None = None,
        home: Path | str | None = None,
        timeout: float = 30.0,
    ) -> None:
        """Find the node; a head-only one is started with `async with` or the first call.

        Args: as of `Client`.

        Raises:
            NoLocalNode: no node runs and there is no swarm to return to.
            ClientError: neither a URL nor an invite.
        """
        self._target = find_target(
            url_or_invite, api_key=api_key, home=None if home is None else Path(home)
        )
        self._api_key = api_key
        self._timeout_s = timeout
        self._head: HeadOnlyNode | None = None
        self._http: httpx.AsyncClient | None = None
        self._connecting = asyncio.Lock()

    async def aclose(self) -> None:
        """Close connections, which cancels what still runs, and stop a node that this started."""
        if self._http is not None:
            await self._http.aclose()
        if self._head is not None:
            await asyncio.to_thread(self._head.close)

    async def __aenter__(self) -> Self:
        """Start a head-only node if one is needed.

        Raises:
            NoLocalNode: it could not be started.
        """
        await self._connect()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        await self.aclose()

    @overload
    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        model: str | None = None,
        stream: Literal[False] = False,
        **options: Unpack[SamplingOptions],
    ) -> Generation: ...

    @overload
    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        model: str | None = None,
        stream: Literal[True],
        **options: Unpack[SamplingOptions],
    ) -> AsyncTextStream: ...

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        model: str | None = None,
        stream: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Generation | AsyncTextStream:
        """Continue a text, or token ids.

        Args:
            model: by default the first one that is ready.
            stream: return at once, an iterator over the pieces of the text.
            options: see `SamplingOptions`.

        Raises:
            ClientError: see `errors.py` for its kinds; all but `GenerationFailed` and
                `ConnectionLost` come before any text.
        """
        body = generation_body(model or await self._only_model(), options, prompt=prompt)
        return await self._text(COMPLETIONS, body, stream=stream)

    @overload
    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        model: str | None = None,
        stream: Literal[False] = False,
        **options: Unpack[ChatOptions],
    ) -> Generation: ...

    @overload
    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        model: str | None = None,
        stream: Literal[True],
        **options: Unpack[ChatOptions],
    ) -> AsyncTextStream: ...

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        model: str | None = None,
        stream: bool = False,
        **options: Unpack[ChatOptions],
    ) -> Generation | AsyncTextStream:
        """Answer a conversation of `{"role": ..., "content": ...}`; otherwise as `generate`."""
        body = generation_body(model or await self._only_model(), options, messages=messages)
        return await self._text(CHAT, body, stream=stream)

    async def models(self) -> list[Model]:
        """Every model of the swarm, ready or not."""
        return models_of(await self._call("GET", "/v1/models"))

    async def status(self) -> dict[str, Any]:
        """The node, its members, links and sessions; needs the control key, as a local node has."""
        return object_of(await self._call("GET", "/covey/status"))

    async def plan(
        self, model: str, prefer: str | None = None, **options: Unpack[PlanOptions]
    ) -> dict[str, Any]:
        """The plans of a model and which one is used; needs the control key.

        Args:
            prefer: "latency", "throughput" or "balanced"; by default what the node is set to.
            options: see `PlanOptions`.
        """
        query = without_nones(model=model, prefer=prefer, **options)
        return object_of(await self._call("GET", "/covey/plan", params=query))

    async def pin_plan(self, model: str, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Have the swarm run a plan for as long as it can; needs the control key.

        Args:
            plan: `{"pipelines": ...}` of a point that `plan` gave, or of your own making.

        Raises:
            BadRequest: no plan of this model, or one that cannot run; the text says why.
        """
        body = {"model": model, "plan": {"pipelines": plan.get("pipelines")}}
        return object_of(await self._call("POST", "/covey/plan/pin", json=body))

    async def unpin_plan(self, model: str) -> dict[str, Any]:
        """Let the swarm choose its plan again; needs the control key."""
        return object_of(await self._call("POST", "/covey/plan/unpin", json={"model": model}))

    async def invite(self, *, ttl_s: float = 3600.0, uses: int = 1) -> str:
        """A new invite into the swarm; needs the control key."""
        return invite_of(
            await self._call("POST", "/covey/invite", json={"ttl_s": ttl_s, "uses": uses})
        )

    async def members(self) -> dict[str, Any]:
        """Who is in the swarm, and who was removed; needs the control key."""
        return object_of(await self._call("GET", "/covey/members"))

    async def doctor(self) -> dict[str, Any]:
        """What stands between the node and the others, found out anew; needs the control key."""
        return object_of(await self._call("GET", "/covey/doctor"))

    async def ping(self, member: str, *, count: int = 10) -> dict[str, Any]:
        """The node's link to a member, measured; needs the control key."""
        body = {"member": member, "count": count}
        return object_of(await self._call("POST", "/covey/ping", json=body))

    async def remove_member(self, member: str, *, with_invited: bool = False) -> dict[str, Any]:
        """Remove a member for good, by name, peer id or its end; needs the control key."""
        body = {"member": member, "with_invited": with_invited}
        return object_of(await self._call("POST", "/covey/members/remove", json=body))

    async def allow_member(self, member: str) -> dict[str, Any]:
        """Let a member remove others; only at the founder's node; needs the control key."""
        body = {"member": member}
        return object_of(await self._call("POST", "/covey/members/allow", json=body))

    async def stop(self) -> None:
        """Stop the node, gracefully; needs the control key."""
        await self._call("POST", "/covey/stop")

    async def _only_model(self) -> str:
        return only_model(await self.models())

    async def _text(
        self, path: str, body: dict[str, Any], *, stream: bool
    ) -> Generation | AsyncTextStream:
        text = AsyncTextStream(await self._open("POST", path, json=body))
        if stream:
            return text
        async with text:
            async for _ in text:
                pass
            return text.result

    async def _call(self, method: str, path: str, **options: Any) -> bytes:
        response = await self._open(method, path, **options)
        try:
            return await _read(response)
        finally:
            await response.aclose()

    async def _open(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send; the caller closes the response, whose body was not read."""
        http = await self._connect()
        with translated(http.base_url):
            request = http.build_request(method, path, **options)
            response = await http.send(request, stream=True)
        if response.status_code == 200:
            return response
        try:
            body = await _read(response)
        finally:
            await response.aclose()
        raise error_of(response.status_code, response.headers, body)

    async def _connect(self) -> httpx.AsyncClient:
        async with self._connecting:
            if self._http is None:
                target = self._target
                if isinstance(target, HeadToStart):
                    target = target_of(await self._start(target), self._api_key)
                self._http = httpx.AsyncClient(**http_settings(target, self._timeout_s))
            return self._http

    async def _start(self, head: HeadToStart) -> LocalNode:
        cancelled = threading.Event()
        self._head = child = await asyncio.to_thread(head.start)
        try:
            return await asyncio.to_thread(child.wait, START_TIMEOUT_S, cancelled)
        except BaseException:
            cancelled.set()
            await asyncio.to_thread(child.close)
            raise


class AsyncTextStream(AsyncIterator[Chunk]):
    """The pieces of a text as they come; closing it before the end cancels the generation."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._received = response.aiter_bytes()
        self._parser = TextParser()
        self._ready: list[Chunk] = []  # next one last
        self._result: Generation | None = None

    @property
    def result(self) -> Generation:
        """The whole answer, once the iterator is exhausted."""
        if self._result is None:
            raise RuntimeError("read the stream to its end first")
        return self._result

    async def aclose(self) -> None:
        """Close the connection; again does nothing."""
        self._ready.clear()
        await self._response.aclose()

    async def __anext__(self) -> Chunk:
        """The next piece.

        Raises:
            GenerationFailed, ConnectionLost: there will be no more; what came so far is valid.
        """
        try:
            while not self._ready and not self._response.is_closed:
                await self._receive()
        except ClientError:
            await self.aclose()
            raise
        if not self._ready:
            raise StopAsyncIteration
        return self._ready.pop()

    async def _receive(self) -> None:
        with translated(self._response.url):
            received = await anext(self._received, None)
        if received is None:
            self._result = self._parser.result()
            await self.aclose()
        else:
            self._ready = self._parser.feed(received)[::-1]

    async def __aenter__(self) -> Self:
        """Itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        await self.aclose()


async def _read(response: httpx.Response) -> bytes:
    body = bytearray()
    with translated(response.url):
        async for piece in response.aiter_bytes():
            body += piece
            if len(body) > MAX_ANSWER_BYTES:
                raise ClientError("the node's answer is too large to be one of ours")
    return bytes(body)
