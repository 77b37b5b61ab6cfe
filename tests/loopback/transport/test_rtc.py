"""WebRTC on loopback: what makes it fail, that nothing stays behind, and where packets go."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import stat
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from aioice import stun

from covey.transport.errors import (
    LinkBroken,
    LinkTimeout,
    MalformedFrame,
    PeerUnreachable,
    TransportError,
)
from covey.transport.frame import Frame
from covey.transport.messages import Beat
from covey.transport.rtc import open_rtc_link, opening
from support.rtc import LOOPBACK, both_ends, loopback_candidates, rtc_pair, signals

pytestmark = pytest.mark.network


@pytest.fixture(autouse=True)
async def nothing_stays_behind() -> AsyncIterator[None]:
    sockets, tasks = n_sockets(), other_tasks()
    with loopback_candidates():
        yield
    for _ in range(50):  # what a peer's end provokes takes a moment
        if n_sockets() <= sockets and not other_tasks() - tasks:
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"{n_sockets() - sockets} sockets are still open, {other_tasks() - tasks} run")


def other_tasks() -> set[asyncio.Task[object]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


def n_sockets() -> int:
    found = 0
    for entry in Path("/dev/fd").iterdir():
        with suppress(OSError):
            found += stat.S_ISSOCK(os.fstat(int(entry.name)).st_mode)
    return found


async def outcomes(*openings: object) -> list[object]:
    return await asyncio.gather(*openings, return_exceptions=True)  # type: ignore[call-overload, no-any-return]


async def test_a_link_opens_and_closes_promptly() -> None:
    began = time.monotonic()
    at_a, at_b = await rtc_pair("a", "b")
    await at_a.send(Frame(message=Beat(body=b"hello")))
    assert (await at_b.receive()).message == Beat(body=b"hello")
    await asyncio.gather(at_a.aclose(), at_b.aclose())
    assert time.monotonic() - began < 2


async def test_a_peer_that_ends_without_a_word_is_noticed_at_once() -> None:
    at_a, at_b = await rtc_pair("a", "b")
    began = time.monotonic()
    at_a.abort(LinkBroken("gone"))
    with pytest.raises(LinkBroken):
        await at_b.receive()
    assert time.monotonic() - began < 1
    await asyncio.gather(at_a.aclose(), at_b.aclose())


async def test_another_certificate_than_was_announced_is_nobody() -> None:
    def forge(text: str) -> str:
        return re.sub("sha-256 (.)", lambda it: "sha-256 " + "10"[it[1] == "1"], text)

    at_a, at_b = await outcomes(*both_ends("a", "b", forge, deadline_s=1.5))
    assert isinstance(at_b, PeerUnreachable)
    assert "DTLS" in str(at_b)
    assert isinstance(at_a, TransportError)


async def test_a_wrong_ice_password_gets_nowhere() -> None:
    def forge(text: str) -> str:
        return re.sub("ice-pwd:.{8}", "ice-pwd:forgedxx", text)

    at_a, at_b = await outcomes(*both_ends("a", "b", forge, deadline_s=1.0))
    assert isinstance(at_a, LinkTimeout | PeerUnreachable)
    assert isinstance(at_b, LinkTimeout | PeerUnreachable)


@pytest.mark.parametrize("text", ["", "\0" * 100, "v=0\r\n", "a=ice-ufrag:x", "x" * 20_000])
async def test_a_description_that_is_none_is_refused(text: str) -> None:
    at_a, at_b = signals(lambda _: text)
    await at_a.send("")
    with pytest.raises(TransportError):
        await open_rtc_link(at_b, is_dialer=False, peer_id="a", hosts=(LOOPBACK,), deadline_s=3.0)


async def test_who_never_answers_is_given_up_on() -> None:
    _, at_b = signals()
    with pytest.raises(LinkTimeout):
        await open_rtc_link(at_b, is_dialer=False, peer_id="a", deadline_s=0.1)


async def test_an_opening_that_is_cancelled_leaves_nothing() -> None:
    for after_s in (0.0, 0.001, 0.01, 0.03):
        tasks = [asyncio.create_task(opening) for opening in both_ends("a", "b")]  # type: ignore[arg-type, var-annotated]
        await asyncio.sleep(after_s)
        for task in tasks:
            task.cancel()
        for link in await outcomes(*tasks):
            if not isinstance(link, BaseException):
                link.abort(LinkBroken("over"))  # type: ignore[attr-defined]
                await link.aclose()  # type: ignore[attr-defined]


class StunServer(asyncio.DatagramProtocol):
    """Says that everybody is at one address."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, source: tuple[str, int]) -> None:
        request = stun.parse_message(data)
        answer = stun.Message(stun.Method.BINDING, stun.Class.RESPONSE, request.transaction_id)
        answer.attributes["XOR-MAPPED-ADDRESS"] = ("203.0.113.9", 999)
        self.transport.sendto(bytes(answer), source)  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_answered", [True, False])
