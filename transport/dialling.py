"""Dials a peer, and gets a link that lost its carrier back on its feet.

Knows which ways lead to a peer and how a handshake is done; who may be let in, and what becomes of
a link, is the mesh's business.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

from .addresses import parse_address
from .contact import Contact, mend_deadline_s
from .errors import LinkBroken, LinkClosed, PeerUnreachable, RefusedByPeer, TransportError
from .handshake import Credentials, dial
from .link import Link, LinkKind
from .messages import Hello, Receipt
from .paths import Way, direct_ways, open_path
from .peer import Peer
from .steady.link import SteadyLink
from .tasks import Tasks

DIAL_S = 15.0  # all ways to a peer together
YIELD_S = 0.3  # how long the higher peer id leaves mending to the lower one
RETRY_S = 0.25  # between two attempts to mend

RelayWays = Callable[[str, Sequence[str]], Sequence[Way]]


class Dialler:
    """Opens carriers for one mesh; `relay_ways` is set once there are relays to ask."""

    def __init__(
        self,
        own_peer_id: str,
        credentials: Callable[[], Credentials],
        is_allowed: Callable[[str], bool],
        tasks: Tasks,
    ) -> None:
        self.relay_ways: RelayWays = lambda _peer_id, _relays: ()
        self._own = own_peer_id
        self._credentials = credentials
        self._is_allowed = is_allowed
        self._tasks = tasks

    async def open(self, peer_id: str, contact: Contact, hello: Hello) -> tuple[Link, Receipt]:
        """A carrier by whatever way works, and what the peer has of the link.

        A peer that is new to the swarm tells of its relays some seconds after its addresses: then
        all begins anew, rather than wait for addresses that may lead nowhere.
        """
        if contact.has_relays.is_set():
            return await self._open(peer_id, contact, hello)
        opening = self._tasks.spawn(self._open(peer_id, contact, hello), "open a carrier")
        learning = self._tasks.spawn(_wait(contact.has_relays), "wait for relays")
        try:
            await asyncio.wait({opening, learning}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            discard(opening)
            raise
        finally:
            learning.cancel()
        if opening.done():
            return opening.result()
        discard(opening)
        return await self._open(peer_id, contact, hello)

    async def _open(self, peer_id: str, contact: Contact, hello: Hello) -> tuple[Link, Receipt]:
        async def secure(connection: socket.socket, kind: LinkKind) -> tuple[Link, Receipt]:
            return await self.secure(connection, peer_id, hello, kind)

        return await open_path(
            peer_id,
            direct_ways(contact.addresses, contact.mapped),
            self.relay_ways(peer_id, contact.relays),
            secure,
            deadline_s=DIAL_S,
        )

    async def secure(
        self,
        connection: socket.socket,
        peer_id: str,
        hello: Hello,
        kind: LinkKind,
        *,
        is_announced: bool = False,
    ) -> tuple[Link, Receipt]:
        """The dialer's handshake with a member; see `handshake.dial`."""
        return await dial(
            connection,
            self._credentials(),
            peer_id=peer_id,
            is_allowed=self._is_allowed,
            hello=hello,
            kind=kind,
            is_announced=is_announced,
        )

    async def mend(self, contact: Contact, peer: Peer, link: SteadyLink) -> None:
        """Find a new carrier for a link that lost its own; end the link if there is none soon."""
        if contact.moving is not None:
            contact.moving.cancel()  # it may take longer than there is time
        try:
            async with asyncio.timeout(mend_deadline_s(peer.rtt_s, was_silent=link.was_silent)):
                if self._own > peer.peer_id:
                    await link.wait_carried(YIELD_S)
                while link.needs_carrier:
                    await self._redial(contact, link)
        except TimeoutError:
            pass
        if link.needs_carrier:
            peer.abort(link.lost_to)

    async def _redial(self, contact: Contact, link: SteadyLink) -> None:
        """Try once to find a new carrier."""
        if contact.dial is None:
            hello = Hello(link=link.id, is_new=False, received=link.receipt)
            opening = self._tasks.spawn(self.open(link.peer_id, contact, hello), "redial")
            contact.dial = opening
        else:
            return await link.wait_carried(RETRY_S)
        try:
            await asyncio.wait({opening})
        except asyncio.CancelledError:
            discard(opening)
            raise
        finally:
            contact.dial = None
        try:
            carrier, received = opening.result()
        except (LinkClosed, asyncio.CancelledError):
            await link.wait_carried(RETRY_S)  # the peer dialled us, and that stands
        except RefusedByPeer:
            link.abort(LinkBroken("the peer has restarted, or will not have us"))
        except PeerUnreachable as error:
            if link.remote is not None and any(
                parse_address(address)[0] == link.remote[0] for address in error.refused
            ):
                link.abort(link.lost_to)
            await link.wait_carried(RETRY_S)
        else:
            with suppress(TransportError):
                link.attach(carrier, received)


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


def discard(opening: asyncio.Task[tuple[Link, Receipt]]) -> None:
    """Nobody waits for a carrier any more: end what comes of it."""

    def end(done: asyncio.Task[tuple[Link, Receipt]]) -> None:
        if not done.cancelled() and done.exception() is None:
            done.result()[0].abort(LinkBroken("it came too late"))

    opening.cancel()
    opening.add_done_callback(end)
