"""One UDP socket whose NAT is being found out: asks how it is seen, listens for what gets in."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Self

from .facts import Endpoint
from .responder import UdpPort
from .stun import TRANSACTION_BYTES, build_request, read_answer, read_probe

# When a request is sent, and sent again; then no answer is an answer. A satellite takes 0.7 s.
_SENT_AT_S = (0.0, 0.2, 0.6)
ANSWER_S = 1.5


class UdpProber:
    """Made by `open`; close it after use."""

    _port: UdpPort

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._loop = asyncio.get_running_loop()
        self._asked: dict[bytes, asyncio.Future[Endpoint]] = {}
        self._heard: dict[bytes, asyncio.Event] = {}

    @classmethod
    async def open(cls, host: str, key: bytes) -> Self:
        """Bind a fresh port. Raises OSError: the host is not ours."""
        prober = cls(key)
        prober._port = await UdpPort.bind(host, 0, prober._on_packet)
        return prober

    @property
    def local_port(self) -> int:
        """The port of this machine."""
        return self._port.local[1]

    async def ask(self, observer: Endpoint) -> Endpoint | None:
        """How a member's responder sees this socket; None if it does not answer."""
        transaction = os.urandom(TRANSACTION_BYTES)
        request = build_request(self._key, transaction, unix_time=time.time())
        answer: asyncio.Future[Endpoint] = self._loop.create_future()
        self._asked[transaction] = answer
        sending = [
            self._loop.call_later(delay_s, self._port.send, request, observer)
            for delay_s in _SENT_AT_S
        ]
        try:
            async with asyncio.timeout(ANSWER_S):
                return await answer
        except TimeoutError:
            return None
        finally:
            for timer in sending:
                timer.cancel()
            del self._asked[transaction]

    def expect(self) -> tuple[bytes, asyncio.Event]:
        """A nonce for a probe, and what will be set when a probe with it comes in."""
        nonce, heard = os.urandom(TRANSACTION_BYTES), asyncio.Event()
        self._heard[nonce] = heard
        return nonce, heard

    async def aclose(self) -> None:
        """Close the socket; the router forgets its mapping when it likes."""
        await self._port.aclose()

    def _on_packet(self, packet: bytes, source: Endpoint) -> None:
        answer = read_answer(packet, self._key)
        if answer is not None:
            waiting = self._asked.get(answer[0])
            if waiting is not None and not waiting.done():
                waiting.set_result(answer[1])
            return
        nonce = read_probe(packet, self._key)
        if nonce is not None and nonce in self._heard:
            self._heard[nonce].set()
