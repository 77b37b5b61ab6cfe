"""Ways to reach a peer, tried side by side until one carries a link.

Happy eyeballs (RFC 8305) in two lanes: direct addresses, IPv6 first, each a little after the one
before it; and by way of a relay, which begins a moment later, so that a peer behind a router is
reached at once by the way that always works and the better one is made afterwards. Connections
race, handshakes do not: only one at a time may be admitted by the peer.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .addresses import MAX_ADDRESSES, parse_address
from .errors import LinkBroken, LinkTimeout, NotAMember, PeerUnreachable, TransportError
from .link import LinkKind

HEAD_START_S = 0.25  # RFC 8305, section 5: between 100 ms and 2 s
RELAY_HEAD_START_S = 0.1  # what direct addresses have, on the same network, before relays are asked
MAX_RELAYS = 2

T = TypeVar("T")
Secure = Callable[[socket.socket, LinkKind], Awaitable[T]]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to a peer: how to connect a socket, and what a link on it is called."""

    name: str
    kind: LinkKind
    connect: Callable[[], Awaitable[socket.socket]]


def direct_ways(addresses: Sequence[str], mapped: Sequence[str] = ()) -> list[Way]:
    """By "host:port", IPv6 first; `mapped` are those that a router forwards."""
    ordered = sorted(addresses[:MAX_ADDRESSES], key=lambda text: not text.startswith("["))
    return [
        Way(
            address,
            LinkKind.MAPPED if address in mapped else LinkKind.DIRECT,
            lambda address=address: connect(address),  # type: ignore[misc]
        )
        for address in ordered
    ]


async def open_path(
    peer_id: str,
    direct: Sequence[Way],
    relayed: Sequence[Way],
    secure: Secure[T],
    *,
    deadline_s: float,
    relay_head_start_s: float = RELAY_HEAD_START_S,
) -> T:
    """What `secure(socket, kind)` makes of the first way that works.

    Raises:
        PeerUnreachable: none did; it names each and why.
        RefusedByPeer: the peer was reached and will not have us.
        LinkClosed: the peer has another link to us already.
    """
    ways = [*direct, *relayed[:MAX_RELAYS]]
    if not ways:
        raise PeerUnreachable(peer_id, "no address of it is known")
    reasons = {way.name: f"no answer within {deadline_s:g} s" for way in ways}
    refused: set[str] = set()
    race = _Race(direct, relayed[:MAX_RELAYS], relay_head_start_s if direct else 0.0)
    try:
        async with asyncio.timeout(deadline_s):
            for _ in ways:
                way, outcome = await race.next()
                if isinstance(outcome, _Failed):
                    reasons[way.name] = outcome.reason
                    if outcome.is_refusal:
                        refused.add(way.name)
                    continue
                try:
                    return await secure(outcome, way.kind)
                except LinkBroken:
                    reasons[way.name] = (
                        "hung up on us: another swarm, another peer,"
                        " or clocks more than a minute apart"
                    )
                except (NotAMember, LinkTimeout) as error:
                    reasons[way.name] = str(error)
    except TimeoutError:
        pass
    finally:
        race.close()
    listed = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
    raise PeerUnreachable(peer_id, listed, refused=refused)


async def connect(address: str) -> socket.socket:
    """A TCP connection to "host:port". Raises ValueError and OSError."""
    loop = asyncio.get_running_loop()
    host, port = parse_address(address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:  # a name: asking for it may take long
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _, protocol, _, target = found[0]
    connection = socket.socket(family, socket.SOCK_STREAM, protocol)
    try:
        connection.setblocking(False)
        await loop.sock_connect(connection, target)
    except BaseException:
        connection.close()
        raise
    return connection


@dataclass(frozen=True, slots=True)
class _Failed:
    """Why a way did not connect."""

    reason: str
    is_refusal: bool = False


class _Race:
    """Connects by several ways, each a head start after the last of its lane."""

    def __init__(
        self, direct: Sequence[Way], relayed: Sequence[Way], relay_head_start_s: float
    ) -> None:
        self._outcomes: asyncio.Queue[tuple[Way, socket.socket | _Failed]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        last_direct = self._start_lane(direct, None)
        begin = asyncio.create_task(_settle(last_direct, relay_head_start_s))
        self._tasks.append(begin)
        self._start_lane(relayed, begin)

    def _start_lane(
        self, ways: Sequence[Way], earlier: asyncio.Task[None] | None
    ) -> list[asyncio.Task[None]]:
        lane: list[asyncio.Task[None]] = []
        for way in ways:
            head_start_s = HEAD_START_S if lane else None
            lane.append(asyncio.create_task(self._run(way, earlier, head_start_s)))
            earlier = lane[-1]
        self._tasks += lane
        return lane

    async def next(self) -> tuple[Way, socket.socket | _Failed]:
        """A way, and a connected socket or why there is none."""
        return await self._outcomes.get()

    def close(self) -> None:
        """Give up the rest; does not wait, so that what was won cannot be lost meanwhile."""
        for task in self._tasks:
            task.cancel()
        while not self._outcomes.empty():
            _, outcome = self._outcomes.get_nowait()
            if isinstance(outcome, socket.socket):
                outcome.close()

    async def _run(
        self, way: Way, earlier: asyncio.Task[None] | None, head_start_s: float | None
    ) -> None:
        if earlier is not None:
            await asyncio.wait({earlier}, timeout=head_start_s)
        outcome: socket.socket | _Failed
        try:
            outcome = await way.connect()
        except ValueError:
            outcome = _Failed("is not an address")
        except ConnectionRefusedError:
            outcome = _Failed("refused the connection", is_refusal=True)
        except OSError as error:
            outcome = _Failed(f"failed: {error.strerror or error}")
        except TransportError as error:  # of a relay
            outcome = _Failed(str(error))
        self._outcomes.put_nowait((way, outcome))


async def _settle(tasks: Sequence[asyncio.Task[None]], at_most_s: float) -> None:
    """Until all have ended, but no longer."""
    if tasks:
        await asyncio.wait(tasks, timeout=at_most_s)
