"""Port mapping against routers of our own making: kind, unkind and hanging ones.

miniupnpd itself is asked in `tests/netns/transport/nat`.
"""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from covey.transport.nat import mapping, natpmp
from covey.transport.nat.facts import Endpoint
from covey.transport.nat.mapping import Blocking, MappingFailed, PortMapper
from covey.transport.nat.responder import UdpPort

pytestmark = pytest.mark.network

ROUTER = "127.0.0.53"
OUTER = bytes([11, 0, 9, 9])
Answer = Callable[[bytes], list[bytes]]


@asynccontextmanager
async def router(answer: Answer) -> AsyncIterator[list[bytes]]:
    """A NAT-PMP router; the requests that came."""
    requests: list[bytes] = []

    def on_packet(packet: bytes, source: Endpoint) -> None:
        requests.append(packet)
        for reply in answer(packet):
            port.send(reply, source)

    port = await UdpPort.bind(ROUTER, natpmp.PORT, on_packet)
    yield requests
    await port.aclose()


def granting(outer_port: int, lease_s: int = 3600) -> Answer:
    """Grants every wish with that port."""

    def answer(packet: bytes) -> list[bytes]:
        if packet == natpmp.address_request():
            return [struct.pack("!BBHI4s", 0, 128, 0, 1, OUTER)]
        _, operation, _, inner_port, _, wanted_s = struct.unpack("!BBHHHI", packet)
        granted = (outer_port, lease_s) if wanted_s else (0, 0)
        return [struct.pack("!BBHIHHI", 0, 128 + operation, 0, 1, inner_port, *granted)]

    return answer


@pytest.fixture
def no_upnp(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network where nothing answers UPnP; the real one is not asked."""

    def fail() -> None:
        raise MappingFailed("no router answers")

    monkeypatch.setattr(mapping, "_upnp_router", fail)


async def test_a_port_is_granted_renewed_and_given_back() -> None:
    mapper = PortMapper(lambda: ROUTER)
    async with router(granting(4001)) as requests:
        mapped = await mapper.map(4000)
        assert mapped is not None
        assert (mapped.address, mapped.lease_s, mapped.by) == ("11.0.9.9:4001", 3600, "NAT-PMP")
        await mapper.map(4000)
        assert requests[-1] == natpmp.map_request(natpmp.Operation.MAP_TCP, 4000, 4001, 3600)
        await mapper.remove()
        assert requests[-1] == natpmp.map_request(natpmp.Operation.MAP_TCP, 4000, 0, 0)
        assert mapper.mapped is None
        n_requests = len(requests)
        await mapper.remove()
        assert len(requests) == n_requests


@pytest.mark.usefixtures("no_upnp")
async def test_a_refusal_says_why() -> None:
    mapper = PortMapper(lambda: ROUTER)
    async with router(lambda packet: [b"\0" + bytes([128 + packet[1]]) + b"\0\2" + bytes(4)]):
        assert await mapper.map(4000) is None
    assert "settings" in mapper.reason
    assert "UPnP: no router answers" in mapper.reason


@pytest.mark.usefixtures("no_upnp")
async def test_garbage_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "NATPMP_S", 0.2)
    mapper = PortMapper(lambda: ROUTER)
    async with router(lambda packet: [b"", b"\0", b"\0\x80", bytes(12), b"x" * 1400] * 20):
        assert await mapper.map(4000) is None
    assert "does not answer" in mapper.reason


@pytest.mark.usefixtures("no_upnp")
async def test_a_grant_of_another_port_of_ours_is_not_taken() -> None:
    def answer(packet: bytes) -> list[bytes]:
        if packet == natpmp.address_request():
            return granting(1)(packet)
        return [struct.pack("!BBHIHHI", 0, 130, 0, 1, 22, 4000, 3600)]

    mapper = PortMapper(lambda: ROUTER)
    async with router(answer):
        assert await mapper.map(4000) is None
    assert "another port" in mapper.reason


@pytest.mark.usefixtures("no_upnp")
async def test_a_lost_mapping_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "NATPMP_S", 0.1)
    mapper = PortMapper(lambda: ROUTER)
    async with router(granting(4001)):
        assert await mapper.map(4000) is not None
    assert await mapper.map(4000) is None
    assert mapper.mapped is None


async def test_a_call_that_hangs_is_given_up_and_not_begun_twice() -> None:
    blocking, release = Blocking(), threading.Event()
    with pytest.raises(MappingFailed, match="in time"):
        await blocking.run(lambda: release.wait(30), 0.05)
    with pytest.raises(MappingFailed, match="earlier"):
        await blocking.run(lambda: True, 5)
    release.set()
    thread = blocking._thread
    assert thread is not None
    await asyncio.to_thread(thread.join)
    assert await blocking.run(lambda: True, 5)


async def test_what_fails_in_the_thread_fails_here() -> None:
    def fail() -> None:
        raise MappingFailed("no")

    with pytest.raises(MappingFailed, match="no"):
        await Blocking().run(fail, 5)
