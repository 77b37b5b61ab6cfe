"""Real control planes on 127.0.0.1: they find each other through one they know, and nobody else."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import trio
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from covey.transport.control import ControlError, ControlPlane, PeerRecord
from covey.transport.control_records import RecordOutdated, RecordRule, record_key
from covey.transport.identity import Identity

pytestmark = [pytest.mark.network, pytest.mark.slow]

SWARM = "meadow2026"
PSK = bytes(range(32))
EXPIRES_AT = int(time.time()) + 3600


def plane(number: int, *, psk: bytes = PSK, port: int = 0, mdns: bool = False) -> ControlPlane:
    seed = bytes(31) + bytes([number])
    return ControlPlane(private_key=seed, psk=psk, swarm=SWARM, port=port, mdns=mdns)


def record_of(control: ControlPlane, *, sequence: int = 1) -> PeerRecord:
    return PeerRecord(
        peer_id=control.peer_id,
        swarm=SWARM,
        addresses=("127.0.0.1:7070",),
        control_addresses=control.addresses,
        sequence=sequence,
        expires_at=EXPIRES_AT,
    )


@asynccontextmanager
async def swarm_of(n_planes: int) -> AsyncIterator[list[ControlPlane]]:
    """Planes 1..n, of which all but the first know only the first; each has announced itself."""
    async with AsyncExitStack() as stack:
        planes = [await stack.enter_async_context(plane(n + 1)) for n in range(n_planes)]
        for control in planes:
            if control is not planes[0]:
                assert await control.bootstrap(planes[0].addresses) == 1
            await control.announce(record_of(control))
        yield planes


def covey_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("covey")]


async def test_members_that_know_one_find_all() -> None:
    async with swarm_of(3) as planes:
        everyone = {control.peer_id for control in planes}
        for control in planes:
            found = await control.discover()
            assert {record.peer_id for record in found} == everyone - {control.peer_id}
            assert len(found) == 2
    assert not covey_threads()


async def test_dials_of_one_peer_at_once_share_a_connection() -> None:
    async with plane(1) as first, plane(2) as second:
        dials = [second.bootstrap(first.addresses) for _ in range(3)]
        assert await asyncio.gather(*dials) == [1, 1, 1]


async def test_the_first_member_may_leave() -> None:
    async with swarm_of(3) as (first, second, third):
        await second.discover()
        await first.aclose()
        assert await third.lookup(second.peer_id) == record_of(second)
        assert third.peer_id in {record.peer_id for record in await second.discover()}


async def test_an_unknown_peer_is_not_found_and_soon() -> None:
    async with swarm_of(2) as (_, second), asyncio.timeout(5):
        assert await second.lookup(Identity(bytes(31) + b"\x63").peer_id) is None
        assert await second.lookup("not a peer id") is None


async def test_a_restarted_member_replaces_its_record() -> None:
    async with swarm_of(2) as (first, second):
        assert await first.lookup(second.peer_id) == record_of(second)
        await second.aclose()
        async with plane(2) as again:
            await again.bootstrap(first.addresses)
            held = await again.lookup(again.peer_id)
            assert held is not None
            renewed = record_of(again, sequence=held.sequence + 1)
            await again.announce(renewed)
            assert await first.lookup(again.peer_id) == renewed
            assert await first.discover() == [renewed]
            with pytest.raises(RecordOutdated) as caught:
                await again.announce(record_of(again, sequence=held.sequence))
            assert caught.value.sequence == renewed.sequence
        async with plane(2) as third_life:
            await third_life.bootstrap(first.addresses)
            with pytest.raises(RecordOutdated) as caught:
                await third_life.announce(record_of(third_life, sequence=1))
            assert caught.value.sequence == renewed.sequence


async def test_a_record_in_anothers_name_is_stored_nowhere() -> None:
    async with swarm_of(3) as (first, second, third):
        own = third.sign(record_of(third, sequence=99))

        async def write(key: str, value: bytes, node: Any) -> bool:
            # Past our own checks, as a member with a changed program would.
            node.dht.value_store.put(key.encode(), value)
            peer = node.host.get_connected_peers()[0]
            taken: bool = await node.dht.value_store._store_at_peer(peer, key.encode(), value)
            return taken

        for key, value, is_taken in (
            (record_key(SWARM, second.peer_id), own, False),  # a record under a foreign key
            (record_key(SWARM, second.peer_id), b"\x93junk", False),
            ("/other/namespace", own, False),
            (record_key(SWARM, third.peer_id), own, True),  # the one that may be written
        ):
            assert await third._call("write", 5, partial(write, key, value)) is is_taken
        assert await first.lookup(second.peer_id) == record_of(second)
        assert await third.lookup(second.peer_id) == record_of(second)


async def test_lies_about_expiry_are_stored_nowhere() -> None:
    async with swarm_of(3) as (first, second, third):
        key = record_key(SWARM, third.peer_id)

        async def write(value: bytes, node: Any) -> bool:
            node.dht.value_store.put(key.encode(), value)  # from where it is sent
            peer = node.host.get_connected_peers()[0]
            taken: bool = await node.dht.value_store._store_at_peer(peer, key.encode(), value)
            return taken

        for expires_at in (int(time.time()) - 1, int(time.time()) + 40 * 24 * 3600):
            lie = third.sign(replace(record_of(third, sequence=9), expires_at=expires_at))
            assert not await third._call("write", 5, partial(write, lie))
        assert await first.lookup(third.peer_id) == record_of(third)
        assert await second.lookup(third.peer_id) == record_of(third)


async def test_lies_about_anothers_addresses_do_not_count_against_its_own_word() -> None:
    async with swarm_of(3) as (first, second, third):

        async def lie(node: Any) -> list[bytes]:
            answer = Message(type=Message.MessageType.FIND_NODE)
            for peer_id, address in (
                (second.peer_id, "/ip4/192.0.2.66/tcp/1"),
                (Identity(bytes(31) + b"\x63").peer_id, "/dns4/example.org/tcp/1"),
            ):
                peer = ID.from_base58(peer_id).to_bytes()
                answer.closerPeers.add(id=peer, addrs=[Multiaddr(address).to_bytes()])
            answer.closerPeers.add(id=b"nonsense", addrs=[b"\xff"])
            return list(await node.dht.take_in(answer))

        async def addresses(node: Any) -> list[str]:
            return [str(a) for a in node.host.get_peerstore().addrs(ID.from_base58(second.peer_id))]

        assert len(await third._call("lie", 5, lie)) == 2
        assert "192.0.2.66" not in " ".join(await third._call("see", 5, addresses))
        async with asyncio.timeout(5):
            assert await third.lookup(second.peer_id) == record_of(second)
            assert await third.lookup(Identity(bytes(31) + b"\x63").peer_id) is None
        assert await first.lookup(third.peer_id) == record_of(third)


async def test_a_record_is_forgotten_when_it_expires() -> None:
    async with swarm_of(2) as (first, second):

        async def tidy(now: float, node: Any) -> tuple[int, int]:
            node.dht.rule = RecordRule(swarm=SWARM, now=lambda: now)
            node.dht.tidy(now)
            providers = node.dht.provider_store.providers.values()
            return len(node.dht.value_store.store), sum(map(len, providers))

        now = time.time()
        assert (await first._call("tidy", 5, partial(tidy, now)))[0] == 2
        assert await first._call("tidy", 5, partial(tidy, now + 3 * 3600)) == (0, 0)
        assert await second.lookup(second.peer_id) == record_of(second)


async def test_a_member_that_cannot_be_dialled_is_found_and_asked_for_nothing() -> None:
    async with swarm_of(3) as (first, second, _), plane(4) as hidden:

        async def serving(node: Any) -> set[str]:
            return {str(peer) for peer in node.dht.routing_table.get_peer_ids()}

        await hidden.set_reachable(is_reachable=False)
        await hidden.bootstrap(first.addresses)
        await hidden.announce(record_of(hidden))
        assert await second.lookup(hidden.peer_id) == record_of(hidden)
        assert hidden.peer_id in {record.peer_id for record in await second.discover()}
        assert hidden.peer_id not in await first._call("serving", 5, serving)
        assert await hidden.lookup(second.peer_id) == record_of(second)
        await hidden.set_reachable(is_reachable=True)
        await hidden.set_reachable(is_reachable=True)
        assert await hidden.lookup(second.peer_id) == record_of(second)


async def test_known_members_are_not_asked_for_again() -> None:
    async with swarm_of(3) as (first, second, third):
        assert await first.discover({second.peer_id}) == [record_of(third)]
        assert await first.discover({second.peer_id, third.peer_id}) == []


async def test_a_connection_that_nobody_uses_is_closed_and_opened_again_when_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("covey.transport.control_swarm.IDLE_S", (0.2, 0.4))
    monkeypatch.setattr("covey.transport.control_swarm.SWEEP_S", 0.05)

    async def until_alone(node: Any) -> None:
        while node.host.get_connected_peers():  # noqa: ASYNC110 - libp2p tells nobody
            await trio.sleep(0.01)

    async with swarm_of(2) as (first, second):
        await second._call("until alone", 5, until_alone)
        await first._call("until alone", 5, until_alone)
        assert await first.lookup(second.peer_id) == record_of(second)
        assert await second.discover() == [record_of(first)]


async def test_a_cancelled_question_does_not_spoil_its_connection() -> None:
    async with swarm_of(2) as (first, second):
        for delay_s in (0.0, 0.001, 0.002, 0.005, 0.01):
            with suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await second.announce(record_of(second))
            async with asyncio.timeout(2):
                assert await second.lookup(first.peer_id) == record_of(first)


async def test_a_stranger_without_the_key_does_not_get_in() -> None:
    async with swarm_of(2) as (first, second), plane(9, psk=bytes(32)) as stranger:
        async with asyncio.timeout(8):
            assert await stranger.bootstrap(first.addresses) == 0
        await stranger.announce(record_of(stranger))
        assert await stranger.discover() == []
        assert await first.lookup(stranger.peer_id) is None
        assert await first.discover() == [record_of(second)]


async def test_a_silent_peer_costs_one_deadline_and_the_others_connect() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        deaf = f"/ip4/127.0.0.1/tcp/{port}/p2p/{Identity(bytes(31) + bytes([98])).peer_id}"
        async with swarm_of(2) as (first, second), asyncio.timeout(8):
            addresses = [deaf, "nonsense", *first.addresses, *second.addresses]
            assert await second.bootstrap(addresses) == 1
            assert len(await second.discover()) == 1  # does not wait for the silent one again


async def test_a_member_that_falls_asleep_with_its_connections_open_is_waited_for_once() -> None:
    asleep, wake = threading.Event(), threading.Event()

    async def sleep(_: object) -> None:
        asleep.set()
        wake.wait(30)  # holds up the whole trio thread

    async with swarm_of(3) as (first, second, third):
        call = asyncio.ensure_future(third._call("sleep", 30, sleep))
        try:
            assert await asyncio.to_thread(asleep.wait, 5)
            everyone = {second.peer_id, third.peer_id}
            for deadline_s in (6.0, 2.0):
                async with asyncio.timeout(deadline_s):
                    found = await first.discover()
                assert {record.peer_id for record in found} == everyone
        finally:
            wake.set()
            await call


async def test_cancelling_a_bootstrap_leaves_the_plane_usable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        deaf = f"/ip4/127.0.0.1/tcp/{port}/p2p/{Identity(bytes(31) + bytes([98])).peer_id}"
        async with swarm_of(2) as (first, second):
            call = asyncio.ensure_future(second.bootstrap([deaf]))
            accepted, _ = await asyncio.to_thread(silent.accept)  # the dial is under way
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            with accepted:
                accepted.settimeout(2)
                while await asyncio.to_thread(accepted.recv, 4096):  # until libp2p hangs up
                    pass
            assert await second.discover() == [record_of(first)]


async def test_a_taken_port_is_one_clear_line() -> None:
    async with plane(1) as first:
        port = int(first.addresses[0].split("/")[4])
        second = plane(2, port=port)
        with pytest.raises(ControlError, match=rf"port {port}: .* choose another --port"):
            await second.start()
        await second.aclose()
    async with plane(2, port=port) as third:  # free again at once
        assert f"/tcp/{port}/" in third.addresses[0]


async def test_a_member_is_not_deaf_after_many_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("covey.transport.control_swarm.MAX_CONNECTIONS", 2)
    async with plane(1) as first:
        for number in range(2, 7):
            async with plane(number) as visitor, asyncio.timeout(5):
                # The one before is shown out within a moment; a slot that is lost stays lost.
                while not await visitor.bootstrap(first.addresses):
                    pass


async def test_members_on_one_network_find_each_other_by_mdns() -> None:
    heard: asyncio.Queue[tuple[str, tuple[str, ...]]] = asyncio.Queue()
    first, second = plane(1, mdns=True), plane(2, mdns=True)
    stranger = plane(9, psk=bytes(32), mdns=True)
    second.on_discovered(lambda *found: heard.put_nowait(found))
    async with stranger, first, second, asyncio.timeout(10):
        assert await heard.get() == (first.peer_id, first.addresses)
        assert heard.empty()
        assert await second.bootstrap(first.addresses) == 1
    assert not covey_threads()


def test_importing_the_control_plane_does_not_import_libp2p() -> None:
    code = (
        "import sys, covey.transport.control;"
        "print(sorted({'libp2p', 'trio', 'multiaddr'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
