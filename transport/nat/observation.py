"""How a TCP socket looks from outside: a member tells whoever connects the address it sees.

On the node's listening port, behind the same preamble as everything there, with a key of its own.
After its preamble the dialer sends a nonce, the answer is sealed over it:

    version 1 | IP version 1 | port 2 | address 16 | HMAC-SHA256 32

The connection then stays open until the dialer closes it, for a bounded time: a router's mapping
must live while a punch through it is prepared. Nobody but the dialer is ever contacted.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
import socket
import struct
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

from covey.transport.addresses import format_address, parse_address
from covey.transport.errors import LinkBroken, LinkTimeout, MalformedFrame, TransportError
from covey.transport.listener import receive_exactly
from covey.transport.membership import Swarm
from covey.transport.preamble import NONCE_BYTES, build_preamble
from covey.transport.tasks import Tasks

from .facts import Endpoint

OBSERVE_S = 3.0
NONCE_S = 5.0  # the dialer has this long to send its nonce
HELD_S = 60.0  # a connection is kept no longer
MAX_HELD = 256
MAX_HELD_EACH = 16  # of one host; members behind one router share it

# A preamble for the second listening port names the peer so: each port remembers only its own
# nonces, and what was said to one must not open the other.
OTHER_PORT = " other port"

_VERSION = 1
_LAYOUT = struct.Struct("!BBH16s")
_ANSWER_BYTES = _LAYOUT.size + 32
_LABEL = b"covey observed"


@dataclass(frozen=True, slots=True)
class ObserveKeys:
    """What a member needs to ask, and to answer, in one epoch."""

    key_id: bytes
    key: bytes = field(repr=False)

    @classmethod
    def of(cls, swarm: Swarm) -> ObserveKeys:
        """Those of a swarm's epoch."""
        return cls(swarm.observe_key_id, swarm.observe_key)


def build_answer(key: bytes, nonce: bytes, seen: Endpoint) -> bytes:
    """The sealed address."""
    host = ipaddress.ip_address(seen[0])
    body = _LAYOUT.pack(_VERSION, host.version, seen[1], host.packed.ljust(16, b"\0"))
    return body + _seal(key, nonce, body)


def read_answer(key: bytes, nonce: bytes, answer: bytes) -> Endpoint:
    """The address inside.

    Raises:
        MalformedFrame: not an answer to this nonce under this key.
    """
    body, seal = answer[: _LAYOUT.size], answer[_LAYOUT.size :]
    if len(answer) != _ANSWER_BYTES or not hmac.compare_digest(seal, _seal(key, nonce, body)):
        raise MalformedFrame("the answer to an observation is not a member's")
    version, ip_version, port, packed = _LAYOUT.unpack(body)
    if version != _VERSION or ip_version not in (4, 6) or not port:
        raise MalformedFrame("the answer to an observation makes no sense")
    host = ipaddress.IPv4Address(packed[:4]) if ip_version == 4 else ipaddress.IPv6Address(packed)
    return str(host), port


class ObservationDoor:
    """The listener's side; a `Door` of the mesh."""

    def __init__(self, keys: ObserveKeys) -> None:
        self.keys = keys
        self._held: Counter[str] = Counter()
        self._tasks = Tasks()

    def key_of(self, key_id: bytes) -> bytes | None:
        """See `Door.key_of`."""
        return self.keys.key if key_id == self.keys.key_id else None

    async def enter(
        self, connection: socket.socket, key_id: bytes, source: tuple[str, int]
    ) -> bool:
        """See `Door.enter`; returns when the answer is out, while the connection lives on."""
        key, host, is_kept = self.key_of(key_id), source[0], False
        try:
            connection.setblocking(False)
            async with asyncio.timeout(NONCE_S):
                nonce = await receive_exactly(connection, NONCE_BYTES)
                if key is None:  # the epoch changed meanwhile
                    return False
                await asyncio.get_running_loop().sock_sendall(
                    connection, build_answer(key, nonce, source)
                )
            if self._held.total() < MAX_HELD and self._held[host] < MAX_HELD_EACH:
                self._held[host] += 1
                holding = self._tasks.spawn(_hold(connection), "observed")
                # Also if the task never begins, because the node is stopping.
                holding.add_done_callback(lambda _: self._let_go(connection, host))
                is_kept = True
        except (OSError, EOFError, TimeoutError):
            return False
        finally:
            if not is_kept:
                connection.close()
        return True

    async def aclose(self) -> None:
        """Let go of every connection."""
        await self._tasks.aclose()

    def _let_go(self, connection: socket.socket, host: str) -> None:
        connection.close()
        self._held[host] -= 1
        if not self._held[host]:
            del self._held[host]


async def _hold(connection: socket.socket) -> None:
    """Until the dialer closes, or says anything more, or the time is over."""
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(HELD_S):
            await asyncio.get_running_loop().sock_recv(connection, 1)


async def observe(
    connection: socket.socket,
    server: str,
    *,
    peer_id: str,
    keys: ObserveKeys,
    timeout_s: float = OBSERVE_S,
) -> str:
    """Connect `connection` to a member's listening port; the "host:port" that the member sees.

    The socket may be bound already, as `reusable_socket` does; it stays the caller's, connected,
    and its mapping lives while it does (the member hangs up after a minute).

    Args:
        connection: a TCP socket that is not connected.
        server: "host:port" of the member; an IP address, not a name.
        peer_id: who should answer there.
        keys: of the swarm's epoch.
        timeout_s: for all of it.

    Raises:
        LinkTimeout: nothing answers there.
        LinkBroken: it refused, or hung up: another swarm, another member, or busy.
        MalformedFrame: what answers is no member.
        ValueError: `server` is not an address.
    """
    nonce = os.urandom(NONCE_BYTES)
    preamble = build_preamble(
        key_id=keys.key_id,
        key=keys.key,
        expected_peer_id=peer_id,
        nonce=nonce,
        unix_time=time.time(),
    )
    loop = asyncio.get_running_loop()
    connection.setblocking(False)
    try:
        async with asyncio.timeout(timeout_s):
            await loop.sock_connect(connection, parse_address(server))
            await loop.sock_sendall(connection, preamble + nonce)
            answer = await receive_exactly(connection, _ANSWER_BYTES)
    except TimeoutError as error:
        raise LinkTimeout("an observation", timeout_s) from error
    except (OSError, EOFError) as error:
        raise LinkBroken(f"{server} hung up on an observation") from error
    return format_address(*read_answer(keys.key, nonce, answer))


def reusable_socket(host: str, port: int = 0) -> socket.socket:
    """A TCP socket bound so that others of this process may share its port.

    Raises:
        TransportError: the port is taken, or the host is not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):  # Windows has one option for both
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((host, port))
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        raise TransportError(f"cannot bind {format_address(host, port)}: {error}") from error
    return bound


def _seal(key: bytes, nonce: bytes, body: bytes) -> bytes:
    return hmac.digest(key, _LABEL + nonce + body, "sha256")
