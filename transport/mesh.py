"""All the links of one node: who is connected, who can be dialled, who is let in.

One live link per peer. When two peers dial each other at once, the dial of the lower peer id
stands: that side holds the other's dial back until its own has succeeded, so nothing is ever sent
on a link that will go. When a peer dials although a link to it seems alive, that link is asked for
a sign of life first: the peer may have restarted.

A link that loses its carrier is mended for a short while before it counts as broken
(`dialling.py`): both sides dial anew, and go on where they were.

Retrying, choosing and remembering peers is the caller's business; so is every message but Ping.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

from .contact import Contact
from .dialling import Dialler, RelayWays, discard
from .errors import (
    LinkBroken,
    LinkClosed,
    NotAMember,
    PeerUnreachable,
    TransportError,
)
from .frame import Frame
from .handshake import Credentials
from .identity import Identity
from .invite import InviteBook
from .joining import Welcomer
from .link import Link
from .liveness import LivenessRules
from .membership import Swarm
from .messages import Hello, Message, Receipt
from .peer import Handler, Peer
from .reception import Door, Reception
from .steady.link import SteadyLink
from .tasks import Tasks

logger = logging.getLogger(__name__)

PROBE_S = 1.0  # how long an older link has to show that it lives


OnUp = Callable[[Peer], None]
MakeCarrier = Callable[[Hello], Coroutine[Any, Any, tuple[Link, Receipt]]]
OnDown = Callable[[str, TransportError], None]


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
        self._is_allowed = is_allowed
        self._on_up = on_up
        self._on_down = on_down
        self._rules = rules
        self._contacts: dict[str, Contact] = {}
        self._services: dict[type[Message], Handler] = {}
        self._on_path: list[OnUp] = []
        self._on_end: list[OnDown] = []
        self.reception = Reception(
            identity,
            listen,
            self,
            credentials=lambda: self._credentials,
            invites=invites or InviteBook(),
            welcome=welcome,
            is_allowed=is_allowed,
        )
        self._tasks = Tasks()
        self.dialler = Dialler(
            self.peer_id, lambda: self._credentials, self._is_allowed, self._tasks
        )
        self._is_closing = False

    async def __aenter__(self) -> Self:
        """Listen. Raises AddressInUse."""
        self.reception.start()
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
        return self.reception.addresses

    @property
    def bound(self) -> tuple[tuple[str, int], ...]:
        """Host and port of each listening socket; the host may be "0.0.0.0" or "::"."""
        return self.reception.bound

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
        self.reception.doors.append(door)

    def use_relays(self, ways: RelayWays) -> None:
        """How to reach a peer through relays: `ways(peer_id, relays it announces)`."""
        self.dialler.relay_ways = ways

    def on_path(self, callback: OnUp) -> None:
        """Call `callback(peer)` for each link that comes up, and each time one moves elsewhere."""
        self._on_path.append(callback)

    def on_end(self, callback: OnDown) -> None:
        """Call `callback(peer_id, error)` for each link that has ended, also while stopping."""
        self._on_end.append(callback)

    def is_allowed(self, peer_id: str) -> bool:
        """Whether a peer may have links to this node."""
        return self._is_allowed(peer_id)

    def learn(
        self,
        peer_id: str,
        addresses: Iterable[str],
        *,
        mapped: Iterable[str] = (),
        relays: Iterable[str] = (),
    ) -> None:
        """Where a peer can be dialled, in place of what was known.

        Args:
            peer_id: whom.
            addresses: "host:port" each.
            mapped: others, that a router forwards to it.
            relays: peer ids of members that it keeps a link to, to be reached through.
        """
        if peer_id != self.peer_id:
            contact = self.contact(peer_id)
            contact.mapped, contact.relays = tuple(mapped), tuple(relays)
            contact.addresses = tuple(dict.fromkeys((*contact.mapped, *addresses)))
            if contact.relays:
                contact.has_relays.set()
            else:
                contact.has_relays.clear()

    def addresses_of(self, peer_id: str) -> tuple[str, ...]:
        """Where a peer can be dialled, as far as is known."""
        contact = self._contacts.get(peer_id)
        return contact.addresses if contact is not None else ()

    def relays_of(self, peer_id: str) -> tuple[str, ...]:
        """The relays that a peer announces."""
        contact = self._contacts.get(peer_id)
        return contact.relays if contact is not None else ()

    def mapped_of(self, peer_id: str) -> tuple[str, ...]:
        """Those addresses of a peer that a router forwards to it."""
        contact = self._contacts.get(peer_id)
        return contact.mapped if contact is not None else ()

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
        contact = self.contact(peer_id)
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
        await self.reception.aclose()
        closing = [peer.aclose() for peer in self.peers.values()]
        await asyncio.gather(*closing)
        await self._tasks.aclose()

    # --- dialling ----------------------------------------------------------------------------

    async def _dial(self, peer_id: str, contact: Contact) -> None:
        hello = Hello(link=os.urandom(16), is_new=True)
        try:
            carrier, _ = await self.dialler.open(peer_id, contact, hello)
        except LinkClosed as error:
            if contact.peer is None:
                raise PeerUnreachable(peer_id, "it closed the link") from error
        else:
            try:
                await self.replace(contact)
            except asyncio.CancelledError:
                carrier.abort(LinkBroken("the dial was given up"))
                raise
            self.take_up(SteadyLink(carrier, hello.link), contact)
        finally:
            contact.dial = None

    async def move(self, peer: Peer, make: MakeCarrier) -> None:
        """Put the link to a live peer on another carrier: the one that `make(hello)` dials.

        Raises:
            TransportError: `make` did; or the link has ended, or went another way meanwhile.
        """
        contact = self.contact(peer.peer_id)
        link = contact.link
        if contact.peer is not peer or link is None or contact.moving or contact.dial:
            raise LinkBroken("the link has ended, or is on the move already")
        hello = Hello(link=link.id, is_new=False, received=link.receipt)
        contact.moving = making = self._tasks.spawn(make(hello), "move")
        try:
            await asyncio.wait({making})
        except asyncio.CancelledError:
            discard(making)
            raise
        finally:
            contact.moving = None
        if making.cancelled():
            raise LinkBroken("the link went another way meanwhile")
        link.attach(*making.result())

    @property
    def credentials(self) -> Credentials:
        """What opens the doors of this swarm's members now."""
        return self._credentials

    def check_links(self) -> None:
        """The network may have changed: links whose peers do not answer look for another way."""
        for peer in self.peers.values():
            self._tasks.spawn(peer.check(), "check a link")

    async def still_lives(self, contact: Contact) -> bool:
        """Whether the link to a peer, if any, gives a sign of life now."""
        if contact.peer is None:
            return False
        try:
            await contact.peer.ping(timeout_s=PROBE_S)
        except TransportError:
            return False
        return contact.peer is not None

    # --- links that stand ------------------------------------------------------------------------

    async def replace(self, contact: Contact) -> None:
        """Make way for a new link: the old one's end is told before the new one's beginning."""
        while contact.peer is not None and contact.run is not None:
            contact.peer.abort(LinkBroken("a newer link to the peer took its place"))
            await asyncio.wait({contact.run})

    def take_up(self, link: SteadyLink, contact: Contact) -> None:
        """Begin with a new link; there is no other to the peer."""
        if self._is_closing:  # its task would be cancelled before it begins, and nobody end it
            link.abort(LinkClosed(by_peer=False))
            return
        peer = Peer(link, self._dispatch, rules=self._rules)
        contact.peer, contact.link = peer, link
        contact.up.set()
        logger.info("peer up", extra={"peer": link.peer_id[-8:], "kind": link.kind.value})
        link.on_lost = lambda: self._lost(contact, peer, link)
        link.on_moved = lambda: self._moved(peer)
        contact.run = self._tasks.spawn(self._run(peer, contact), "link")

    def _lost(self, contact: Contact, peer: Peer, link: SteadyLink) -> None:
        logger.info("carrier lost", extra={"peer": peer.peer_id[-8:], "kind": link.kind.value})
        if self._is_closing:
            link.abort(LinkClosed(by_peer=False))
        else:
            self._tasks.spawn(self.dialler.mend(contact, peer, link), "mend")

    def _moved(self, peer: Peer) -> None:
        logger.info("link moved", extra={"peer": peer.peer_id[-8:], "kind": peer.kind.value})
        peer.moved()
        self._tell_path(peer)

    def _tell_path(self, peer: Peer) -> None:
        for callback in self._on_path:
            callback(peer)

    async def _run(self, peer: Peer, contact: Contact) -> None:
        error: TransportError = LinkBroken("the link failed here; see the log")
        try:
            self._on_up(peer)
            self._tell_path(peer)
            error = await peer.run()
        finally:
            contact.peer = contact.link = contact.run = None
            contact.up.clear()
            for callback in self._on_end:
                callback(peer.peer_id, error)
            if not self._is_closing:
                logger.info("peer down", extra={"peer": peer.peer_id[-8:], "reason": str(error)})
                self._on_down(peer.peer_id, error)

    def _dispatch(self, peer: Peer, frame: Frame) -> None:
        self._services.get(type(frame.message), self._handler)(peer, frame)

    def contact(self, peer_id: str) -> Contact:
        """What is known of a peer."""
        return self._contacts.setdefault(peer_id, Contact())


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
