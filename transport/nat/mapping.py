"""Asks the router for a port that leads to ours: by NAT-PMP, else by UPnP.

What the router says is a claim: its outer address may itself be behind another router. Whoever
uses a mapping checks first that it can be reached. Leases are renewed by asking again, and given
back at the end. Everything has a deadline; a router that answers nonsense costs only that.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import miniupnpc  # type: ignore[import-not-found]  # has no stubs

from covey.transport.addresses import format_address

from . import natpmp
from .facts import Endpoint
from .responder import UdpPort

LEASE_S = 3600
NATPMP_S = 2.0
UPNP_S = 12.0
REMOVE_S = 3.0
_SENT_AT_S = (0.0, 0.25, 0.75)  # RFC 6886, section 3.1, cut short
_DISCOVER_MS = 1500
_N_OUTER_PORTS = 4  # tries when another machine has the port already
_ROUTES = Path("/proc/net/route")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapped:
    """A port at the router, as the router tells it."""

    host: str
    outer_port: int
    inner_port: int
    lease_s: float  # 0 is until the router restarts
    by: Literal["NAT-PMP", "UPnP"]

    @property
    def address(self) -> str:
        """As another machine would dial it."""
        return format_address(self.host, self.outer_port)


class MappingFailed(Exception):
    """No port from this router in this way; the text says why."""


class PortMapper:
    """The mapping of one TCP port."""

    def __init__(self, gateway: Callable[[], str | None] | None = None) -> None:
        """`gateway` names the router to ask by NAT-PMP; the default route's if left out."""
        self._find_gateway = gateway or default_gateway
        self.mapped: Mapped | None = None
        self.reason = ""  # why the router gave none; empty before it was asked
        self._gateway: str | None = None
        self._upnp = Blocking()

    async def map(self, port: int) -> Mapped | None:
        """Ask for `port`, or renew it; None if the router gives none: see `reason`."""
        wish = port if self.mapped is None else self.mapped.outer_port
        reasons = []
        for name, attempt in (("NAT-PMP", self._by_natpmp), ("UPnP", self._by_upnp)):
            try:
                self.mapped = await attempt(port, wish)
            except MappingFailed as error:
                reasons.append(f"{name}: {error}")
            else:
                return self.mapped
        self.mapped, self.reason = None, "; ".join(reasons)
        return None

    async def remove(self) -> None:
        """Give the port back, if there is one."""
        mapped, self.mapped = self.mapped, None
        if mapped is None:
            return
        try:
            if mapped.by == "UPnP":
                await self._upnp.run(functools.partial(_upnp_remove, mapped), REMOVE_S)
            elif self._gateway is not None:
                request = natpmp.map_request(
                    natpmp.Operation.MAP_TCP, mapped.inner_port, 0, lease_s=0
                )
                await _ask(self._gateway, request, _read_tcp_mapping)
        except MappingFailed:
            return  # it will end by itself

    async def _by_natpmp(self, port: int, wish: int) -> Mapped:
        gateway = self._find_gateway()
        if gateway is None:
            raise MappingFailed("this machine has no default route that we can read")
        request = natpmp.map_request(natpmp.Operation.MAP_TCP, port, wish, LEASE_S)
        host = await _ask(gateway, natpmp.address_request(), natpmp.read_address)
        granted = await _ask(gateway, request, _read_tcp_mapping)
        if granted.inner_port != port or not granted.outer_port:
            raise MappingFailed("the router granted another port than was asked for")
        self._gateway = gateway
        return Mapped(
            host=host,
            outer_port=granted.outer_port,
            inner_port=port,
            lease_s=granted.lease_s,
            by="NAT-PMP",
        )

    async def _by_upnp(self, port: int, wish: int) -> Mapped:
        return await self._upnp.run(functools.partial(_upnp_add, port, wish), UPNP_S)


