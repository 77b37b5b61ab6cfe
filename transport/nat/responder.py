"""Tells members what address their UDP packets come from (STUN), and strangers nothing at all.

`Responder` is sans-IO: one packet in, one packet or nothing out, never larger than about the
packet that came. `UdpPort` is the socket around it, and around any other reader of packets.
"""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from aioice import stun

from .budget import Budget, Rate
from .facts import Endpoint
from .stun import build_answer, is_signed_request, parse

# A host that is being classified sends about ten requests, an ICE agent three a second. What a
# host may send is counted before anything is read, what all are answered only after.
EACH_HOST = Rate(burst=64, per_s=8)
ALL_HOSTS = Rate(burst=1024, per_s=512)
_NO_LIMIT = Rate(burst=math.inf, per_s=0)
# aioice's own requests have 20 bytes and their answers 32 or 44: only for peers that we know.
MAX_GROWTH_BYTES = 24


class Responder:
    """Judges one packet after the other."""

    def __init__(self, key: bytes, is_peer: Callable[[str], bool]) -> None:
        """`is_peer` says whether an IP address has a live link to us."""
        self.key = key
        self._is_peer = is_peer
        self._asked = Budget(EACH_HOST, _NO_LIMIT)  # strangers must not use up what members need
        self._answered = Budget(EACH_HOST, ALL_HOSTS)

    def respond(
        self, packet: bytes, source: Endpoint, *, now: float, unix_time: float
    ) -> bytes | None:
        """The answer to send back to `source`; None is silence."""
        request = parse(packet) if self._asked.take(source[0], now=now) else None
        if (
            request is None
            or request.message_method is not stun.Method.BINDING
            or request.message_class is not stun.Class.REQUEST
        ):
            return None
        is_signed = "MESSAGE-INTEGRITY" in request.attributes
        if is_signed:
            if not is_signed_request(request, self.key, unix_time=unix_time):
                return None
        elif not self._is_peer(source[0]):
            return None
        answer = build_answer(request, source, self.key if is_signed else None)
        if len(answer) > len(packet) + (0 if is_signed else MAX_GROWTH_BYTES):
            return None
        return answer if self._answered.take(source[0], now=now) else None


class UdpPort(asyncio.DatagramProtocol):
    """A bound UDP socket on the event loop; `on_packet(packet, source)` must not block."""

    def __init__(self, on_packet: Callable[[bytes, Endpoint], None]) -> None:
        self._on_packet = on_packet
        self._transport: asyncio.DatagramTransport | None = None
        self._lost = asyncio.Event()
        self.local: Endpoint = ("", 0)

    @classmethod
    async def bind(
        cls, host: str, port: int, on_packet: Callable[[bytes, Endpoint], None]
    ) -> UdpPort:
        """Raises OSError: the port is taken or the host is not ours."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        bound = socket.socket(family, socket.SOCK_DGRAM)
        try:
            bound.setblocking(False)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound.bind((host, port))
            local = bound.getsockname()
            _, protocol = await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: cls(on_packet), sock=bound
            )
        except BaseException:
            bound.close()
            raise
        protocol.local = (str(local[0]), int(local[1]))
        return protocol

    def send(self, packet: bytes, target: Endpoint) -> None:
        """Send one packet, if the network lets it out."""
        if self._transport is not None:
            with suppress(OSError):
                self._transport.sendto(packet, target)

    async def aclose(self) -> None:
        """Close the socket; its port is free afterwards."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
            await self._lost.wait()

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        """See asyncio."""
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """See asyncio."""
        self._on_packet(data, (str(addr[0]), int(addr[1])))

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._transport = None
        self._lost.set()

    def error_received(self, exc: Exception) -> None:
        """A packet of ours came back as an ICMP error: to us the same as no answer."""


async def open_responder(host: str, port: int, responder: Responder) -> UdpPort:
    """A socket that answers with `responder`. Raises OSError: as `UdpPort.bind`."""
    loop = asyncio.get_running_loop()

    def answer(packet: bytes, source: Endpoint) -> None:
        reply = responder.respond(packet, source, now=loop.time(), unix_time=time.time())
        if reply is not None:
            opened.send(reply, source)

    opened = await UdpPort.bind(host, port, answer)
    return opened
