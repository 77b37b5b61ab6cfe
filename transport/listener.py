"""The door: listens, and lets nobody see who lives here before they have shown a good preamble.

Strangers cost little: a bounded number of connections that have not said anything yet, of which
the oldest goes first (a member's preamble is here a round trip after it connected), a budget of
failures for each address, and only an HMAC before anything is said or any signature is checked.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

from .addresses import MAX_ADDRESSES, format_address, reachable_hosts
from .errors import AddressInUse, LinkBroken, TransportError
from .preamble import PREAMBLE_BYTES, PreambleGate, Verdict
from .tasks import Tasks

logger = logging.getLogger(__name__)

PREAMBLE_S = 5.0
MAX_SILENT = 128  # connections whose preamble has not come yet
MAX_HALF_OPEN = 128  # connections of those that hold a key, until they are let in
# Failures an address may have, and how fast they are forgiven. Members behind one router share an
# address: what they have under way counts, what succeeds is given back.
BUDGET = 64
BUDGET_PER_S = 2.0
MAX_TRACKED = 1024
_BACKLOG = 128
_OUT_OF_FILES_S = 0.2  # pause before accepting again when the process has no file handle left

# Takes a connection, the key its preamble named and its source; True if its peer was let in.
OnConnection = Callable[[socket.socket, bytes, tuple[str, int]], Awaitable[bool]]


class AddressBudget:
    """How many connections an address may still fail with (sans-IO token bucket, bounded)."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # left, counted at

    def take(self, host: str, *, now: float) -> bool:
        """Charge one connection; False if the address has none left."""
        host = _network(host)
        left = self._left(host, now)
        if left < 1.0:
            return False
        self._store(host, left - 1.0, now)
        return True

    def give_back(self, host: str, *, now: float) -> None:
        """The connection turned out to be a member's."""
        host = _network(host)
        self._store(host, min(self._left(host, now) + 1.0, BUDGET), now)

    def _left(self, host: str, now: float) -> float:
        left, counted_at = self._buckets.get(host, (float(BUDGET), now))
        return min(left + (now - counted_at) * BUDGET_PER_S, BUDGET)

    def _store(self, host: str, left: float, now: float) -> None:
        self._buckets[host] = (left, now)
        self._buckets.move_to_end(host)
        if len(self._buckets) > MAX_TRACKED:
            self._buckets.popitem(last=False)


