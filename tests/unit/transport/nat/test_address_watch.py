"""The address watch: what netlink says, and when the callback is called."""

from __future__ import annotations

import asyncio
import socket
import struct

from covey.transport.nat.address_watch import AddressWatch, Attachment, tells_of_a_move

HOME = Attachment(frozenset({"192.168.1.2"}), ("192.168.1.2", None))
NOWHERE = Attachment(frozenset(), (None, None))
CAFE = Attachment(frozenset({"10.0.0.9"}), ("10.0.0.9", None))


def message(kind: int, body: bytes) -> bytes:
    """One netlink message, padded as the kernel does."""
    data = struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body
    return data + bytes(-len(data) % 4)


NEW_ADDRESS = message(20, bytes([socket.AF_INET, 24, 0, 0]) + bytes(4))
GONE_ADDRESS = message(21, bytes([socket.AF_INET, 24, 0, 0]) + bytes(4))
GONE_LINK_LOCAL = message(21, bytes([socket.AF_INET6, 64, 0, 253]) + bytes(4))
GONE_DEFAULT = message(25, bytes([socket.AF_INET6, 0]) + bytes(10))
GONE_ROUTE = message(25, bytes([socket.AF_INET, 24]) + bytes(10))
NEW_DEFAULT = message(24, bytes([socket.AF_INET, 0]) + bytes(10))
NEW_DEFAULT_V6 = message(24, bytes([socket.AF_INET6, 0]) + bytes(10))


def test_lost_addresses_and_default_routes_are_a_move() -> None:
    assert tells_of_a_move(GONE_ADDRESS)
    assert tells_of_a_move(GONE_DEFAULT)
    assert tells_of_a_move(NEW_DEFAULT)
    assert tells_of_a_move(NEW_ADDRESS + GONE_ROUTE + GONE_DEFAULT)


def test_other_events_are_not() -> None:
    assert not tells_of_a_move(NEW_ADDRESS + GONE_ROUTE + GONE_LINK_LOCAL + NEW_DEFAULT_V6)
    assert not tells_of_a_move(b"")


class Network:
    """How the machine is attached, as the test wants it, and how often that was said to change."""

    def __init__(self) -> None:
        self.attachment = HOME
        self.looked = asyncio.Event()
        self.changed = asyncio.Event()
        self.n_changes = 0

    def look(self) -> Attachment:
        self.looked.set()
        return self.attachment

    def on_change(self) -> None:
        self.n_changes += 1
        self.changed.set()

    async def next_look(self) -> None:
        self.looked.clear()
        await self.looked.wait()


async def test_a_change_is_told_once_when_it_has_settled() -> None:
    network = Network()
    watch = AddressWatch(network.on_change, look=network.look, settle_s=0.01, poll_s=0.01)
    watch.start()
    async with asyncio.timeout(5):
        await network.next_look()
        assert network.n_changes == 0
        network.attachment = CAFE
        await network.changed.wait()
        await network.next_look()
        await network.next_look()
    assert network.n_changes == 1
    await watch.aclose()


async def test_the_same_addresses_on_another_network_are_a_change() -> None:
    network = Network()
    watch = AddressWatch(network.on_change, look=network.look, settle_s=0.01, poll_s=60)
    kernel, events = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    events.setblocking(False)
    watch.start(events)
    async with asyncio.timeout(5):
        kernel.send(NEW_ADDRESS)
        await network.next_look()
        assert network.n_changes == 0
        for event in (GONE_DEFAULT, NEW_DEFAULT, GONE_ADDRESS, NEW_ADDRESS):
            kernel.send(event)
        await network.changed.wait()
    assert network.n_changes == 1
    await watch.aclose()
    kernel.close()


async def test_a_stream_of_events_does_not_put_off_the_callback_for_ever() -> None:
    network = Network()
    watch = AddressWatch(
        network.on_change, look=network.look, settle_s=0.05, settle_at_most_s=0.2, poll_s=60
    )
    kernel, events = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    events.setblocking(False)
    watch.start(events)

    async def storm() -> None:
        while True:
            kernel.send(NEW_ADDRESS)
            await asyncio.sleep(0.01)

    storming = asyncio.create_task(storm())
    network.attachment = CAFE
    async with asyncio.timeout(5):
        await network.changed.wait()
    storming.cancel()
    await asyncio.wait({storming})
    await watch.aclose()
    kernel.close()


async def test_between_two_networks_nothing_is_told() -> None:
    network = Network()
    watch = AddressWatch(network.on_change, look=network.look, settle_s=0.01, poll_s=60)
    kernel, events = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    events.setblocking(False)
    watch.start(events)
    async with asyncio.timeout(5):
        network.attachment = NOWHERE
        kernel.send(GONE_DEFAULT)
        for _ in range(5):
            await network.next_look()
        assert network.n_changes == 0
        network.attachment = CAFE
        await network.changed.wait()
    await watch.aclose()
    kernel.close()


async def test_the_real_thing_starts_and_ends() -> None:
    watch = AddressWatch(lambda: None)
    watch.start()
    await watch.aclose()
    assert isinstance(Attachment.now(), Attachment)
