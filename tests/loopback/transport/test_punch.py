"""Sockets that two ends make at once, on loopback: who is refused, and that both take the same."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import socket
import stat
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from covey.transport.errors import LinkTimeout, TransportError
from covey.transport.frame import Frame
from covey.transport.handshake import Credentials, accept, announce, dial, hear_hello
from covey.transport.identity import Identity
from covey.transport.link import LinkKind
from covey.transport.membership import Swarm
from covey.transport.messages import Admitted, Beat, Hello
from covey.transport.preamble import PREAMBLE_BYTES, RECEIPT_BYTES, PreambleGate
from covey.transport.punch import (
    Connections,
    PunchSocket,
    acceptor_end,
    birthday,
    birthday_easy,
    birthday_hard,
    dialer_end,
)
from covey.transport.punch.sockets import MAX_CONNECTIONS

pytestmark = pytest.mark.network

A, B = Identity(bytes(32)), Identity(bytes([1] * 32))
SWARM = Swarm.create(A.peer_id, entropy=lambda n: bytes([7]) * n)
CREDENTIALS = Credentials.of_swarm(SWARM, A)
AT_B = Credentials.of_swarm(SWARM, B)


def gate() -> PreambleGate:
    """B's."""
    keys = {SWARM.key_id: SWARM.preamble_key}
    return PreambleGate(B.peer_id, keys.get, opened_at=time.time() - 100)


def soon(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


@pytest.fixture
def here() -> Iterator[PunchSocket]:
    with PunchSocket(host="127.0.0.1") as punch:
        yield punch


@pytest.fixture
def there() -> Iterator[PunchSocket]:
    with PunchSocket(host="127.0.0.1") as punch:
        yield punch


@pytest.fixture(autouse=True)
async def no_descriptor_is_lost() -> AsyncIterator[None]:
    before = descriptors()
    yield
    for _ in range(100):  # what a peer's close provokes takes a moment
        if descriptors() <= before:
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"{descriptors() - before} descriptors are still open")


def descriptors() -> int:
    """Open sockets; uvloop opens other things when it pleases."""
    n_sockets = 0
    for entry in Path("/dev/fd").iterdir():
        with suppress(OSError):
            n_sockets += stat.S_ISSOCK(os.fstat(int(entry.name)).st_mode)
    return n_sockets


@asynccontextmanager
async def stranger(port: int, data: bytes = b"") -> AsyncIterator[socket.socket]:
    """Someone else's connection to a punched port, made as soon as it listens."""
    loop = asyncio.get_running_loop()
    while True:
        connection = socket.socket()
        connection.setblocking(False)
        try:
            with suppress(ConnectionResetError):  # hung up on that fast
                await loop.sock_connect(connection, ("127.0.0.1", port))
            break
        except ConnectionRefusedError:
            connection.close()
            await asyncio.sleep(0.005)
    try:
        if data:
            await loop.sock_sendall(connection, data)
        yield connection
    finally:
        connection.close()


async def is_hung_up_on(connection: socket.socket) -> bool:
    try:
        return await asyncio.get_running_loop().sock_recv(connection, 1) == b""
    except ConnectionError:
        return True


async def both_ends(at_a: Connections, at_b: Connections) -> tuple[socket.socket, socket.socket]:
    dialled, (accepted, key_id) = await asyncio.gather(
        dialer_end(at_a, CREDENTIALS, peer_id=B.peer_id), acceptor_end(at_b, gate())
    )
    assert key_id == SWARM.key_id
    return dialled, accepted


