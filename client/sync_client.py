"""The client for ordinary programs. See `async_client.py` for its twin."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import httpx

from .errors import ClientError
from .head import START_TIMEOUT_S, HeadOnlyNode
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


class Client:
    """Talks to one node; thread-safe as far as httpx is. Close it, or use `with`."""

    def __init__(
        self,
        url_or_invite: str | None = None,
        *,
        api_key: str | None = None,
        home: Path | str | None = None,
        timeout: float = 30.0,
    ) -> None:
        """Find the node, or start a head-only one and wait for it.

        Args:
            url_or_invite: a node's URL; or an invite, to join its swarm with a head-only node
                of this client's own; or None for the node of this machine (see `home`).
            api_key: what a node with a key asks for; a local node's own key is found.
            home: of the local node, by default `COVEY_HOME` or the platform's folder. If none
                runs and the home has a saved swarm, a head-only node is started there.
            timeout: seconds of silence after which a node counts as lost. A node that computes
                is not silent: it sends something every ten seconds.

        Raises:
            NoLocalNode: no node runs and none could be started.
            ClientError: neither a URL nor an invite.
        """
        target = find_target(
            url_or_invite, api_key=api_key, home=None if home is None else Path(home)
        )
        self._head: HeadOnlyNode | None = None
        if isinstance(target, HeadToStart):
            self._head = target.start()
            try:
                node = self._head.wait(START_TIMEOUT_S, threading.Event())
            except BaseException:
                self._head.close()
                raise
            target = target_of(node, api_key)
        self._http = httpx.Client(**http_settings(target, timeout))

    def close(self) -> None:
        """Close connections, which cancels what still runs, and stop a node that this started."""
        self._http.close()
        if self._head is not None:
            self._head.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        model: str | None = None,
        stream: Literal[False] = False,
        **options: Unpack[SamplingOptions],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        model: str | None = None,
        stream: Literal[True],
        **options: Unpack[SamplingOptions],
    ) -> TextStream: ...

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        model: str | None = None,
        stream: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Generation | TextStream:
        """Continue a text, or token ids.

        Args:
            model: by default the first one that is ready.
            stream: return at once, an iterator over the pieces of the text.
            options: see `SamplingOptions`.

        Raises:
            ClientError: see `errors.py` for its kinds; all but `GenerationFailed` and
                `ConnectionLost` come before any text.
        """
        body = generation_body(model or self._only_model(), options, prompt=prompt)
        return self._text(COMPLETIONS, body, stream=stream)

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        model: str | None = None,
        stream: Literal[False] = False,
        **options: Unpack[ChatOptions],
    ) -> Generation: ...

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        model: str | None = None,
        stream: Literal[True],
        **options: Unpack[ChatOptions],
    ) -> TextStream: ...

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        model: str | None = None,
        stream: bool = False,
        **options: Unpack[ChatOptions],
    ) -> Generation | TextStream:
        """Answer a conversation of `{"role": ..., "content": ...}`; otherwise as `generate`."""
        body = generation_body(model or self._only_model(), options, messages=messages)
        return self._text(CHAT, body, stream=stream)

    def models(self) -> list[Model]:
        """Every model of the swarm, ready or not."""
        return models_of(self._call("GET", "/v1/models"))

    def status(self) -> dict[str, Any]:
        """The node, its members, links and sessions; needs the control key, as a local node has."""
        return object_of(self._call("GET", "/covey/status"))

    def plan(
        self, model: str, prefer: str | None = None, **options: Unpack[PlanOptions]
    ) -> dict[str, Any]:
        """The plans of a model and which one is used; needs the control key.

        Args:
            prefer: "latency", "throughput" or "balanced"; by default what the node is set to.
            options: see `PlanOptions`.
        """
        query = without_nones(model=model, prefer=prefer, **options)
        return object_of(self._call("GET", "/covey/plan", params=query))

    def pin_plan(self, model: str, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Have the swarm run a plan for as long as it can; needs the control key.

        Args:
            plan: `{"pipelines": ...}` of a point that `plan` gave, or of your own making.

        Raises:
            BadRequest: no plan of this model, or one that cannot run; the text says why.
        """
        body = {"model": model, "plan": {"pipelines": plan.get("pipelines")}}
        return object_of(self._call("POST", "/covey/plan/pin", json=body))

    def unpin_plan(self, model: str) -> dict[str, Any]:
        """Let the swarm choose its plan again; needs the control key."""
        return object_of(self._call("POST", "/covey/plan/unpin", json={"model": model}))

    def invite(self, *, ttl_s: float = 3600.0, uses: int = 1) -> str:
        """A new invite into the swarm; needs the control key."""
        return invite_of(self._call("POST", "/covey/invite", json={"ttl_s": ttl_s, "uses": uses}))

    def members(self) -> dict[str, Any]:
        """Who is in the swarm, and who was removed; needs the control key."""
        return object_of(self._call("GET", "/covey/members"))

    def doctor(self) -> dict[str, Any]:
        """What stands between the node and the others, found out anew; needs the control key."""
        return object_of(self._call("GET", "/covey/doctor"))

    def ping(self, member: str, *, count: int = 10) -> dict[str, Any]:
        """The node's link to a member, measured; needs the control key."""
        body = {"member": member, "count": count}
        return object_of(self._call("POST", "/covey/ping", json=body))

    def remove_member(self, member: str, *, with_invited: bool = False) -> dict[str, Any]:
        """Remove a member for good, by name, peer id or its end; needs the control key."""
        body = {"member": member, "with_invited": with_invited}
        return object_of(self._call("POST", "/covey/members/remove", json=body))

    def allow_member(self, member: str) -> dict[str, Any]:
        """Let a member remove others; only at the founder's node; needs the control key."""
        body = {"member": member}
        return object_of(self._call("POST", "/covey/members/allow", json=body))

    def stop(self) -> None:
        """Stop the node, gracefully; needs the control key."""
        self._call("POST", "/covey/stop")

    def _only_model(self) -> str:
        return only_model(self.models())

    def _text(self, path: str, body: dict[str, Any], *, stream: bool) -> Generation | TextStream:
        text = TextStream(self._open("POST", path, json=body))
        if stream:
            return text
        with text:
            for _ in text:
                pass
            return text.result

    def _call(self, method: str, path: str, **options: Any) -> bytes:
        response = self._open(method, path, **options)
        try:
            return _read(response)
        finally:
            response.close()

    def _open(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send; the caller closes the response, whose body was not read."""
        with translated(self._http.base_url):
            request = self._http.build_request(method, path, **options)
            response = self._http.send(request, stream=True)
        if response.status_code == 200:
            return response
        try:
            body = _read(response)
        finally:
            response.close()
        raise error_of(response.status_code, response.headers, body)


class TextStream(Iterator[Chunk]):
    """The pieces of a text as they come; closing it before the end cancels the generation."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._received = response.iter_bytes()
        self._parser = TextParser()
        self._ready: list[Chunk] = []  # next one last
        self._result: Generation | None = None

    @property
    def result(self) -> Generation:
        """The whole answer, once the iterator is exhausted."""
        if self._result is None:
            raise RuntimeError("read the stream to its end first")
        return self._result

    def close(self) -> None:
        """Close the connection; again does nothing."""
        self._ready.clear()
        self._response.close()

    def __next__(self) -> Chunk:
        """The next piece.

        Raises:
            GenerationFailed, ConnectionLost: there will be no more; what came so far is valid.
        """
        try:
            while not self._ready and not self._response.is_closed:
                self._receive()
        except ClientError:
            self.close()
            raise
        if not self._ready:
            raise StopIteration
        return self._ready.pop()

    def _receive(self) -> None:
        with translated(self._response.url):
            received = next(self._received, None)
        if received is None:
            self._result = self._parser.result()
            self.close()
        else:
            self._ready = self._parser.feed(received)[::-1]

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def __del__(self) -> None:
        """Close, so that leaving a loop with `break` cancels."""
        self.close()


def _read(response: httpx.Response) -> bytes:
    body = bytearray()
    with translated(response.url):
        for piece in response.iter_bytes():
            body += piece
            if len(body) > MAX_ANSWER_BYTES:
                raise ClientError("the node's answer is too large to be one of ours")
    return bytes(body)
