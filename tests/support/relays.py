"""Meshes wired for relaying, and links through one of them."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from covey.transport.frame import Frame
from covey.transport.handshake import Credentials, accept, dial
from covey.transport.link import LinkKind
from covey.transport.messages import Admitted, RelayDeclined, RelayOffer, RelayOpen
from covey.transport.preamble import PREAMBLE_BYTES
from covey.transport.relay.circuits import RelayLimits
from covey.transport.relay.client import RelayClient
from covey.transport.relay.server import RelayServer
from covey.transport.stream_link import StreamLink

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
    arrivals: asyncio.Queue[tuple[socket.socket, str]] = field(default_factory=asyncio.Queue)
    let_go: asyncio.Event = field(default_factory=asyncio.Event)  # until then it is screening

    async def start(self, stack: AsyncExitStack) -> None:
        self.client = RelayClient(addresses_of=self._addresses_of, on_connection=self._arrived)
        self.node.mesh.serve(RelayOffer, self.client.on_offer)
        stack.push_async_callback(self.client.aclose)
        self.let_go.set()

    def _addresses_of(self, peer_id: str) -> tuple[str, ...]:
        return self.node.mesh._contact(peer_id).addresses

    async def _arrived(self, connection: socket.socket, origin: str) -> None:
        self.arrivals.put_nowait((connection, origin))
        await self.let_go.wait()

    @property
    def credentials(self) -> Credentials:
        """Of the swarm."""
        if self.node.swarm is None:
            raise ValueError("no swarm yet")
        return Credentials.of_swarm(self.node.swarm, self.node.identity)


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
        return await asyncio.gather(self._dial(at_a), self._accept(at_b))

    async def _dial(self, connection: socket.socket) -> StreamLink:
        return await dial(
            connection,
            self.a.credentials,
            peer_id=self.b.node.id,
            is_allowed=lambda _: True,
            kind=LinkKind.RELAYED,
        )

    async def _accept(self, connection: socket.socket) -> StreamLink:
        loop = asyncio.get_running_loop()
        await loop.sock_recv(connection, PREAMBLE_BYTES)  # the mesh's gate judges it
        link = await accept(
            connection, self.b.credentials, is_allowed=lambda _: True, kind=LinkKind.RELAYED
        )
        link.post(Frame(message=Admitted()))
        return link


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