async def check_one_link(dialled: socket.socket, accepted: socket.socket) -> None:
    """The two sockets are the two ends of one connection, and carry a link."""
    assert dialled.getsockname() == accepted.getpeername()
    assert dialled.getpeername() == accepted.getsockname()

    async def admit() -> None:
        link = await accept(accepted, AT_B, is_allowed=lambda _: True, kind=LinkKind.PUNCHED)
        await hear_hello(link)
        link.post(Frame(message=Admitted()))
        await link.send(await link.receive())
        await link.aclose()

    admitting = asyncio.create_task(admit())
    link, _ = await dial(
        dialled,
        CREDENTIALS,
        peer_id=B.peer_id,
        is_allowed=lambda _: True,
        hello=Hello(link=bytes(16), is_new=True),
        kind=LinkKind.PUNCHED,
        is_announced=True,
    )
    assert link.kind is LinkKind.PUNCHED
    await link.send(Frame(message=Beat(body=b"hello")))
    assert (await link.receive()).message == Beat(body=b"hello")
    await asyncio.gather(link.aclose(), admitting)


@pytest.mark.parametrize("late_s", [0.0, 0.2])
@pytest.mark.parametrize("late", ["dialer", "acceptor"])
async def test_both_ends_take_the_same_socket_whoever_is_late(
    here: PunchSocket, there: PunchSocket, late: str, late_s: float
) -> None:
    async def at_a() -> socket.socket:
        await asyncio.sleep(late_s if late == "dialer" else 0)
        towards_b = here.connections(f"127.0.0.1:{there.port}", until=soon(3))
        return await dialer_end(towards_b, CREDENTIALS, peer_id=B.peer_id)

    async def at_b() -> tuple[socket.socket, bytes]:
        await asyncio.sleep(late_s if late == "acceptor" else 0)
        towards_a = there.connections(f"127.0.0.1:{here.port}", until=soon(3))
        return await acceptor_end(towards_a, gate())

    dialled, (accepted, _) = await asyncio.gather(at_a(), at_b())
    await check_one_link(dialled, accepted)


@pytest.mark.parametrize("given_up_at", [0, 1])
async def test_of_many_connections_both_ends_choose_one(given_up_at: int) -> None:
    """As after a birthday punch: several sockets connect, some already given up on."""
    rng = random.Random(5)
    listening = socket.create_server(("127.0.0.1", 0))
    ends: list[tuple[socket.socket, socket.socket]] = []
    for _ in range(12):
        dialled = socket.create_connection(listening.getsockname())
        accepted, _ = listening.accept()
        dialled.setblocking(False)
        accepted.setblocking(False)
        ends.append((dialled, accepted))
    listening.close()
    lost = set(rng.sample(range(12), 5))

    def source(at: int) -> Connections:
        left = rng.sample(range(12), 12)

        async def work(connections: Connections) -> None:
            try:
                while left:
                    n = left.pop()
                    if n in lost and at == given_up_at:
                        ends[n][at].close()
                    else:
                        connections.offer(ends[n][at])
                    await asyncio.sleep(rng.choice((0, 0.001)))
            finally:
                for n in left:
                    ends[n][at].close()

        return Connections(work, until=soon(3))

    await check_one_link(*await both_ends(source(0), source(1)))


async def test_a_third_party_at_the_port_gets_silence_and_changes_nothing(
    here: PunchSocket, there: PunchSocket
) -> None:
    async def intrude(data: bytes) -> bool:
        async with stranger(there.port, data) as connection:
            return await is_hung_up_on(connection)

    intruders = [
        asyncio.create_task(intrude(data))
        for data in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(77), b"\x16\x03\x01" + bytes(200))
    ]
    accepting = asyncio.create_task(
        acceptor_end(there.connections(f"127.0.0.1:{here.port}", until=soon(5)), gate())
    )
    await asyncio.wait(intruders[2:])  # of the others, more may come
    towards_b = here.connections(f"127.0.0.1:{there.port}", until=soon(3))
    dialled = await dialer_end(towards_b, CREDENTIALS, peer_id=B.peer_id)
    accepted, _ = await accepting
    await check_one_link(dialled, accepted)
    assert all(await asyncio.gather(*intruders))


async def test_only_the_host_that_was_agreed_on_gets_as_far_as_a_preamble(
    here: PunchSocket,
) -> None:
    async with here.connections("127.0.0.2:9", until=soon(3)) as connections:
        async with stranger(here.port) as connection:
            assert await is_hung_up_on(connection)
        assert not connections.has_open


