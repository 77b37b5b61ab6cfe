"""Notices that this machine's addresses or its way out have changed.

On Linux the kernel says so (rtnetlink); elsewhere, and as a safety net, the addresses are compared
every few seconds. Events are gathered until they cease for a moment: a change of network is a
dozen of them. What the change means is the callback's business.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from covey.transport.addresses import reachable_hosts
from covey.transport.tasks import Tasks

logger = logging.getLogger(__name__)

SETTLE_S = 0.3  # without an event before the callback is called: sessions wait for it
SETTLE_AT_MOST_S = 5.0
POLL_S = 5.0
POLL_WITH_EVENTS_S = 60.0

# linux/rtnetlink.h
_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400  # link, IPv4 address and route, IPv6 address and route
_DELETED_ADDRESS, _NEW_ROUTE, _DELETED_ROUTE = 21, 24, 25
_HEADER = struct.Struct("=IHHII")
_MAX_MESSAGE = 65_536
# No packet goes to these (RFC 5737, RFC 3849): they only ask which address would be the source.
_SOMEWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))

OnChange = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Attachment:
    """How this machine is attached to networks."""

    hosts: frozenset[str]
    sources: tuple[str | None, str | None]  # own address of the default route, IPv4 and IPv6

    def is_cut_off_since(self, before: Attachment) -> bool:
        """Whether the machine is between two networks: it had a way out and has none."""
        return any(before.sources) and not any(self.sources)

    @classmethod
    def now(cls) -> Attachment:
        """As it is."""
        hosts = [*reachable_hosts("0.0.0.0"), *reachable_hosts("::")]  # noqa: S104 - not bound
        four, six = (_source(family, host) for family, host in _SOMEWHERE)
        return cls(frozenset(hosts), (four, six))


def tells_of_a_move(messages: bytes) -> bool:
    """Whether netlink messages say that an address went away, or a default route went or came.

    All may look as before in the end, and yet lead to another network. Routers announce IPv6
    routes again and again: a new one of those says nothing.
    """
    offset = 0
    while offset + _HEADER.size <= len(messages):
        length, kind, *_ = _HEADER.unpack_from(messages, offset)
        if length < _HEADER.size:
            break
        body = messages[offset + _HEADER.size : offset + length]
        if kind == _DELETED_ADDRESS and len(body) > 3 and body[3] == 0:  # of global scope
            return True
        is_default = len(body) > 1 and body[1] == 0  # a route whose prefix has no bits
        if is_default and kind == _DELETED_ROUTE:
            return True
        if is_default and kind == _NEW_ROUTE and body[0] == socket.AF_INET:
            return True
        offset += (length + 3) & ~3
    return False


class AddressWatch:
    """Calls `on_change()` on the event loop, some time after the network has changed."""

    def __init__(
        self,
        on_change: OnChange,
        *,
        look: Callable[[], Attachment] = Attachment.now,
        settle_s: float = SETTLE_S,
        settle_at_most_s: float = SETTLE_AT_MOST_S,
        poll_s: float | None = None,
    ) -> None:
        self._on_change = on_change
        self._look = look
        self._settle_s = settle_s
        self._settle_at_most_s = settle_at_most_s
        self._poll_s = poll_s
        self._events: socket.socket | None = None
        self._stirred = asyncio.Event()
        self._has_moved = False
        self._tasks = Tasks()

    def start(self, events: socket.socket | None = None) -> None:
        """Begin to watch; `events` brings netlink messages in place of the kernel's."""
        self._events = events or _open_events()
        if self._events is not None:
            asyncio.get_running_loop().add_reader(self._events.fileno(), self._read_events)
        if self._poll_s is None:
            self._poll_s = POLL_S if self._events is None else POLL_WITH_EVENTS_S
        self._tasks.spawn(self._watch(self._look()), "address watch")

    async def aclose(self) -> None:
        """Stop watching."""
        await self._tasks.aclose()
        if self._events is not None:
            asyncio.get_running_loop().remove_reader(self._events.fileno())
            self._events.close()
            self._events = None

    def _read_events(self) -> None:
        events = self._events
        if events is None:
            return
        try:
            while True:
                self._has_moved |= tells_of_a_move(events.recv(_MAX_MESSAGE))
        except BlockingIOError:
            pass
        except OSError:  # it overflowed: there were many
            self._has_moved = True
        self._stirred.set()

    async def _watch(self, before: Attachment) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):
                    await self._stirred.wait()
                await self._settle(before)
            self._has_moved, had_moved = False, self._has_moved
            now = self._look()
            if now != before or had_moved:
                before = now
                logger.info("the network has changed")
                self._on_change()

    async def _settle(self, before: Attachment) -> None:
        """Wait until events cease and there is a way out if there was one, though not for ever."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settle_at_most_s):
                while self._stirred.is_set() or self._look().is_cut_off_since(before):
                    self._stirred.clear()
                    await asyncio.sleep(self._settle_s)
        self._stirred.clear()


def _open_events() -> socket.socket | None:
    if sys.platform != "linux":
        return None
    try:
        events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    except OSError:  # Android forbids it
        return None
    try:
        events.setblocking(False)
        events.bind((0, _GROUPS))
    except OSError:
        events.close()
        return None
    return events


def _source(family: socket.AddressFamily, somewhere: str) -> str | None:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((somewhere, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None
