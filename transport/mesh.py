"""All the links of one node: who is connected, who can be dialled, who is let in.

One live link per peer. When two peers dial each other at once, the dial of the lower peer id
stands: that side holds the other's dial back until its own has succeeded, so nothing is ever sent
on a link that will go. When a peer dials although a link to it seems alive, that link is asked for
a sign of life first: the peer may have restarted, or its network changed.

Retrying, choosing and remembering peers is the caller's business; so is every message but Ping.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from .errors import (
    ErrorCode,
    LinkBroken,
    LinkClosed,
    NotAMember,
    PeerUnreachable,
    TransportError,
)
from .frame import Frame
from .handshake import Credentials, accept, dial
from .identity import Identity
from .invite import InviteBook
from .joining import Welcomer, serve_invite
from .link import Link
from .listener import Listener
from .liveness import LivenessRules
from .membership import Swarm
from .messages import Admitted, Failure, Message
from .paths import PathManager
from .peer import Handler, Peer
from .preamble import PreambleGate
from .tasks import Tasks

logger = logging.getLogger(__name__)

DIAL_S = 15.0  # all addresses of a peer together
HOLD_BACK_S = 2.0  # how long another's dial waits for ours to the same peer
PROBE_S = 1.0  # how long an older link has to show that it lives


class Door(Protocol):
    """Another use of the listening port, told apart by the key that a preamble names."""

    def key_of(self, key_id: bytes) -> bytes | None:
        """The HMAC key of that id; None if it is not this door's."""

    async def enter(
        self, connection: socket.socket, key_id: bytes, source: tuple[str, int]
    ) -> bool:
        """Take a connection whose preamble was good, and own it; True if it was a member's.

        `source` is the IP address and port it came from.
        """


OnUp = Callable[[Peer], None]
OnDown = Callable[[str, TransportError], None]


@dataclass(slots=True)
class _Contact:
    """What the mesh knows of one peer."""

    addresses: tuple[str, ...] = ()
    peer: Peer | None = None
    run: asyncio.Task[None] | None = None  # runs `peer`
    dial: asyncio.Task[None] | None = None
    up: asyncio.Event = field(default_factory=asyncio.Event)
    arrivals: asyncio.Lock = field(default_factory=asyncio.Lock)


def _ignore_up(peer: Peer) -> None:
    """Nobody wants to know."""


def _ignore_down(peer_id: str, error: TransportError) -> None:
    """Nobody wants to know."""


