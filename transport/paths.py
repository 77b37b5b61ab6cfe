"""Ways to reach a peer, tried in order until one carries a link.

Today there is one: a direct TCP connection to an address the peer is known by. Happy eyeballs
(RFC 8305): IPv6 first, each address a little after the one before it. Connections race, handshakes
do not: only one at a time may be admitted by the peer.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence

from .addresses import MAX_ADDRESSES, parse_address
from .errors import LinkBroken, LinkTimeout, NotAMember, PeerUnreachable
from .link import Link

HEAD_START_S = 0.25  # RFC 8305, section 5: between 100 ms and 2 s

Secure = Callable[[socket.socket, str], Awaitable[Link]]


class PathManager:
    """Opens links; `secure(socket, peer_id)` does the handshake on a connected socket."""

    def __init__(self, secure: Secure) -> None:
        self._secure = secure

    async def open(self, peer_id: str, addresses: Sequence[str], deadline_s: float) -> Link:
        """A link to the peer by the first address that works.

        Raises:
            PeerUnreachable: none did; it names each and why.
            RefusedByPeer: the peer was reached and will not have us.
            LinkClosed: the peer has another link to us already.
        """
        if not addresses:
            raise PeerUnreachable(peer_id, "no address of it is known")
        ordered = sorted(addresses[:MAX_ADDRESSES], key=lambda text: not text.startswith("["))
        reasons = dict.fromkeys(ordered, f"no answer within {deadline_s:g} s")
        race = _Race(ordered)
        try:
            async with asyncio.timeout(deadline_s):
                for _ in ordered:
                    address, outcome = await race.next()
                    if isinstance(outcome, str):
                        reasons[address] = outcome
                        continue
                    try:
                        return await self._secure(outcome, peer_id)
                    except LinkBroken:
                        reasons[address] = (
                            "hung up on us: another swarm, another peer,"
                            " or clocks more than a minute apart"
                        )
                    except (NotAMember, LinkTimeout) as error:
                        reasons[address] = str(error)
        except TimeoutError:
            pass
        finally:
            await race.aclose()
        listed = "; ".join(f"{address} {reason}" for address, reason in reasons.items())
        raise PeerUnreachable(peer_id, listed)


class _Race:
    """Connects to addresses, each a head start after the last; yields outcomes as they come."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._outcomes: asyncio.Queue[tuple[str, socket.socket | str]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        for address in addresses:
            earlier = self._tasks[-1] if self._tasks else None
            self._tasks.append(asyncio.create_task(self._run(address, earlier)))

    async def next(self) -> tuple[str, socket.socket | str]:
        """An address, and a connected socket or why there is none."""
        return await self._outcomes.get()

    async def aclose(self) -> None:
        """Give up the rest."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while not self._outcomes.empty():
            _, outcome = self._outcomes.get_nowait()
            if isinstance(outcome, socket.socket):
                outcome.close()

    async def _run(self, address: str, earlier: asyncio.Task[None] | None) -> None:
        if earlier is not None:
            await asyncio.wait({earlier}, timeout=HEAD_START_S)
        try:
            outcome: socket.socket | str = await _connect(address)
        except ValueError:
            outcome = "is not an address"
        except ConnectionRefusedError:
            outcome = "refused the connection"
        except OSError as error:
            outcome = f"failed: {error.strerror or error}"
        self._outcomes.put_nowait((address, outcome))


async def _connect(address: str) -> socket.socket:
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
