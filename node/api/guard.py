"""Who may ask: the key, the `Host` and `Origin` of a request, the size and time of its body.

On loopback there may be no key, so a web page that the user has open must not get in: neither
by a name of its own that resolves to 127.0.0.1 (DNS rebinding: `Host` tells) nor by posting
blindly to ours (`Origin` tells). No CORS header is ever sent.
"""

from __future__ import annotations

import asyncio
import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ErrorReply, Refused

MAX_BODY_BYTES = 4 * 1024 * 1024
BODY_TIMEOUT_S = 30.0  # 4 MiB over 1 Mbit/s

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def check_key(headers: Headers, keys: tuple[str, ...]) -> None:
    """Raise `Refused` (401) unless the request carries one of `keys` as its bearer token."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = token.strip().encode("latin-1")
    # Every key is compared, so that the time taken tells nothing.
    matches = [hmac.compare_digest(given, key.encode()) for key in keys]
    if scheme.lower() != "bearer" or not any(matches):
        raise Refused(
            ErrorReply(
                status=401,
                message="no or a wrong API key: send it as 'Authorization: Bearer <key>'",
                code="invalid_api_key",
            )
        )


async def read_body(request: Request) -> bytes:
    """The whole body of a request.

    Raises:
        Refused: larger than `MAX_BODY_BYTES` (413), or not here within `BODY_TIMEOUT_S` (408).
    """
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared[:20]) > MAX_BODY_BYTES:
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
    except TimeoutError:
        message = f"the request's body was not complete within {BODY_TIMEOUT_S:g} s"
        raise Refused(ErrorReply(status=408, message=message, code="timeout")) from None
    except ClientDisconnect:
        # Nobody will read it, but the request has to end somehow.
        message = "the client went away"
        raise Refused(ErrorReply(status=400, message=message, code="disconnected")) from None
    return bytes(body)


def _too_large() -> Refused:
    message = f"the request is larger than {MAX_BODY_BYTES // 1024**2} MiB: shorten it"
    return Refused(ErrorReply(status=413, message=message, code="request_too_large"))


class LoopbackGuard:
    """ASGI middleware: lets nothing in that a foreign web page could have sent."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._names = LOOPBACK_NAMES | {host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 403."""
        if scope["type"] == "http" and (message := self._fault(Headers(scope=scope))):
            reply = ErrorReply(status=403, message=message, code="forbidden_origin")
            await JSONResponse(reply.body(), reply.status)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _fault(self, headers: Headers) -> str | None:
        host = headers.get("host", "")
        if _hostname(host) not in self._names:
            return "this node answers to localhost only: use http://127.0.0.1 in the URL"
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != host.lower():
            return "requests from other web pages are refused: call the node from a program"
        return None


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _netloc(origin: str) -> str | None:
    """`127.0.0.1:8080` of `http://127.0.0.1:8080`; None of what is no URL."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None
