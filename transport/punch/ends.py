"""Which of the sockets that connected is *the* one: both ends must take the same.

Connecting proves nothing: the address may be a stranger's, the other end may have given up that
very attempt, and several sockets may connect at once. So the dialer sends a preamble, each with a
nonce of its own, on every socket; the acceptor answers the first good one with a receipt, which
only a holder of the key can make, and closes the rest; the dialer takes the socket on which the
receipt comes. There is one receipt, so there is one socket, and it has carried bytes both ways.

What follows on it is TLS, by `handshake.dial(..., is_announced=True)` and `handshake.accept`.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from covey.transport.errors import LinkBroken, LinkTimeout
from covey.transport.handshake import Credentials, announce
from covey.transport.listener import PREAMBLE_S, receive_exactly
from covey.transport.preamble import (
    PREAMBLE_BYTES,
    RECEIPT_BYTES,
    PreambleGate,
    Verdict,
    build_receipt,
)
from covey.transport.tasks import Tasks

from .sockets import Connections, hard_close

T = TypeVar("T")


async def dialer_end(
    connections: Connections, credentials: Credentials, *, peer_id: str
) -> socket.socket:
    """The socket that the peer has chosen, its preamble sent; the caller owns it.

    Raises:
        LinkTimeout: none by the deadline of `connections`.
    """

    async def settle(connection: socket.socket) -> socket.socket | None:
        preamble = announce(connection, credentials, peer_id=peer_id)
        receipt = await receive_exactly(connection, RECEIPT_BYTES)
        expected = build_receipt(preamble, key=credentials.preamble_key, peer_id=peer_id)
        return connection if hmac.compare_digest(receipt, expected) else None

    return await _first(connections, settle)


async def acceptor_end(connections: Connections, gate: PreambleGate) -> tuple[socket.socket, bytes]:
    """The first socket on which a good preamble came, and its key id; the caller owns the socket.

    Raises:
        LinkTimeout: none by the deadline of `connections`.
    """
    has_chosen = False

    async def settle(connection: socket.socket) -> tuple[socket.socket, bytes] | None:
        nonlocal has_chosen
        async with asyncio.timeout(PREAMBLE_S):
            preamble = await receive_exactly(connection, PREAMBLE_BYTES)
        verdict, key_id = gate.judge(preamble, unix_time=time.time())
        if verdict is not Verdict.GOOD or has_chosen:
            return None
        connection.send(gate.receipt(preamble))  # a fresh socket has room for 32 bytes
        has_chosen = True
        return connection, key_id

    return await _first(connections, settle)


async def _first(
    connections: Connections,
    settle: Callable[[socket.socket], Coroutine[Any, Any, T | None]],
) -> T:
    """What `settle` makes of the first socket that it does not reject; closes all others."""
    found: asyncio.Future[tuple[socket.socket, T]] = asyncio.get_running_loop().create_future()
    ended = asyncio.Event()
    taken: set[socket.socket] = (
        set()
    )  # and not closed yet: a task that is cancelled may never begin
    tasks = Tasks()

    async def judge(connection: socket.socket) -> None:
        with suppress(OSError, EOFError, LinkBroken):  # TimeoutError is among them
            settled = await settle(connection)
            if settled is not None and not found.done():
                found.set_result((connection, settled))
                return
        taken.discard(connection)
        hard_close(connection)

    async def judge_all() -> None:
        async for connection in connections:
            taken.add(connection)
            tasks.spawn(judge(connection), "judge a punched socket")

    began = time.monotonic()
    try:
        async with connections:
            judging = tasks.spawn(judge_all(), "punch")
            judging.add_done_callback(lambda _: ended.set())
            found.add_done_callback(lambda _: ended.set())
            await ended.wait()
        await tasks.aclose()
        if not found.done():
            raise LinkTimeout("punching", round(time.monotonic() - began, 1))
        connection, settled = found.result()
        taken.discard(connection)
        return settled
    finally:
        try:
            await tasks.aclose()
        finally:
            for connection in taken:
                hard_close(connection)
