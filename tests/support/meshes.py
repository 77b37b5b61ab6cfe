"""Meshes on loopback for tests, with what came to them on record."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from covey.transport.errors import TransportError
from covey.transport.frame import Frame
from covey.transport.identity import Identity
from covey.transport.invite import InviteBook
from covey.transport.liveness import LivenessRules
from covey.transport.membership import Swarm
from covey.transport.mesh import Mesh
from covey.transport.messages import Beat, JoinRequest, OpenSession, SessionOpened, Welcome
from covey.transport.peer import Peer


@dataclass
class Node:
    """A mesh and its callbacks' record."""

    identity: Identity = field(default_factory=Identity.generate)
    swarm: Swarm | None = None
    revoked: set[str] = field(default_factory=set)
    frames: asyncio.Queue[tuple[str, Frame]] = field(default_factory=asyncio.Queue)
    ups: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    downs: asyncio.Queue[tuple[str, TransportError]] = field(default_factory=asyncio.Queue)
    invites: InviteBook = field(default_factory=InviteBook)

    @property
    def id(self) -> str:
        return self.identity.peer_id

    def make(
        self,
        swarm: Swarm,
        *,
        listen: tuple[tuple[str, int], ...] = (("127.0.0.1", 0),),
        rules: LivenessRules | None = None,
        welcome: Callable[[str, JoinRequest], Welcome] | None = None,
    ) -> Mesh:
        self.swarm = swarm
        self.mesh = Mesh(
            self.identity,
            swarm,
            handler=self._handle,
            listen=listen,
            invites=self.invites,
            welcome=welcome or self._welcome,
            is_allowed=lambda peer_id: peer_id not in self.revoked,
            on_up=lambda peer: self.ups.put_nowait(peer.peer_id),
            on_down=lambda peer_id, error: self.downs.put_nowait((peer_id, error)),
            rules=rules,
        )
        return self.mesh

    def _handle(self, peer: Peer, frame: Frame) -> None:
        self.frames.put_nowait((peer.peer_id, frame))
        if isinstance(frame.message, OpenSession):
            peer.reply(frame, SessionOpened(session=frame.message.session))

    def _welcome(self, peer_id: str, request: JoinRequest) -> Welcome:
        swarm = self.swarm
        if swarm is None:
            raise ValueError("no swarm yet")
        return Welcome(
            swarm=swarm.id,
            epoch=swarm.epoch,
            secret=swarm.secret,
            founder=swarm.founder,
            members=[],
        )


async def swarm_of(
    stack: AsyncExitStack, n: int, *, rules: LivenessRules | None = None
) -> list[Node]:
    """Nodes of one swarm that know each other's addresses, lowest peer id first."""
    nodes = sorted((Node() for _ in range(n)), key=lambda node: node.id)
    swarm = Swarm.create(nodes[0].id)
    for node in nodes:
        await stack.enter_async_context(node.make(swarm, rules=rules))
    for node in nodes:
        for other in nodes:
            node.mesh.learn(other.id, other.mesh.addresses)
    return nodes


def beat(text: str) -> Beat:
    """A message that says something."""
    return Beat(body=text.encode())


def open_session(peer_id: str) -> OpenSession:
    """A request."""
    return OpenSession(
        session="s",
        plan="0" * 64,
        epoch=0,
        stage_idx=0,
        n_tokens=1,
        previous=peer_id,
        next=peer_id,
    )
