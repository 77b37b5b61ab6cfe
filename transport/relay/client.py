"""The two ends' side of a relay: a socket to a peer by way of a member that both have a link to.

What comes out is a connected socket, as if it had been dialled or accepted; the handshake on it is
the caller's. Connections are made to addresses at which the relay itself is known, and nowhere
else: a hostile relay, or peer, cannot make this node connect to a third party.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from covey.transport.addresses import format_address
from covey.transport.errors import (
    LinkTimeout,
    MalformedFrame,
    PeerUnreachable,
    TransportError,
)
from covey.transport.frame import Frame
from covey.transport.link import LinkKind
from covey.transport.messages import RelayDeclined, RelayOffer, RelayOpen, RelayOpened
from covey.transport.paths import direct_ways, open_path
from covey.transport.peer import Peer
from covey.transport.preamble import NONCE_BYTES, build_preamble
from covey.transport.tasks import Tasks

logger = logging.getLogger(__name__)

MAX_OFFERS = 16  # followed at once
MAX_OFFERS_PER_RELAY = 8
CONNECT_S = 4.0  # a relay waits no longer for the second end

# Takes a socket that `origin` will dial us on, does what a listener does, returns when it has.
OnConnection = Callable[[socket.socket, str], Awaitable[object]]


class RelayClient:
    """Opens circuits, and follows those that others open to this node (serves `RelayOffer`).

    `addresses_of(peer_id)` says where a relay may be dialled if this node has not dialled it.
    """

    def __init__(
        self,
        *,
        addresses_of: Callable[[str], Sequence[str]],
        on_connection: OnConnection,
    ) -> None:
        self._addresses_of = addresses_of
        self._on_connection = on_connection
        self._following: dict[str, int] = {}  # relay -> offers
        self._tasks = Tasks()

    async def open(self, peer_id: str, relay: Peer, *, deadline_s: float) -> socket.socket:
        """A socket to `peer_id` by way of `relay`, ready for `handshake.dial`.

        It does not wait for the peer: what is sent waits at the relay until the peer has come, and
        the connection ends if it does not within a few seconds.

        Raises:
            RefusedByPeer: the relay will not: it is full, unwilling, or has no link to the peer.
            PeerUnreachable: no connection to the relay's port.
            LinkTimeout, LinkClosed, LinkBroken: the relay is gone.
        """
        connecting = self._tasks.spawn(self._connect(relay), "connect to a relay")
        is_done = False
        try:
            async with asyncio.timeout(deadline_s):
                # Both at once: a round trip less.
                reply = await relay.request(RelayOpen(peer=peer_id), timeout_s=deadline_s)
                if not isinstance(reply.message, RelayOpened):
                    raise MalformedFrame("the relay did not answer what was asked")
                connection = await connecting
                _enter(connection, relay.peer_id, reply.message.circuit, reply.message.key)
                is_done = True
                return connection
        except TimeoutError as error:
            raise LinkTimeout("a request to relay", deadline_s) from error
        finally:
            if not is_done:
                connecting.cancel()
                connecting.add_done_callback(_close_result)

    def on_offer(self, peer: Peer, frame: Frame) -> None:
        """A relay says that somebody wants to reach us; `peer` is the relay."""
        offer = frame.message
        if not isinstance(offer, RelayOffer):
            return
        n_of_relay = self._following.get(peer.peer_id, 0)
        if n_of_relay >= MAX_OFFERS_PER_RELAY or sum(self._following.values()) >= MAX_OFFERS:
            _decline(peer, offer)
            return
        self._following[peer.peer_id] = n_of_relay + 1
        self._tasks.spawn(self._follow(peer, offer), "follow an offer to relay")

    async def aclose(self) -> None:
        """Give up what is under way."""
        await self._tasks.aclose()

    async def _follow(self, relay: Peer, offer: RelayOffer) -> None:
        try:
            try:
                connection = await self._connect(relay)
                _enter(connection, relay.peer_id, offer.circuit, offer.key)
            except TransportError as error:
                _decline(relay, offer)
                logger.info("cannot follow a relay", extra={"reason": str(error)})
                return
            await self._on_connection(connection, offer.origin)
        finally:
            self._following[relay.peer_id] -= 1
            if not self._following[relay.peer_id]:
                del self._following[relay.peer_id]

    async def _connect(self, relay: Peer) -> socket.socket:
        """A connection to the relay's port. Raises PeerUnreachable."""
        made: list[socket.socket] = []

        async def keep(connection: socket.socket, kind: LinkKind) -> socket.socket:
            made.append(connection)
            return connection

        ways = direct_ways(self._ports_of(relay))
        try:
            return await open_path(relay.peer_id, ways, (), keep, deadline_s=CONNECT_S)
        except BaseException:  # cancelled while the slower ways are given up
            for connection in made:
                connection.close()
            raise

    def _ports_of(self, relay: Peer) -> Sequence[str]:
        # A punched connection leads to a port that only we may use, and only once.
        dialled = relay.dialled_address
        if dialled is not None and relay.kind in (LinkKind.DIRECT, LinkKind.MAPPED):
            return [format_address(*dialled)]
        return self._addresses_of(relay.peer_id)


def _enter(connection: socket.socket, relay_id: str, circuit: bytes, key: bytes) -> None:
    """Show the relay which circuit this is. Raises PeerUnreachable."""
    preamble = build_preamble(
        key_id=circuit,
        key=key,
        expected_peer_id=relay_id,
        nonce=os.urandom(NONCE_BYTES),
        unix_time=time.time(),
    )
    try:
        connection.send(preamble)  # a fresh socket has room for it
    except OSError as error:
        connection.close()
        raise PeerUnreachable(relay_id, "it hung up") from error


def _decline(relay: Peer, offer: RelayOffer) -> None:
    with suppress(TransportError):
        relay.post(RelayDeclined(circuit=offer.circuit))


def _close_result(connecting: asyncio.Task[socket.socket]) -> None:
    """Nobody will take what the task made."""
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().close()