async def test_a_dialer_is_not_taken_in_by_a_stranger_without_the_key(
    here: PunchSocket, there: PunchSocket
) -> None:
    """The address leads to somebody else at first, who answers with anything at all."""
    answers = [
        b"",
        b"SSH-2.0-x\r\n",
        bytes(RECEIPT_BYTES),
        random.Random(0).randbytes(RECEIPT_BYTES),
    ]
    seen: list[bytes] = []
    loop = asyncio.get_running_loop()
    listening = there.bind_another()
    listening.listen()
    dialling = asyncio.create_task(
        dialer_end(
            here.connections(f"127.0.0.1:{there.port}", until=soon(5)),
            CREDENTIALS,
            peer_id=B.peer_id,
        )
    )
    for answer in answers:
        connection, _ = await loop.sock_accept(listening)
        seen.append(await loop.sock_recv(connection, 4096))
        await loop.sock_sendall(connection, answer)
        connection.close()
    listening.close()
    accepted, _ = await acceptor_end(
        there.connections(f"127.0.0.1:{here.port}", until=soon(3)), gate()
    )
    await check_one_link(await dialling, accepted)
    assert {len(preamble) for preamble in seen} == {PREAMBLE_BYTES}
    assert len(set(seen)) == len(seen)  # a nonce of its own for every socket


async def test_a_preamble_that_was_used_before_is_of_no_use(there: PunchSocket) -> None:
    a_gate = gate()
    one, other = socket.socketpair()
    preamble = announce(one, CREDENTIALS, peer_id=B.peer_id)
    a_gate.judge(preamble, unix_time=time.time())
    one.close()
    other.close()
    accepting = asyncio.create_task(
        acceptor_end(there.connections("127.0.0.1:9", until=soon(0.3)), a_gate)
    )
    async with stranger(there.port, preamble) as connection:
        assert await is_hung_up_on(connection)
    with pytest.raises(LinkTimeout):
        await accepting


async def test_what_never_comes_ends_at_the_deadline(here: PunchSocket) -> None:
    with PunchSocket(host="127.0.0.1") as silent:
        remote = f"127.0.0.1:{silent.port}"
        with pytest.raises(LinkTimeout):
            await dialer_end(
                here.connections(remote, until=soon(0.2)), CREDENTIALS, peer_id=B.peer_id
            )
        with pytest.raises(LinkTimeout):
            await acceptor_end(here.connections(remote, until=soon(0.2)), gate())


async def test_an_end_that_is_given_up_leaves_nothing_behind(
    here: PunchSocket, there: PunchSocket
) -> None:
    accepting = asyncio.create_task(
        acceptor_end(there.connections(f"127.0.0.1:{here.port}", until=soon(5)), gate())
    )
    async with stranger(there.port) as connection:
        accepting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await accepting
        assert await is_hung_up_on(connection)


async def test_connections_beyond_the_bound_are_closed(here: PunchSocket) -> None:
    loop = asyncio.get_running_loop()
    strangers = []
    taken = []
    async with here.connections("127.0.0.1:9", until=soon(5)) as connections:
        await asyncio.sleep(0)
        for _ in range(MAX_CONNECTIONS + 20):
            connection = socket.socket()
            connection.setblocking(False)
            strangers.append(connection)
            with suppress(ConnectionResetError):  # hung up on that fast
                await loop.sock_connect(connection, ("127.0.0.1", here.port))
        async for connection in connections:
            taken.append(connection)
            if len(taken) == MAX_CONNECTIONS:
                break
        for connection in strangers[MAX_CONNECTIONS:]:
            assert await is_hung_up_on(connection)
    for connection in (*strangers, *taken):
        connection.close()


