"""Who may come in: connections to the listening port, and others that a peer has begun.

A connection whose preamble was good is for a member's link, for an invite, or for one of the
`doors`. A carrier that a member has begun is for a new link, or for one that the two have already;
this file decides between it and what else is under way with the same peer.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from .contact import Contact
from .errors import ErrorCode, LinkBroken
from .frame import Frame
from .handshake import Credentials, accept, hear_hello
from .identity import Identity
from .invite import InviteBook
from .joining import Welcomer, serve_invite
from .link import Link, LinkKind
from .listener import Listener, read_preamble
from .messages import Admitted, Failure, Hello
from .preamble import PreambleGate
from .steady.link import SteadyLink

HOLD_BACK_S = 2.0  # how long another's dial waits for ours to the same peer


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


class Links(Protocol):
    """What a mesh knows of its links, for whoever decides who comes in."""

    def contact(self, peer_id: str) -> Contact:
        """What is known of a peer."""

    async def still_lives(self, contact: Contact) -> bool:
        """Whether the link to a peer, if any, gives a sign of life now."""

    async def replace(self, contact: Contact) -> None:
        """Make way for a new link."""

    def take_up(self, link: SteadyLink, contact: Contact) -> None:
        """Begin with a new link."""


class Reception:
    """The doors of one mesh; raises what `Listener` raises when it starts."""

    def __init__(
        self,
        identity: Identity,
        listen: Sequence[tuple[str, int]],
        links: Links,
        *,
        credentials: Callable[[], Credentials],
        invites: InviteBook,
        welcome: Welcomer | None,
        is_allowed: Callable[[str], bool],
    ) -> None:
        self.doors: list[Door] = []
        self.gate = PreambleGate(identity.peer_id, self._preamble_key, opened_at=time.time())
        self._own = identity.peer_id
        self._identity = identity
        self._links = links
        self._credentials = credentials
        self._invites = invites
        self._welcome = welcome
        self._is_allowed = is_allowed
        self._listener = Listener(listen, self.gate, self._on_connection)

    @property
    def addresses(self) -> tuple[str, ...]:
        """See `Listener.addresses`."""
        return self._listener.addresses

    @property
    def bound(self) -> tuple[tuple[str, int], ...]:
        """See `Listener.bound`."""
        return self._listener.bound

    def start(self) -> None:
        """Listen. Raises AddressInUse and TransportError."""
        self._listener.start()

    async def aclose(self) -> None:
        """Stop listening, and drop whoever has not been let in yet."""
        await self._listener.aclose()

    def _preamble_key(self, key_id: bytes) -> bytes | None:
        if key_id == self._credentials().key_id:
            return self._credentials().preamble_key
        token = self._invites.token(key_id, unix_time=time.time())
        if token is not None and self._welcome is not None:
            return token.preamble_key
        keys = (door.key_of(key_id) for door in self.doors)
        return next((key for key in keys if key is not None), None)

    async def _on_connection(
        self, connection: socket.socket, key_id: bytes, source: tuple[str, int]
    ) -> bool:
        for door in self.doors:
            if door.key_of(key_id) is not None:
                return await door.enter(connection, key_id, source)
        token = self._invites.token(key_id, unix_time=time.time())
        if token is not None and self._welcome is not None:
            credentials = Credentials.of_token(token, self._identity)
            link = await accept(connection, credentials, is_allowed=self._is_allowed)
            return await serve_invite(link, key_id, invites=self._invites, welcome=self._welcome)
        await self.admit_socket(connection, LinkKind.DIRECT)
        return True

    async def admit_relayed(self, connection: socket.socket) -> None:
        """Let somebody in who comes through a relay, as at the listening port; owns the socket.

        Raises:
            TransportError: it is not let in.
        """
        key_id = await read_preamble(connection, self.gate)
        await self.admit_keyed(connection, key_id, LinkKind.RELAYED)

    async def admit_keyed(self, connection: socket.socket, key_id: bytes, kind: LinkKind) -> None:
        """Let a member in whose preamble named `key_id`; owns the socket.

        Raises:
            TransportError: it is not let in.
        """
        if key_id != self._credentials().key_id:
            connection.close()
            raise LinkBroken("the key is not that of members")
        await self.admit_socket(connection, kind)

    async def admit_socket(self, connection: socket.socket, kind: LinkKind) -> None:
        """Let a member in on a connected socket whose preamble was good; owns the socket.

        Raises:
            TransportError: it is not let in.
        """
        carrier = await accept(
            connection, self._credentials(), is_allowed=self._is_allowed, kind=kind
        )
        await self.admit(carrier)

    async def admit(self, carrier: Link) -> None:
        """Take a carrier that the peer has begun, for a new link or for the one it has.

        Raises:
            TransportError: the peer did not say which.
        """
        hello = await hear_hello(carrier)
        contact = self._links.contact(carrier.peer_id)
        is_admitted = False
        try:
            async with contact.arrivals:
                n_moves = contact.link.n_moves if contact.link is not None else 0
                if self._own < carrier.peer_id:
                    await self._hold_back(contact)
                if hello.is_new:
                    is_admitted = await self._admit_new(carrier, hello, contact)
                else:
                    is_admitted = self._admit_again(carrier, hello, contact, n_moves)
                for other in (contact.dial, contact.moving) if is_admitted else ():
                    if other is not None:
                        other.cancel()  # it got nowhere, and would replace this carrier
        finally:
            if not is_admitted:
                await carrier.aclose()

    async def _admit_new(self, carrier: Link, hello: Hello, contact: Contact) -> bool:
        """Decide between a link that came in and one that we have or are about to have."""
        if await self._links.still_lives(contact):
            return False  # the dialler has a live link to us, and finds it when this one closes
        await self._links.replace(contact)
        if carrier.peer_id == self._own or not self._is_allowed(carrier.peer_id):
            carrier.post(Frame(message=Failure(code=ErrorCode.NOT_A_MEMBER)))
            return False
        carrier.post(Frame(message=Admitted()))
        self._links.take_up(SteadyLink(carrier, hello.link), contact)
        return True

    def _admit_again(self, carrier: Link, hello: Hello, contact: Contact, n_moves: int) -> bool:
        """Go on with a link on the carrier that the peer has found for it."""
        link = contact.link
        if link is None or link.id != hello.link or link.error is not None:
            carrier.post(Frame(message=Failure(code=ErrorCode.UNKNOWN_LINK)))
            return False
        if not self._is_allowed(carrier.peer_id):
            carrier.post(Frame(message=Failure(code=ErrorCode.NOT_A_MEMBER)))
            return False
        if link.n_moves != n_moves:
            return False  # our own dial was first
        carrier.post(Frame(message=Admitted(received=link.receipt)))
        link.attach(carrier, hello.received)
        return True

    async def _hold_back(self, contact: Contact) -> None:
        """Our own dial goes first, if it gets anywhere soon."""
        if contact.dial is not None:
            await asyncio.wait({contact.dial}, timeout=HOLD_BACK_S)
