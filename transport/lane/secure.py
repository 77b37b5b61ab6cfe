"""From a connected socket to a lane that only the two who agreed on it can speak on.

Over the network: TLS 1.3 with the swarm's certificates, and the identity that was agreed. Within
one machine: both ends prove the lane's key, which only the two know, since the link that it was
agreed on is authenticated. Whoever was connected to says last, once it is satisfied, which lane it
is: in TLS 1.3 the dialer's handshake is over before its certificate was judged.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import socket
import ssl
from collections.abc import Callable

from covey.transport.errors import LinkBroken, LinkTimeout, NotAMember
from covey.transport.listener import receive_exactly
from covey.transport.tls import TlsContexts, authenticate

from .wire import PlainWire, TlsWire, Wire

HANDSHAKE_S = 5.0
LOCAL_S = 1.0
LANE_ID_BYTES = 16
KEY_BYTES = 32

_NONCE_BYTES = 16
_PROOF_BYTES = 32
_READ_BYTES = 16 << 10

IsAllowed = Callable[[str], bool]


async def secure_tls(
    connection: socket.socket,
    contexts: TlsContexts,
    lane_id: bytes,
    *,
    peer_id: str,
    is_dialer: bool,
    is_allowed: IsAllowed,
) -> TlsWire:
    """TLS over a connected socket whose preamble has passed; owns the socket from here.

    Raises:
        NotAMember: somebody else than `peer_id` is there, or it is not allowed.
        LinkBroken: the handshake failed.
        LinkTimeout: it took too long.
    """
    handshake = _Handshake(connection, contexts.client if is_dialer else contexts.server, is_dialer)
    is_done = False
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            await handshake.run()
            authenticate(handshake.tls, expected=peer_id, is_allowed=is_allowed)
            if is_dialer:
                if not hmac.compare_digest(await handshake.read(LANE_ID_BYTES), lane_id):
                    raise LinkBroken("the peer means another lane")
            else:
                await handshake.write(lane_id)
        is_done = True
    except TimeoutError as error:
        raise LinkTimeout("a lane's handshake", HANDSHAKE_S) from error
    except (OSError, EOFError) as error:  # ssl.SSLError is among them
        raise LinkBroken("a lane's handshake failed") from error
    finally:
        if not is_done:
            connection.close()
    return TlsWire(connection, handshake.tls, handshake.incoming, handshake.outgoing)


class _Handshake:
    """TLS in memory, and the event loop's socket calls around it."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext, is_dialer: bool) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=not is_dialer)
        self._connection = connection
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._send()
                await self._take()
            else:
                await self._send()
                return

    async def read(self, nbytes: int) -> bytes:
        """So many bytes of what the peer says; what is behind them stays for the lane."""
        said = b""
        while len(said) < nbytes:
            try:
                said += self.tls.read(nbytes - len(said))
            except ssl.SSLWantReadError:
                await self._take()
        return said

    async def write(self, data: bytes) -> None:
        self.tls.write(data)
        await self._send()

    async def _send(self) -> None:
        if self.outgoing.pending:
            await self._loop.sock_sendall(self._connection, self.outgoing.read())

    async def _take(self) -> None:
        received = await self._loop.sock_recv(self._connection, _READ_BYTES)
        if not received:
            raise EOFError
        self.incoming.write(received)


async def secure_local(
    connection: socket.socket, key: bytes, lane_id: bytes, *, is_dialer: bool
) -> Wire:
    """Both prove `key` over a socket within this machine; owns the socket from here.

    Raises:
        NotAMember: the other end does not hold the key.
        LinkBroken: it hung up.
        LinkTimeout: it took too long.
    """
    is_done = False
    try:
        async with asyncio.timeout(LOCAL_S):
            if is_dialer:
                await _prove_first(connection, key, lane_id)
            else:
                await _prove_second(connection, key, lane_id)
        is_done = True
    except TimeoutError as error:
        raise LinkTimeout("a lane's handshake", LOCAL_S) from error
    except (OSError, EOFError) as error:
        raise LinkBroken("a lane's handshake failed") from error
    finally:
        if not is_done:
            connection.close()
    return PlainWire(connection)


async def _prove_first(connection: socket.socket, key: bytes, lane_id: bytes) -> None:
    loop = asyncio.get_running_loop()
    nonce = os.urandom(_NONCE_BYTES)
    await loop.sock_sendall(connection, nonce)
    answer = await receive_exactly(connection, _NONCE_BYTES + _PROOF_BYTES)
    nonces = nonce + answer[:_NONCE_BYTES]
    _check(answer[_NONCE_BYTES:], _proof(key, b"second", nonces))
    await loop.sock_sendall(connection, _proof(key, b"first", nonces))
    _check(await receive_exactly(connection, LANE_ID_BYTES), lane_id)


async def _prove_second(connection: socket.socket, key: bytes, lane_id: bytes) -> None:
    loop = asyncio.get_running_loop()
    nonces = await receive_exactly(connection, _NONCE_BYTES) + os.urandom(_NONCE_BYTES)
    await loop.sock_sendall(connection, nonces[_NONCE_BYTES:] + _proof(key, b"second", nonces))
    _check(await receive_exactly(connection, _PROOF_BYTES), _proof(key, b"first", nonces))
    await loop.sock_sendall(connection, lane_id)


def _proof(key: bytes, who: bytes, nonces: bytes) -> bytes:
    return hmac.digest(key, b"covey lane " + who + nonces, "sha256")


def _check(said: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(said, expected):
        raise NotAMember("another program is at the end of a lane within this machine")