class Mesh:
    """The links of a node; `async with` starts and ends them.

    Callbacks are plain functions called on the event loop and must not block: `handler(peer,
    frame)` for each frame that is no answer, in order; `on_up(peer)` before the first of them;
    `on_down(peer_id, error)` after the last. `PeerLeft` as the error says the peer went away on
    purpose, `LinkClosed` that a link nobody used was closed; anything else is a failure.
    """

    def __init__(
        self,
        identity: Identity,
        swarm: Swarm,
        *,
        handler: Handler,
        listen: Sequence[tuple[str, int]] = (("127.0.0.1", 0),),
        invites: InviteBook | None = None,
        welcome: Welcomer | None = None,
        is_allowed: Callable[[str], bool] = lambda _: True,
        on_up: OnUp = _ignore_up,
        on_down: OnDown = _ignore_down,
        rules: LivenessRules | None = None,
    ) -> None:
        self.peer_id = identity.peer_id
        self._identity = identity
        self._credentials = Credentials.of_swarm(swarm, identity)
        self._handler = handler
        self._invites = invites or InviteBook()
        self._welcome = welcome
        self._is_allowed = is_allowed
        self._on_up = on_up
        self._on_down = on_down
        self._rules = rules
        self._contacts: dict[str, _Contact] = {}
        self._services: dict[type[Message], Handler] = {}
        self._doors: list[Door] = []
        self._paths = PathManager(self._secure)
        gate = PreambleGate(identity.peer_id, self._preamble_key, opened_at=time.time())
        self._listener = Listener(listen, gate, self._on_connection)
        self._tasks = Tasks()
        self._is_closing = False

    async def __aenter__(self) -> Self:
        """Listen. Raises AddressInUse."""
        self._listener.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """As `aclose`."""
        await self.aclose()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Every "host:port" at which another machine may reach this node directly."""
        return self._listener.addresses

    @property
    def peers(self) -> dict[str, Peer]:
        """The peers with a live link, by id; a copy."""
        return {
            peer_id: contact.peer
            for peer_id, contact in self._contacts.items()
            if contact.peer is not None and contact.peer.error is None
        }

    def serve(self, kind: type[Message], handler: Handler) -> None:
        """Hand messages of a kind to `handler` instead of the node's own, under the same rules."""
        self._services[kind] = handler

    def add_door(self, door: Door) -> None:
        """Let `door` take connections whose preamble names a key of its own."""
        self._doors.append(door)

    def learn(self, peer_id: str, addresses: Iterable[str]) -> None:
        """Where a peer can be dialled, in place of what was known."""
        if peer_id != self.peer_id:
            self._contact(peer_id).addresses = tuple(addresses)

    def addresses_of(self, peer_id: str) -> tuple[str, ...]:
        """Where a peer can be dialled, as far as is known."""
        contact = self._contacts.get(peer_id)
        return contact.addresses if contact is not None else ()

    async def peer(self, peer_id: str) -> Peer:
        """The peer, dialled if there is no link to it yet; callers at once share one dial.

        Raises:
            PeerUnreachable: no address of it works.
            RefusedByPeer: it does not let us in.
            NotAMember: it may not be dialled: it was removed, or is ourselves.
        """
        if peer_id == self.peer_id or not self._is_allowed(peer_id):
            raise NotAMember("this peer may not be dialled")
        if self._is_closing:
            raise PeerUnreachable(peer_id, "this node is shutting down")
        contact = self._contact(peer_id)
        live = contact.peer
        if live is not None and live.error is None:
            return live
        if contact.run is not None:  # it is ending: its end is told before a new beginning
            await asyncio.wait({contact.run})
        if contact.dial is None:
            contact.dial = self._tasks.spawn(self._dial(peer_id, contact), "dial")
        dialling = contact.dial
        # The peer may dial us meanwhile: then its link is the answer.
        upward = self._tasks.spawn(_wait(contact.up), "wait for a link")
        try:
            await asyncio.wait({dialling, upward}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            upward.cancel()
        live = contact.peer
        if live is not None:
            return live
        if dialling.done() and not dialling.cancelled():
            dialling.result()  # raises what went wrong
        raise PeerUnreachable(peer_id, "the link was lost at once")

    def drop(self, peer_id: str) -> None:
        """Cut a peer off and forget where it is; `is_allowed` must keep it from coming back."""
        contact = self._contacts.get(peer_id)
        if contact is None:
            return
        contact.addresses = ()
        if contact.dial is not None:
            contact.dial.cancel()
        if contact.peer is not None:
            contact.peer.abort(LinkClosed(by_peer=False))

    def use_swarm(self, swarm: Swarm) -> None:
        """From now on dial and admit with another epoch's secret; links that stand, stand."""
        self._credentials = Credentials.of_swarm(swarm, self._identity)

    async def aclose(self) -> None:
        """Say goodbye to every peer, flush (bounded time), end all links."""
        self._is_closing = True
        await self._listener.aclose()
        closing = [peer.aclose() for peer in self.peers.values()]
        await asyncio.gather(*closing)
        await self._tasks.aclose()

    # --- dialling ----------------------------------------------------------------------------

    async def _dial(self, peer_id: str, contact: _Contact) -> None:
        try:
            link = await self._paths.open(peer_id, contact.addresses, DIAL_S)
        except LinkClosed as error:
            if contact.peer is None:
                raise PeerUnreachable(peer_id, "it closed the link") from error
        else:
            await self._replace(contact)
            self._take_up(link, contact)
        finally:
            contact.dial = None

    async def _secure(self, connection: socket.socket, peer_id: str) -> Link:
        return await dial(
            connection, self._credentials, peer_id=peer_id, is_allowed=self._is_allowed
        )

    # --- being dialled -------------------------------------------------------------------------

    def _preamble_key(self, key_id: bytes) -> bytes | None:
        if key_id == self._credentials.key_id:
            return self._credentials.preamble_key
        token = self._invites.token(key_id, unix_time=time.time())
        if token is not None and self._welcome is not None:
            return token.preamble_key
        keys = (door.key_of(key_id) for door in self._doors)
        return next((key for key in keys if key is not None), None)

    async def _on_connection(
        self, connection: socket.socket, key_id: bytes, source: tuple[str, int]
    ) -> bool:
        for door in self._doors:
            if door.key_of(key_id) is not None:
                return await door.enter(connection, key_id, source)
        token = self._invites.token(key_id, unix_time=time.time())
        if token is not None and self._welcome is not None:
            credentials = Credentials.of_token(token, self._identity)
            link = await accept(connection, credentials, is_allowed=self._is_allowed)
            return await serve_invite(link, key_id, invites=self._invites, welcome=self._welcome)
        link = await accept(connection, self._credentials, is_allowed=self._is_allowed)
        await self._admit(link)
        return True

    async def _admit(self, link: Link) -> None:
        """Decide between a link that came in and one that we have or are about to have."""
        contact = self._contact(link.peer_id)
        is_admitted = False
        try:
            async with contact.arrivals:
                if self.peer_id < link.peer_id:
                    await self._hold_back(contact)
                if await self._still_lives(contact):
                    return  # the dialler has a live link to us, and finds it when this one closes
                await self._replace(contact)
                if link.peer_id == self.peer_id or not self._is_allowed(link.peer_id):
                    link.post(Frame(message=Failure(code=ErrorCode.NOT_A_MEMBER)))
                    return
                link.post(Frame(message=Admitted()))
                self._take_up(link, contact)
                is_admitted = True
                if contact.dial is not None and self.peer_id < link.peer_id:
                    contact.dial.cancel()  # it got nowhere, and would replace this link
        finally:
            if not is_admitted:
                await link.aclose()

    async def _hold_back(self, contact: _Contact) -> None:
        """Our own dial goes first, if it gets anywhere soon."""
        if contact.dial is not None:
            await asyncio.wait({contact.dial}, timeout=HOLD_BACK_S)

    async def _still_lives(self, contact: _Contact) -> bool:
        if contact.peer is None:
            return False
        try:
            await contact.peer.ping(timeout_s=PROBE_S)
        except TransportError:
            return False
        return contact.peer is not None

    # --- links that stand ------------------------------------------------------------------------

    async def _replace(self, contact: _Contact) -> None:
        """Make way for a new link: the old one's end is told before the new one's beginning."""
        while contact.peer is not None and contact.run is not None:
            contact.peer.abort(LinkBroken("a newer link to the peer took its place"))
            await asyncio.wait({contact.run})

    def _take_up(self, link: Link, contact: _Contact) -> None:
        peer = Peer(link, self._dispatch, rules=self._rules)
        contact.peer = peer
        contact.up.set()
        logger.info("peer up", extra={"peer": link.peer_id[-8:], "kind": link.kind.value})
        contact.run = self._tasks.spawn(self._run(peer, contact), "link")

    async def _run(self, peer: Peer, contact: _Contact) -> None:
        error: TransportError = LinkBroken("the link failed here; see the log")
        try:
            self._on_up(peer)
            error = await peer.run()
        finally:
            contact.peer = contact.run = None
            contact.up.clear()
            if not self._is_closing:
                logger.info("peer down", extra={"peer": peer.peer_id[-8:], "reason": str(error)})
                self._on_down(peer.peer_id, error)

    def _dispatch(self, peer: Peer, frame: Frame) -> None:
        self._services.get(type(frame.message), self._handler)(peer, frame)

    def _contact(self, peer_id: str) -> _Contact:
        return self._contacts.setdefault(peer_id, _Contact())


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
