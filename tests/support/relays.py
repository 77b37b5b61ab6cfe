"""Meshes wired for relaying, and links through one of them."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from covey.transport.identity import Identity
from covey.transport.link import LinkKind
from covey.transport.messages import RelayDeclined, RelayOffer, RelayOpen
from covey.transport.relay.circuits import RelayLimits
from covey.transport.relay.client import RelayClient
from covey.transport.relay.server import RelayServer
from covey.transport.stream_link import StreamLink, open_stream_link
from covey.transport.tls import authenticate, build_contexts

from .meshes import Node, swarm_of


def serve_relay(
    node: Node, stack: AsyncExitStack, *, limits: RelayLimits | None = None
) -> RelayServer:
    """Make a node relay for others."""
    server = RelayServer(node.id, lambda: node.mesh.peers, limits=limits)
    node.mesh.serve(RelayOpen, server.on_open)
    node.mesh.serve(RelayDeclined, server.on_declined)
    node.mesh.add_door(server)
    stack.callback(server.close)
    return server


@dataclass
class End:
    """A node that reaches others, and is reached, by way of a relay."""

    node: Node
    addresses: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of relays
    arrivals: asyncio.Queue[tuple[socket.socket, str]] = field(default_factory=asyncio.Queue)
    let_go: asyncio.Event = field(default_factory=asyncio.Event)  # until then it is screening

    async def start(self, stack: AsyncExitStack) -> None:
        self.client = RelayClient(
            addresses_of=lambda peer_id: self.addresses.get(peer_id, ()),
            on_connection=self._arrived,
        )
        self.node.mesh.serve(RelayOffer, self.client.on_offer)
        stack.push_async_callback(self.client.aclose)
        self.let_go.set()

    async def _arrived(self, connection: socket.socket, origin: str) -> None:
        self.arrivals.put_nowait((connection, origin))
        await self.let_go.wait()


@dataclass
class Trio:
    """Two ends, a relay between them, and the links that both hold to it."""

    a: End
    b: End
    relay: Node
    server: RelayServer

    async def socket_pair(self) -> tuple[socket.socket, socket.socket]:
        """A circuit from a to b: the two sockets."""
        at_a = await self.open()
        at_b, origin = await self.b.arrivals.get()
        if origin != self.a.node.id:
            raise ValueError("somebody else came")
        return at_a, at_b

    async def open(self) -> socket.socket:
        """The half of a circuit that a makes."""
        relay = await self.a.node.mesh.peer(self.relay.id)
        return await self.a.client.open(self.b.node.id, relay, deadline_s=5.0)

    async def link_pair(self) -> tuple[StreamLink, StreamLink]:
        """A link from a to b."""
        at_a, at_b = await self.socket_pair()
        return await asyncio.gather(
            secured(at_a, self.a.node.identity, is_dialer=True),
            secured(at_b, self.b.node.identity, is_dialer=False),
        )


async def secured(connection: socket.socket, identity: Identity, *, is_dialer: bool) -> StreamLink:
    """One end of a link on a connected socket."""
    contexts = build_contexts(bytes(32), identity)
    return await open_stream_link(
        connection,
        context=contexts.client if is_dialer else contexts.server,
        is_dialer=is_dialer,
        authenticate=lambda tls: authenticate(tls, expected=None, is_allowed=lambda _: True),
        kind=LinkKind.RELAYED,
        handshake_s=5.0,
    )


async def trio_of(stack: AsyncExitStack, *, limits: RelayLimits | None = None) -> Trio:
    """Three nodes; the two ends have dialled the relay."""
    relay, *nodes = await swarm_of(stack, 3)
    server = serve_relay(relay, stack, limits=limits)
    a, b = (End(node) for node in nodes)
    for end in (a, b):
        await end.start(stack)
        await end.node.mesh.peer(relay.id)
        await relay.ups.get()
    return Trio(a, b, relay, server)