def _network(host: str) -> str:
    """What one owner has many of is one source: an IPv6 network of 64 bits."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # with a zone: link-local, one machine
        return host
    if address.version == 4:
        return host
    return str(ipaddress.IPv6Address(int(address) >> 64 << 64))


class Listener:
    """The listening sockets of a node."""

    def __init__(
        self,
        listen: Sequence[tuple[str, int]],
        gate: PreambleGate,
        on_connection: OnConnection,
    ) -> None:
        self._listen = tuple(listen)
        self._gate = gate
        self._on_connection = on_connection
        self._sockets: list[socket.socket] = []
        self._tasks = Tasks()
        self._budget = AddressBudget()
        self._silent: OrderedDict[socket.socket, asyncio.Task[None]] = OrderedDict()
        self._n_half_open = 0
        self._complained: set[str] = set()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Each "host:port" another machine may dial, the most useful first."""
        found = [
            format_address(reachable, port)
            for host, port in self.bound
            for reachable in reachable_hosts(host)
        ]
        return tuple(found[:MAX_ADDRESSES])

    @property
    def bound(self) -> tuple[tuple[str, int], ...]:
        """Host and port of each listening socket; the host may be "0.0.0.0" or "::"."""
        return tuple(
            (str(host), int(port))
            for host, port in (listening.getsockname()[:2] for listening in self._sockets)
        )

    def start(self) -> None:
        """Bind, and accept from now on.

        Raises:
        AddressInUse: another program listens there.
            TransportError: the address is not this machine's, or not allowed.
        """
        try:
            for host, port in self._listen:
                self._sockets.append(_bind(host, port))
        except BaseException:
            self._close_sockets()
            raise
        for listening in self._sockets:
            self._tasks.spawn(self._accept(listening), "accept")

    async def aclose(self) -> None:
        """Stop accepting, and drop whoever has not been let in yet."""
        await self._tasks.aclose()
        self._close_sockets()

    def _close_sockets(self) -> None:
        for listening in self._sockets:
            listening.close()
        self._sockets.clear()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0)  # a flood must not keep everything else from happening
            try:
                connection, address = await accept_one(listening)
            except OSError:
                # Out of file handles, or the connection was gone before we took it.
                await asyncio.sleep(_OUT_OF_FILES_S)
                continue
            host = str(address[0])
            if not self._budget.take(host, now=loop.time()):
                self._refuse(connection, host, "too many connections")
                continue
            if len(self._silent) >= MAX_SILENT:
                next(iter(self._silent.values())).cancel()
            source = (host, int(address[1]))
            screening = self._tasks.spawn(self._screen(connection, source), "screen")
            self._silent[connection] = screening
            screening.add_done_callback(lambda _, silent=connection: self._end(silent))  # type: ignore[misc]

    def _end(self, connection: socket.socket) -> None:
        """Close a connection that was silent to the end, even if its screening never began."""
        if self._silent.pop(connection, None) is not None:
            connection.close()

    async def _screen(self, connection: socket.socket, source: tuple[str, int]) -> None:
        host = source[0]
        loop = asyncio.get_running_loop()
        is_ours = True  # to close
        is_counted = False
        try:
            async with asyncio.timeout(PREAMBLE_S):
                preamble = await receive_exactly(connection, PREAMBLE_BYTES)
            self._silent.pop(connection, None)
            verdict, key_id = self._gate.judge(preamble, unix_time=time.time())
            if verdict is not Verdict.GOOD:
                self._refuse(connection, host, verdict.value)
                return
            if self._n_half_open >= MAX_HALF_OPEN:
                self._refuse(connection, host, "too many connections")
                return
            self._n_half_open += 1
            is_counted = True
            is_ours = False
            if await self._on_connection(connection, key_id, source):
                self._budget.give_back(host, now=loop.time())
        except (OSError, EOFError):
            self._complain(host, "no preamble")
        except TransportError as error:
            self._complain(host, str(error))
        finally:
            self._n_half_open -= is_counted
            if is_ours:
                self._end(connection)
                connection.close()

    def _refuse(self, connection: socket.socket, host: str, reason: str) -> None:
        connection.close()
        self._complain(host, reason)

    def _complain(self, host: str, reason: str) -> None:
        """Log a refusal, once for each address: a stranger must not fill the log."""
        if host not in self._complained and len(self._complained) < MAX_TRACKED:
            self._complained.add(host)
            logger.warning("connection refused", extra={"address": host, "reason": reason})


async def read_preamble(connection: socket.socket, gate: PreambleGate) -> bytes:
    """The key id of a good preamble on a connection that did not come in by the listening port.

    Raises:
        LinkBroken: there was none; the connection is closed.
    """
    try:
        async with asyncio.timeout(PREAMBLE_S):
            preamble = await receive_exactly(connection, PREAMBLE_BYTES)
    except (OSError, EOFError) as error:  # TimeoutError is among them
        connection.close()
        raise LinkBroken("no preamble came") from error
    except BaseException:
        connection.close()
        raise
    verdict, key_id = gate.judge(preamble, unix_time=time.time())
    if verdict is not Verdict.GOOD:
        connection.close()
        raise LinkBroken(f"a preamble was refused: {verdict.value}")
    return key_id


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(format_address(host, port)) from error
        raise TransportError(
            f"cannot listen on {format_address(host, port)}: {error.strerror or error}"
        ) from error
    listening.setblocking(False)
    return listening


async def accept_one(listening: socket.socket) -> tuple[socket.socket, tuple[str, int]]:
    """The next connection; `loop.sock_accept` would lose one that comes as it is cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            return listening.accept()
        except BlockingIOError:
            readable: asyncio.Future[None] = loop.create_future()
        loop.add_reader(listening, _wake, readable)
        try:
            await readable
        finally:
            loop.remove_reader(listening)


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


async def receive_exactly(connection: socket.socket, nbytes: int) -> bytes:
    """So many bytes; raises EOFError if the other side closes first."""
    loop = asyncio.get_running_loop()
    connection.setblocking(False)
    received = b""
    while len(received) < nbytes:
        more = await loop.sock_recv(connection, nbytes - len(received))
        if not more:
            raise EOFError
        received += more
    return received
