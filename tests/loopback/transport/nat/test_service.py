"""Whole services on loopback, where each 127.0.0.x plays a public address."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from aioice import stun

from covey.transport.errors import TransportError
from covey.transport.membership import Swarm
from covey.transport.nat import service as service_module
from covey.transport.nat.facts import NatFacts, NatKind
from covey.transport.nat.prober import UdpProber
from covey.transport.nat.responder import UdpPort
from covey.transport.nat.service import NatService
from covey.transport.nat.stun import build_request, read_answer
from support.meshes import Node

pytestmark = pytest.mark.network


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def members(
    stack: AsyncExitStack, *hosts: str, swarm: Swarm | None = None
) -> list[tuple[Node, NatService, list[NatFacts]]]:
    """Nodes that listen on these hosts, each with its service and what that told."""
    swarm = swarm or Swarm.create(Node().id)
    made = []
    for host in hosts:
        node, told = Node(), list[NatFacts]()
        mesh = await stack.enter_async_context(node.make(swarm, listen=((host, 0),)))
        service = NatService(
            mesh,
            swarm,
            on_change=told.append,
            maps_ports=False,
            is_outside=lambda host: host.startswith("127."),
        )
        await stack.enter_async_context(service)
        made.append((node, service, told))
    return made


async def link(a: Node, b: Node) -> None:
    a.mesh.learn(b.id, b.mesh.addresses)
    await a.mesh.peer(b.id)


async def test_without_anybody_to_ask_everything_is_unknown(stack: AsyncExitStack) -> None:
    ((node, service, _),) = await members(stack, "127.0.0.1")
    facts = await service.refresh()
    assert (facts.udp, facts.tcp, facts.n_observers) == (NatKind.UNKNOWN, NatKind.UNKNOWN, 0)
    assert not facts.is_reachable
    assert facts.lan_hosts == ("127.0.0.1",)
    assert facts.port == node.mesh.bound[0][1]
    with pytest.raises(TransportError, match="no member"):
        await service.observe_from()


async def test_an_open_host_is_told_so_by_two_members(stack: AsyncExitStack) -> None:
    (me, mine, told), (first, _, _), (second, _, _) = await members(
        stack, "127.0.0.1", "127.0.0.2", "127.0.0.3"
    )
    await link(me, first)
    await link(me, second)
    facts = await mine.refresh()
    assert (facts.udp, facts.tcp, facts.n_observers) == (NatKind.OPEN, NatKind.OPEN, 2)
    assert facts.is_reachable
    assert facts.public_hosts == ("127.0.0.1",)
    assert told[-1] == facts == mine.facts
    assert len(mine.stun_servers) == 2
    assert mine.steps


async def test_one_member_tells_less(stack: AsyncExitStack) -> None:
    (me, mine, _), (first, _, _) = await members(stack, "127.0.0.1", "127.0.0.2")
    await link(me, first)
    facts = await mine.refresh()
    assert facts.n_observers == 1
    assert facts.udp is NatKind.ADDRESS_RESTRICTED  # open to other hosts? nobody could try
    assert facts.is_reachable


async def test_new_links_are_noticed(stack: AsyncExitStack) -> None:
    (me, mine, _), (first, _, _) = await members(stack, "127.0.0.1", "127.0.0.2")
    await mine.refresh()
    await link(me, first)
    mine.poke()
    async with asyncio.timeout(10):
        while mine.facts.n_observers == 0:  # noqa: ASYNC110 - the service has no event of its own
            await asyncio.sleep(0.05)


async def test_a_link_that_comes_during_the_first_round_is_not_overlooked(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "LOOK_S", 3600.0)
    monkeypatch.setattr(service_module, "LOOK_AT_MOST_S", 3600.0)
    (me, mine, _), (first, _, _) = await members(stack, "127.0.0.1", "127.0.0.2")
    me.mesh.on_path(lambda _: mine.poke())
    await link(me, first)
    async with asyncio.timeout(10):
        while mine.facts.n_observers == 0:  # noqa: ASYNC110 - the service has no event of its own
            await asyncio.sleep(0.05)


async def test_a_socket_of_any_port_can_be_observed(stack: AsyncExitStack) -> None:
    (me, mine, _), (first, _, _) = await members(stack, "127.0.0.1", "127.0.0.2")
    await link(me, first)
    await mine.refresh()
    connection, seen = await mine.observe_from()
    local_port = connection.getsockname()[1]
    assert seen == f"127.0.0.1:{local_port}"
    connection.close()


async def test_a_member_of_the_next_epoch_is_answered_after_the_change(
    stack: AsyncExitStack,
) -> None:
    swarm = Swarm.create(Node().id)
    ((node, service, _),) = await members(stack, "127.0.0.1", swarm=swarm)
    later = swarm.next_epoch()
    assert await udp_answer(node, later.stun_key) is None
    service.use_swarm(later)
    assert await udp_answer(node, later.stun_key) is not None
    assert await udp_answer(node, swarm.stun_key) is None


async def udp_answer(node: Node, key: bytes) -> bytes | None:
    """What the node's STUN port says to a request from a fresh socket."""
    answers: asyncio.Queue[bytes] = asyncio.Queue()
    port = await UdpPort.bind("127.0.0.9", 0, lambda packet, source: answers.put_nowait(packet))
    port.send(build_request(key, b"t" * 12, unix_time=time.time()), node.mesh.bound[0])
    try:
        async with asyncio.timeout(0.3):
            packet = await answers.get()
    except TimeoutError:
        return None
    finally:
        await port.aclose()
    assert read_answer(packet, key) is not None
    return packet


