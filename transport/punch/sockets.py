"""One TCP port that listens and connects at once, so that a router maps both alike.

Whoever's first packet comes too early opens the way for the other's: which of the two then
connects, and whether to the listener or to a socket that is connecting itself (simultaneous open,
RFC 9293 section 3.5), depends on the routers. Without the listener four NAT pairs of thirteen fail.

Towards an address that does not answer goes at most one connection attempt at a time: about twenty
SYNs, and the kernel's repetitions, in the `PUNCH_S` that a punch may last.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from covey.transport.addresses import parse_address
from covey.transport.errors import TransportError

PUNCH_S = 10.0  # the longest a punch goes on
MAX_CONNECTIONS = 64  # of one punch, good or bad: enough for the few that may connect at once
_CONNECT_S = 0.7  # of the first attempt, each later one half as long again
_PAUSE_S = 0.05  # after the first attempt that failed, each later one twice as long
_MAX_PAUSE_S = 0.7
_BACKLOG = 64
_OUT_OF_FILES_S = 0.2
_HARD_CLOSE = bytes([1, 0, 0, 0, 0, 0, 0, 0])  # struct linger: on, 0 s

Work = Callable[["Connections"], Coroutine[Any, Any, None]]


class Connections:
    """Connected sockets as they come, until a deadline: an async iterator inside `async with`.

    Whoever iterates owns and closes what it is given; everything else is closed on leaving.
    """

    def __init__(self, work: Work, *, until: float) -> None:
        self.until = until  # by the event loop's clock
        self._work = work
        self._came: asyncio.Queue[socket.socket | None] = asyncio.Queue()
        self._offered: list[socket.socket] = []
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Begin."""
        self._task = asyncio.create_task(self._run(), name="punch")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop, and close what nobody took."""
        try:
            if self._task is not None:
                self._task.cancel()
                await asyncio.wait({self._task})
        finally:
            while not self._came.empty():
                connection = self._came.get_nowait()
                if connection is not None:
                    hard_close(connection)

    def __aiter__(self) -> Self:
        """Itself."""
        return self

    async def __anext__(self) -> socket.socket:
        """The next connected socket, not blocking."""
        connection = await self._came.get()
        if connection is None:
            raise StopAsyncIteration
        return connection

    @property
    def has_open(self) -> bool:
        """Whether a socket that was offered is still of interest to whoever took it."""
        self._offered = [connection for connection in self._offered if connection.fileno() >= 0]
        return bool(self._offered)

    def offer(self, connection: socket.socket) -> None:
        """Pass on a connected socket; more than anybody needs are closed."""
        if self.has_open and len(self._offered) >= MAX_CONNECTIONS:
            hard_close(connection)
            return
        self._offered.append(connection)
        self._came.put_nowait(connection)

    async def _run(self) -> None:
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self.until):
                    await self._work(self)
                    await asyncio.Event().wait()  # what has come has until then to prove itself
        finally:
            self._came.put_nowait(None)


class PunchSocket:
    """A TCP port of this machine, kept for one punch.

    Connections that start at a socket of `bind_another` show an observer outside the address
    under which the other end will find this port, if the router maps ports independently of the
    destination.

    Raises:
        TransportError: no port, or a system that cannot share one between sockets.
    """

    def __init__(self, *, family: socket.AddressFamily = socket.AF_INET, host: str = "") -> None:
        self._family = family
        try:
            self._holder = _bind(family, host, 0)
        except OSError as error:
            raise TransportError(f"cannot punch from here: {error.strerror or error}") from error
        self._address: tuple[str, int] = self._holder.getsockname()[:2]

    @property
    def port(self) -> int:
        """The local port."""
        return self._address[1]

    @property
    def family(self) -> socket.AddressFamily:
        """Of the addresses that can be punched from here: IPv4 or IPv6."""
        return self._family

    def bind_another(self) -> socket.socket:
        """One more socket on the port, not blocking, the caller's to close.

        Raises:
            OSError: out of file handles.
        """
        return _bind(self._family, *self._address)

    def connections(self, remote: str, *, until: float) -> Connections:
        """Connect to `remote` and listen for it, over and over, until the deadline.

        Args:
            remote: "host:port" of an authenticated member, or of its router, as seen from outside.
            until: by the event loop's clock; at most `PUNCH_S` ahead.

        Raises:
            ValueError: not an address that one peer has, or of the other family.
        """
        host, port = parse_remote(remote, self._family)
        until = min(until, asyncio.get_running_loop().time() + PUNCH_S)

        async def work(connections: Connections) -> None:
            with self.listening(host, connections):
                await self._connect(host, port, connections)

        return Connections(work, until=until)

    @contextmanager
    def listening(self, host: str, connections: Connections) -> Iterator[None]:
        """Offer what connects to this port from `host`; anybody else is hung up on."""
        loop = asyncio.get_running_loop()
        listening = self.bind_another()
        again: asyncio.TimerHandle | None = None

        def listen() -> None:
            loop.add_reader(listening.fileno(), take)

        def take() -> None:
            nonlocal again
            try:
                for _ in range(_BACKLOG):
                    connection, source = listening.accept()
                    if ipaddress.ip_address(source[0]) != expected:
                        hard_close(connection)
                        continue
                    connection.setblocking(False)
                    connections.offer(connection)
            except (BlockingIOError, ConnectionError):
                pass  # all taken, or gone before we took it
            except OSError:  # out of file handles
                loop.remove_reader(listening.fileno())
                again = loop.call_later(_OUT_OF_FILES_S, listen)

        try:
            expected = ipaddress.ip_address(host)
            listening.listen(_BACKLOG)
            listen()
            yield
        finally:
            if again is not None:
                again.cancel()
            loop.remove_reader(listening.fileno())
            listening.close()

    def close(self) -> None:
        """Give the port back; sockets that were handed out stay."""
        self._holder.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """As `close`."""
        self.close()

    async def _connect(self, host: str, port: int, connections: Connections) -> None:
        patience, pause = _CONNECT_S, _PAUSE_S
        made: socket.socket | None = None
        while True:
            # One that connected is on trial; another would lead to the same place.
            if made is None or made.fileno() < 0:
                with suppress(OSError):  # among them TimeoutError
                    made = await self._connect_once(host, port, patience)
                    connections.offer(made)
                patience *= 1.5
            await asyncio.sleep(pause)
            pause = min(pause * 2, _MAX_PAUSE_S)

    async def _connect_once(self, host: str, port: int, patience: float) -> socket.socket:
        connection = self.bind_another()
        try:
            async with asyncio.timeout(patience):
                await asyncio.get_running_loop().sock_connect(connection, (host, port))
            refuse_itself(connection)
        except BaseException:
            connection.close()
            raise
        return connection


def refuse_itself(connection: socket.socket) -> None:
    """Raises OSError for a socket that met nobody but itself, as TCP allows."""
    if connection.getsockname() == connection.getpeername():
        raise ConnectionRefusedError(errno.ECONNREFUSED, "connected to itself")


def parse_remote(remote: str, family: socket.AddressFamily) -> tuple[str, int]:
    """Host and port of an address that can be one peer's.

    Raises:
        ValueError: a name, a group or nobody at all, or of another family than `family`.
    """
    host, port = parse_address(remote)
    check_host(host, family)
    return host, port


def check_host(host: str, family: socket.AddressFamily) -> None:
    """Raises ValueError unless `host` is the IP address of one machine, of that family."""
    address = ipaddress.ip_address(host)
    if address.is_multicast or address.is_unspecified or address == _BROADCAST:
        raise ValueError(f"{host} is nobody's address")
    if (address.version == 6) != (family == socket.AF_INET6):
        raise ValueError(f"{host} is of another family")


def hard_close(connection: socket.socket) -> None:
    """Close with a reset: nothing lingers in either kernel."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _HARD_CLOSE)
    connection.close()


_BROADCAST = ipaddress.ip_address("255.255.255.255")


def _bind(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    if not hasattr(socket, "SO_REUSEPORT"):
        raise OSError(errno.EOPNOTSUPP, "this system does not let two sockets share a port")
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setblocking(False)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((host, port))
    except BaseException:
        bound.close()
        raise
    return bound
