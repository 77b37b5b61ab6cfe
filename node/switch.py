"""Carries messages to whoever handles them: a handler in this node, or a peer over its link.

A pipeline whose first stage lives on the head's own node is ordinary, so code that talks to
"the peer of stage 0" must not care whether that is ourselves. Frames of one sender are handed
to their handler in the order in which they arrived.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from types import MappingProxyType
from typing import Any

from covey.errors import CoveyError
from covey.transport.errors import (
    ErrorCode,
    LinkTimeout,
    ProtocolViolation,
    RefusedByPeer,
    TransportError,
)
from covey.transport.frame import Frame, Tensor
from covey.transport.messages import AnyMessage, Failure, Message
from covey.transport.peer import Peer
from covey.transport.tasks import Tasks

from .engine.errors import CacheFull, LeaseExpired, UnknownSession

#: Takes (sender, message, tensors); raising a ProtocolViolation closes the sender's link.
OneWay = Callable[[str, Any, Mapping[str, Tensor]], None]
#: Takes (sender, message) and returns the answer; a CoveyError becomes a Failure with its code.
#: It is called as soon as the request has come, so what a plain function does before it returns
#: its coroutine keeps the order of the sender's frames.
Request = Callable[[str, Any], Coroutine[Any, Any, AnyMessage]]

#: Codes of errors that do not know the wire themselves, most special first.
_CODES: Mapping[type[CoveyError], ErrorCode] = MappingProxyType(
    {
        CacheFull: ErrorCode.CACHE_FULL,
        LeaseExpired: ErrorCode.DEADLINE_EXCEEDED,
        UnknownSession: ErrorCode.UNKNOWN_SESSION,
        TransportError: ErrorCode.PEER_LOST,
    }
)


class UnexpectedMessage(ProtocolViolation):
    """A message of a kind that nobody here handles; its link is closed."""

    code = ErrorCode.UNKNOWN_MESSAGE


class WrongFrame(ProtocolViolation):
    """A session's frame that contradicts its plan or what went before; its link is closed."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class Switch:
    """Routes messages of one node. `find_peer` yields a live link, dialling if need be."""

    def __init__(self, own_peer_id: str, find_peer: Callable[[str], Awaitable[Peer]]) -> None:
        self.own_peer_id = own_peer_id
        self._find_peer = find_peer
        self._one_way: dict[type[Message], OneWay] = {}
        self._requests: dict[type[Message], Request] = {}
        self._tasks = Tasks()

    def on_message(self, kind: type[Message], handler: OneWay) -> None:
        """Handle one-way messages of a kind; the handler must not block."""
        self._one_way[kind] = handler

    def on_request(self, kind: type[Message], handler: Request) -> None:
        """Handle requests of a kind; the coroutine of each runs in a task of its own."""
        self._requests[kind] = handler

    async def send(
        self, to: str, message: AnyMessage, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Send a one-way message.

        Raises:
            TransportError: no path, or the link ended.
        """
        if to == self.own_peer_id:
            self._one_way[type(message)](to, message, tensors or {})
            return
        await (await self._find_peer(to)).send(message, tensors or {})

    async def request(self, to: str, message: AnyMessage, *, timeout_s: float) -> AnyMessage:
        """Send a request and return the answer.

        Raises:
            RefusedByPeer: it said no, and why.
            TransportError: no path, no answer in time, or the link ended.
        """
        if to == self.own_peer_id:
            try:
                async with asyncio.timeout(timeout_s):
                    return await self._begin(to, message)
            except TimeoutError as error:
                raise LinkTimeout(type(message).__name__, timeout_s) from error
            except CoveyError as error:
                raise RefusedByPeer(code_of(error)) from error
        peer = await self._find_peer(to)
        return (await peer.request(message, timeout_s=timeout_s)).message

    def receive(self, peer: Peer, frame: Frame) -> None:
        """Take a frame from a link; the mesh calls this in order for each peer.

        Raises:
            ProtocolViolation: the peer is wrong; whoever reads the link closes it with the code.
        """
        kind = type(frame.message)
        if frame.request is not None:
            self._take_request(peer, frame)
        elif kind in self._one_way:
            self._one_way[kind](peer.peer_id, frame.message, frame.tensors)
        else:
            raise UnexpectedMessage(f"nobody here takes a {kind.__name__}")

    async def aclose(self) -> None:
        """Cancel the requests that are being answered."""
        await self._tasks.aclose()

    def _take_request(self, peer: Peer, frame: Frame) -> None:
        try:
            answer = self._begin(peer.peer_id, frame.message)
        except CoveyError as error:
            peer.reply(frame, Failure(code=code_of(error)))
            return
        task = self._tasks.spawn(self._serve(peer, frame, answer), "answer")
        task.add_done_callback(lambda _: answer.close())  # were it cancelled before it began

    def _begin(self, sender: str, message: AnyMessage) -> Coroutine[Any, Any, AnyMessage]:
        handler = self._requests.get(type(message))
        if handler is None:
            raise RefusedByPeer(ErrorCode.UNKNOWN_MESSAGE)
        return handler(sender, message)

    async def _serve(self, peer: Peer, frame: Frame, answer: Awaitable[AnyMessage]) -> None:
        reply: AnyMessage = Failure(code=ErrorCode.INTERNAL)  # of a bug, which `Tasks` logs
        try:
            reply = await answer
        except CoveyError as error:
            reply = Failure(code=code_of(error))
        except asyncio.CancelledError:
            reply = Failure(code=ErrorCode.SHUTTING_DOWN)
            raise
        finally:
            peer.reply(frame, reply)


def code_of(error: CoveyError) -> ErrorCode:
    """The wire's code for an error: its own, or `internal` for one that a peer cannot act on."""
    code = getattr(error, "code", None)
    if isinstance(code, ErrorCode):
        return code
    codes = (code for kind, code in _CODES.items() if isinstance(error, kind))
    return next(codes, ErrorCode.INTERNAL)