def default_gateway(table: Path = _ROUTES) -> str | None:
    """The router that the IPv4 default route leads to; None where the system does not say."""
    try:
        lines = table.read_text("ascii").splitlines()[1:]
    except OSError:
        return None
    for line in lines:
        columns = line.split()
        if len(columns) > 7 and columns[1] == columns[7] == "00000000" and columns[2] != columns[1]:
            # The kernel prints the address as one number of this machine's byte order.
            return socket.inet_ntoa(struct.pack("=I", int(columns[2], 16)))
    return None


async def _ask(gateway: str, request: bytes, read: Callable[[bytes], T | None]) -> T:
    """One NAT-PMP exchange. Raises MappingFailed."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def on_packet(packet: bytes, source: Endpoint) -> None:
        if source != (gateway, natpmp.PORT) or answer.done():
            return
        try:
            found = read(packet)
        except natpmp.Refused as error:
            answer.set_exception(MappingFailed(f"the router refused: {error}"))
        else:
            if found is not None:
                answer.set_result(found)

    try:
        port = await UdpPort.bind("0.0.0.0", 0, on_packet)  # noqa: S104 - only its source is read
    except OSError as error:
        raise MappingFailed(str(error)) from error
    timers = [
        loop.call_later(at_s, port.send, request, (gateway, natpmp.PORT)) for at_s in _SENT_AT_S
    ]
    try:
        async with asyncio.timeout(NATPMP_S):
            return await answer
    except TimeoutError as error:
        raise MappingFailed("the router does not answer") from error
    finally:
        for timer in timers:
            timer.cancel()
        await port.aclose()


def _read_tcp_mapping(packet: bytes) -> natpmp.Granted | None:
    return natpmp.read_mapping(packet, natpmp.Operation.MAP_TCP)


# --- UPnP: miniupnpc blocks, so all of it runs in a thread ---------------------------------------


class Blocking:
    """Runs one blocking call at a time in a thread that cannot keep the process from ending."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    async def run(self, call: Callable[[], T], timeout_s: float) -> T:
        """What `call` returns. Raises MappingFailed: it failed, hangs, or an earlier one does."""
        if self._thread is not None and self._thread.is_alive():
            raise MappingFailed("the router still keeps an earlier question waiting")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def settle(how: Callable[[], None]) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(lambda: None if answer.done() else how())

        def work() -> None:
            try:
                result = call()
            except MappingFailed as error:
                settle(functools.partial(answer.set_exception, error))
            else:
                settle(functools.partial(answer.set_result, result))

        self._thread = threading.Thread(target=work, name="upnp", daemon=True)
        self._thread.start()
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError as error:
            raise MappingFailed("the router does not answer in time") from error


def _upnp_add(port: int, wish: int) -> Mapped:
    router = _upnp_router()
    host = str(_upnp_call(router.externalipaddress))
    try:
        ipaddress.IPv4Address(host)
    except ValueError as error:
        raise MappingFailed("the router has no public address itself") from error
    reason = ""
    for outer_port in range(wish, min(wish + _N_OUTER_PORTS, 65536)):
        for lease_s in (LEASE_S, 0):  # some routers know only mappings without an end
            try:
                _upnp_call(
                    router.addportmapping,
                    *(outer_port, "TCP", router.lanaddr, port, "Covey", "", lease_s),
                )
            except MappingFailed as error:
                reason = str(error)
                continue
            return Mapped(
                host=host, outer_port=outer_port, inner_port=port, lease_s=lease_s, by="UPnP"
            )
    raise MappingFailed(f"the router refused: {reason}")


def _upnp_remove(mapped: Mapped) -> None:
    _upnp_call(_upnp_router().deleteportmapping, mapped.outer_port, "TCP")


def _upnp_router() -> miniupnpc.UPnP:
    router = miniupnpc.UPnP()
    router.discoverdelay = _DISCOVER_MS
    if not _upnp_call(router.discover):
        raise MappingFailed("no router answers")
    _upnp_call(router.selectigd)
    return router


def _upnp_call(call: Callable[..., T], *arguments: object) -> T:
    """Raises MappingFailed for what miniupnpc says of the router: always a bare `Exception`."""
    try:
        return call(*arguments)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise MappingFailed(str(error) or type(error).__name__) from error
