"""A node's HTTP server: uvicorn as a guest in the node's own event loop.

The node owns signals, logging and the moment of stopping; uvicorn owns sockets and HTTP/1.1.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
from collections.abc import Iterator

import uvicorn

from covey.node.config import check_exposure
from covey.node.errors import ConfigError
from covey.node.service import Service

from .app import create_app, state_of
from .errors import ApiAddressInUse

HARD_STOP_S = 3.0  # after the grace: for answers to be written to clients that still read


class _GuestServer(uvicorn.Server):
    """uvicorn without its signal handlers, and with a moment at which it is ready."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


class ApiServer:
    """Serves the API of `service` from `start` to `stop`; one use."""

    def __init__(
        self, service: Service, host: str, port: int, api_key: str | None, control_key: str
    ) -> None:
        """Check the address; nothing is opened yet.

        Args:
            host: an address or name of this machine; without `api_key` a loopback one.
            port: 0 takes any free one.

        Raises:
            ConfigError: other machines could use the node without a key.
        """
        check_exposure(host, api_key)
        self._host = host
        self._port = port
        self._app = create_app(service, api_key=api_key, control_key=control_key, host=host)
        self._server: _GuestServer | None = None
        self._serving: asyncio.Task[None] | None = None
        self._url = ""

    @property
    def url(self) -> str:
        """Where programs on this machine reach it, without a path; known after `start`."""
        if not self._url:
            raise RuntimeError("the API server was not started")
        return self._url

    async def start(self) -> None:
        """Listen; returns when requests are answered.

        Raises:
            ApiAddressInUse: another program has the port.
            ConfigError: the host is not an address of this machine, or may not be used.
        """
        sock = await _bind(self._host, self._port)
        self._url = _local_url(sock)
        config = uvicorn.Config(
            self._app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=30,
        )
        self._server = server = _GuestServer(config)
        self._serving = asyncio.create_task(server.serve(sockets=[sock]), name="covey-api")
        ready = asyncio.create_task(server.ready.wait())
        await asyncio.wait({ready, self._serving}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self._serving.done():
            self._serving.result()

    async def stop(self, grace_s: float = 5.0) -> None:
        """Stop listening, let answers finish for `grace_s`, end the rest with an error; bounded.

        Does nothing when it was not started or has stopped.
        """
        if self._server is None or self._serving is None:
            return
        server, serving = self._server, self._serving
        self._server = self._serving = None
        server.should_exit = True
        await asyncio.wait({serving}, timeout=grace_s)
        if not serving.done():
            state_of(self._app).generations.stop()
            await asyncio.wait({serving}, timeout=HARD_STOP_S)
        if not serving.done():
            # Connections that neither read nor write: nothing is owed to them.
            server.force_exit = True
            for task in tuple(server.server_state.tasks):
                task.cancel()
            for connection in tuple(server.server_state.connections):
                connection.transport.abort()
        await serving


async def _bind(host: str, port: int) -> socket.socket:
    """A socket bound to the first address of `host`; not yet listening."""
    address = f"{host}:{port}"
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, sockaddr = found[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"api_host: {host!r} is no address: {error.strerror}") from error
    try:
        # Or a restarted node would wait for its own old connections to be forgotten.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(sockaddr)
        sock.listen(1)  # two sockets may bind with SO_REUSEADDR, only one may listen
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ApiAddressInUse(address) from error
        raise ConfigError(f"api_host: cannot listen on {address}: {error.strerror}") from error
    sock.setblocking(False)
    return sock


def _local_url(sock: socket.socket) -> str:
    name, port = sock.getsockname()[:2]
    address = ipaddress.ip_address(name)
    if address.is_unspecified:
        address = ipaddress.ip_address("::1" if address.version == 6 else "127.0.0.1")
    return f"http://[{address}]:{port}" if address.version == 6 else f"http://{address}:{port}"