async def test_the_stun_port_has_the_number_of_the_listening_port(stack: AsyncExitStack) -> None:
    swarm = Swarm.create(Node().id)
    ((node, _, _),) = await members(stack, "127.0.0.1", swarm=swarm)
    assert await udp_answer(node, swarm.stun_key) is not None


async def test_a_taken_udp_port_is_replaced_by_another(stack: AsyncExitStack) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        node, swarm = Node(), Swarm.create(Node().id)
        port = taken.getsockname()[1]
        mesh = await stack.enter_async_context(node.make(swarm, listen=(("127.0.0.1", port),)))
        service = NatService(mesh, swarm, maps_ports=False)
        async with service:
            assert service.facts.port == port


async def test_a_plain_request_is_answered_once_there_is_a_link(stack: AsyncExitStack) -> None:
    (me, _, _), (first, _, _) = await members(stack, "127.0.0.1", "127.0.0.2")
    plain = bytes(stun.Message(stun.Method.BINDING, stun.Class.REQUEST))
    assert not await has_answer(plain, first)
    await link(me, first)
    assert await has_answer(plain, first)


async def has_answer(packet: bytes, node: Node) -> bool:
    answered = asyncio.Event()
    port = await UdpPort.bind("127.0.0.1", 0, lambda packet, source: answered.set())
    port.send(packet, node.mesh.bound[0])
    try:
        async with asyncio.timeout(0.3):
            await answered.wait()
    except TimeoutError:
        return False
    finally:
        await port.aclose()
    return True


async def test_a_changed_network_makes_everything_unknown_at_once(stack: AsyncExitStack) -> None:
    (me, mine, told), (first, _, _) = await members(stack, "127.0.0.1", "127.0.0.2")
    await link(me, first)
    await mine.refresh()
    mine._address_changed()
    assert told[-1].udp is NatKind.UNKNOWN
    async with asyncio.timeout(10):
        while mine.facts.n_observers == 0:  # noqa: ASYNC110 - the service has no event of its own
            await asyncio.sleep(0.05)


async def test_what_was_opened_is_closed(stack: AsyncExitStack) -> None:
    ((node, service, _),) = await members(stack, "127.0.0.1")
    port = node.mesh.bound[0][1]
    await service.aclose()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
        again.bind(("127.0.0.1", port))


async def test_a_flood_of_garbage_keeps_no_member_from_its_answer(stack: AsyncExitStack) -> None:
    swarm = Swarm.create(Node().id)
    ((node, _, _),) = await members(stack, "127.0.0.1", swarm=swarm)
    prober = await UdpProber.open("127.0.0.9", swarm.stun_key)
    stack.push_async_callback(prober.aclose)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.bind(("127.0.0.77", 0))
        stranger.setblocking(False)
        for n in range(5000):
            packet = build_request(b"wrong", n.to_bytes(12, "big"), unix_time=time.time())
            stranger.sendto(packet[: 1 + n % len(packet)] * (1 + n % 9), node.mesh.bound[0])
        # What the kernel dropped is asked again, as any member does.
        assert await prober.ask(node.mesh.bound[0]) == ("127.0.0.9", prober.local_port)
        with pytest.raises(BlockingIOError):
            stranger.recv(1)