async def test_silent_stun_servers_cost_little_beside_one_that_answers(
    monkeypatch: pytest.MonkeyPatch, is_answered: bool
) -> None:
    monkeypatch.setattr(opening, "GATHER_S", 1.0)
    loop = asyncio.get_running_loop()
    server, _ = await loop.create_datagram_endpoint(StunServer, local_addr=(LOOPBACK, 0))
    said: list[str] = []

    def listen(text: str) -> str:
        said.append(text)
        return text

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind((LOOPBACK, 0))
        servers = [("::1", 9), silent.getsockname()]
        if is_answered:
            servers.append(server.get_extra_info("sockname"))
        at_a, at_b = signals(listen)
        began = loop.time()
        links = await asyncio.gather(
            *(
                open_rtc_link(
                    signal,
                    is_dialer=is_dialer,
                    peer_id="x",
                    hosts=(LOOPBACK,),
                    stun_servers=servers,
                    deadline_s=5.0,
                )
                for signal, is_dialer in ((at_a, True), (at_b, False))
            )
        )
        took = loop.time() - began
        assert silent.recv(100)
    assert ("203.0.113.9 999 typ srflx" in said[0]) is is_answered
    assert took < 0.9 if is_answered else 0.9 < took < 3
    server.close()
    await asyncio.gather(*(link.aclose() for link in links))


async def test_a_third_party_gets_no_packets() -> None:
    """Its address is described, but nobody has seen the peer there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as victim:
        victim.bind(("127.0.0.2", 0))
        victim.setblocking(False)
        port = victim.getsockname()[1]
        at_a, at_b = signals(lambda text: re.sub(r"127\.0\.0\.1 \d+", f"127.0.0.2 {port}", text))
        found = await outcomes(
            *(
                open_rtc_link(
                    signal, is_dialer=is_dialer, peer_id="x", hosts=(LOOPBACK,), deadline_s=1.0
                )
                for signal, is_dialer in ((at_a, True), (at_b, False))
            )
        )
        assert isinstance(found[1], MalformedFrame)
        with pytest.raises(BlockingIOError):
            victim.recv(100)


async def test_a_port_that_does_not_answer_gets_a_bounded_probe() -> None:
    """A member may describe any port of its own host: at most seven small packets each."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as victim:
        victim.bind((LOOPBACK, 0))
        victim.setblocking(False)
        port = victim.getsockname()[1]
        found = await outcomes(
            *both_ends(
                "a",
                "b",
                lambda text: re.sub(r"127\.0\.0\.1 \d+", f"127.0.0.1 {port}", text),
                deadline_s=4.0,
            )
        )
        for link in found:
            if not isinstance(link, BaseException):  # the peer's own checks may get through
                link.abort(LinkBroken("over"))  # type: ignore[attr-defined]
                await link.aclose()  # type: ignore[attr-defined]
        packets = []
        with suppress(BlockingIOError):
            while True:
                packets.append(victim.recv(2000))
    assert 0 < len(packets) <= 7
    assert max(map(len, packets)) <= 150