@pytest.mark.parametrize(
    "remote",
    [
        "",
        "127.0.0.1",
        "127.0.0.1:0",
        "example.org:80",
        "[::1]:80",
        "224.0.0.251:5353",
        "255.255.255.255:9",
        "0.0.0.0:80",
    ],
)
async def test_what_is_not_the_address_of_one_machine_is_refused(
    here: PunchSocket, remote: str
) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        here.connections(remote, until=soon(1))


async def test_ipv6_is_punched_alike() -> None:
    with (
        PunchSocket(family=socket.AF_INET6, host="::1") as here,
        PunchSocket(family=socket.AF_INET6, host="::1") as there,
    ):
        await check_one_link(
            *await both_ends(
                here.connections(f"[::1]:{there.port}", until=soon(3)),
                there.connections(f"[::1]:{here.port}", until=soon(3)),
            )
        )


class _Ports(random.Random):
    """Chooses ports where nobody listens, rather than call on what runs on this machine."""

    def sample(self, population: Any, k: int, **_: Any) -> Any:
        return [1] * k


@pytest.mark.parametrize("easy", ["dialer", "acceptor"])
async def test_a_birthday_ends_in_one_link(here: PunchSocket, easy: str) -> None:
    easy_end = birthday_easy(here, "127.0.0.1", rng=_Ports())
    hard_end = birthday_hard(f"127.0.0.1:{here.port}")
    ends = (easy_end, hard_end) if easy == "dialer" else (hard_end, easy_end)
    await check_one_link(*await both_ends(*ends))


async def test_a_birthday_sends_no_more_than_it_says(
    here: PunchSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(birthday, "ROUND_S", 0.6)
    monkeypatch.setattr(birthday, "_SOCKET_S", 0.59)
    monkeypatch.setattr(birthday, "HEAD_START_S", 0.0)
    monkeypatch.setattr(birthday, "LAST_WORDS_S", 0.1)
    n_made = 0

    class Counting(PunchSocket):
        def bind_another(self) -> socket.socket:
            nonlocal n_made
            n_made += 1
            return super().bind_another()

    with Counting(host="127.0.0.1") as counting:
        slowest = await slowest_step(
            lambda: dialer_end(
                birthday_easy(counting, "127.0.0.1", rng=_Ports()),
                CREDENTIALS,
                peer_id=B.peer_id,
            )
        )
    most = 1 + birthday.ROUNDS * birthday.EASY_PORTS  # the one listens
    assert most // 2 < n_made <= most
    assert slowest < 0.02


async def slowest_step(act: Callable[[], Any]) -> float:
    """The most CPU time between two turns of the loop while `act` fails."""
    longest, done = 0.0, False

    async def watch() -> None:
        nonlocal longest
        while not done:
            began = time.thread_time()
            await asyncio.sleep(0)
            longest = max(longest, time.thread_time() - began)

    watching = asyncio.create_task(watch())
    with suppress(LinkTimeout):
        await act()
    done = True
    await watching
    return longest


def n_handles() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())


async def test_a_birthday_keeps_to_the_file_handles_that_are_left(
    here: PunchSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = [n_handles() + 128 + 200]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limits[0], limits[0]))
    assert birthday._affordable(birthday.EASY_PORTS) in range(195, 206)
    limits[0] -= 180
    with pytest.raises(TransportError, match="ulimit -n"):
        birthday_easy(here, "127.0.0.1")
    with pytest.raises(TransportError, match="ulimit -n"):
        birthday_hard("127.0.0.1:9")


async def test_a_socket_that_met_itself_is_no_connection() -> None:
    with PunchSocket(host="127.0.0.1") as lonely:
        connections = lonely.connections(f"127.0.0.1:{lonely.port}", until=soon(0.2))
        # With a listener beside it, it would find that; without, it would find itself.
        connection = lonely.bind_another()
        with suppress(OSError):
            connection.connect(("127.0.0.1", lonely.port))
        assert connection.getsockname() == connection.getpeername()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        with pytest.raises(LinkTimeout):
            await dialer_end(connections, CREDENTIALS, peer_id=B.peer_id)
