"""Punching when one router gives every connection another port: the birthday paradox.

The *easy* end's router maps ports independently of the destination; the *hard* end's does not, so
nobody can foretell under which port it will appear. The easy end sends one SYN to each of
`EASY_PORTS` random ports of the hard end's address, all from one port of its own: its router now
lets those ports in. A little later the hard end opens `HARD_SOCKETS` connections to that one port.
With 1,024 and 256 the chance that one of them meets is 98 %, in `ROUNDS` = 2 rounds 99.97 %.

What leaves here is bounded: `ROUNDS` times the numbers above, one SYN each (a socket is closed
before the kernel repeats it), spread over a fifth of a second. It goes to one host, and callers
call it only for that of an authenticated member, once in a while. Descriptors are counted before.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from covey.transport.errors import TransportError

from .sockets import Connections, PunchSocket, check_host, hard_close, parse_remote, refuse_itself

EASY_PORTS = 1024
HARD_SOCKETS = 256
ROUNDS = 2
ROUND_S = 1.0  # both ends keep time by it
HEAD_START_S = 0.3  # of the easy end: its SYNs must have passed its router
LAST_WORDS_S = 1.0  # after the last round, for what connected to prove itself
_SOCKET_S = 0.95  # Linux repeats a SYN after one second
_PORTS = range(1024, 65536)
_SLICE = 16  # sockets made without letting the event loop go: a millisecond
_PACE_S = 0.002  # between slices; a home router need not swallow a thousand SYNs at once
_SPARE_DESCRIPTORS = 128  # left to the rest of the process
_LEAST = 64  # with fewer sockets it is not worth trying


def birthday_easy(
    punch: PunchSocket, host: str, *, rng: random.Random | None = None
) -> Connections:
    """The end whose router maps `punch` to one port, which the other end was told.

    Args:
        punch: this end's port.
        host: the other end's router, as somebody else than the peer itself has seen it.
        rng: chooses the ports; the system's by default.

    Raises:
        ValueError: `host` is not the IP address of one machine.
        TransportError: too few file handles.
    """
    check_host(host, punch.family)
    count = _affordable(EASY_PORTS)
    chooser = rng or random.SystemRandom()

    async def work(connections: Connections) -> None:
        with punch.listening(host, connections):
            for _ in range(ROUNDS):
                targets = [(host, port) for port in chooser.sample(_PORTS, count)]
                await _round(connections, punch.bind_another, targets, start_s=0.0)

    return Connections(work, until=_deadline())


def birthday_hard(remote: str) -> Connections:
    """The end whose router gives every connection another port.

    Args:
        remote: "host:port" to which the easy end's router maps its port.

    Raises:
        ValueError: not an address that one peer has.
        TransportError: too few file handles.
    """
    family = socket.AF_INET6 if remote.startswith("[") else socket.AF_INET
    targets = [parse_remote(remote, family)] * _affordable(HARD_SOCKETS)

    def make() -> socket.socket:
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setblocking(False)
        return made

    async def work(connections: Connections) -> None:
        for _ in range(ROUNDS):
            await _round(connections, make, targets, start_s=HEAD_START_S)

    return Connections(work, until=_deadline())


async def _round(
    connections: Connections,
    make: Callable[[], socket.socket],
    targets: Sequence[tuple[str, int]],
    *,
    start_s: float,
) -> None:
    """Connect to every target, for `ROUND_S`; unless one of the last round is on trial."""
    loop = asyncio.get_running_loop()
    end = loop.time() + ROUND_S
    if not connections.has_open:
        async with _Spray(connections) as spray:
            await asyncio.sleep(start_s)
            for at in range(0, len(targets), _SLICE):
                for target in targets[at : at + _SLICE]:
                    spray.connect(make, target)
                await asyncio.sleep(_PACE_S)
            await asyncio.sleep(end - ROUND_S + _SOCKET_S - loop.time())
    await asyncio.sleep(end - loop.time())


class _Spray:
    """Many sockets that connect at once; leaving closes, little by little, those that did not."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._pending: set[socket.socket] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pending, self._pending = list(self._pending), set()
        for connection in pending:
            self._loop.remove_writer(connection.fileno())
        try:
            while pending:
                for connection in pending[-_SLICE:]:
                    connection.close()
                del pending[-_SLICE:]
                await asyncio.sleep(0)
        finally:
            for connection in pending:  # cancelled once more: then in one go
                connection.close()

    def connect(self, make: Callable[[], socket.socket], target: tuple[str, int]) -> None:
        """Begin one."""
        try:
            connection = make()
        except OSError:
            return  # out of file handles after all: one chance less
        try:
            connection.connect(target)
        except BlockingIOError:
            self._pending.add(connection)
            self._loop.add_writer(connection.fileno(), self._settled, connection)
        except OSError:
            connection.close()
        else:
            self._connections.offer(connection)

    def _settled(self, connection: socket.socket) -> None:
        self._loop.remove_writer(connection.fileno())
        self._pending.discard(connection)
        try:
            refuse_itself(connection)  # raises too if it is not connected
        except OSError:
            hard_close(connection)
        else:
            self._connections.offer(connection)


def _deadline() -> float:
    return asyncio.get_running_loop().time() + ROUNDS * ROUND_S + LAST_WORDS_S


def _affordable(wanted: int) -> int:
    """How many of `wanted` sockets this process can open and still do its work."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return wanted
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return wanted
    left = limit - sum(1 for _ in Path("/dev/fd").iterdir()) - _SPARE_DESCRIPTORS
    if left < _LEAST:
        raise TransportError(
            f"only {max(left, 0)} file handles are left to punch with: raise `ulimit -n`"
        )
    return min(wanted, left)
