"""Nodes reduced to membership: a mesh, a replica that gossips, and who is in the swarm."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from covey.node.epochs import Epochs
from covey.node.gossip import Gossip
from covey.node.members import Members
from covey.node.switch import Switch
from covey.store.awareness import Awareness
from covey.store.disk import Disk
from covey.store.replica import Replica
from covey.store.schema import MemberCard, Revocation
from covey.store.views import Views
from covey.transport.errors import TransportError
from covey.transport.frame import Frame
from covey.transport.identity import Identity, verify
from covey.transport.membership import Keyring
from covey.transport.mesh import Mesh
from covey.transport.messages import MembershipNotice
from covey.transport.peer import Peer


class MemberNode:
    """One member; `async with running(node)`."""

    def __init__(
        self, identity: Identity, keyring: Keyring, *, name: str, disk: Path | None = None
    ) -> None:
        self.identity = identity
        self.id = identity.peer_id
        self.name = name
        self.saved = keyring  # what would be in its state file
        self.removals: asyncio.Queue[Revocation] = asyncio.Queue()
        self.n_frames = 0  # handed on, by members
        swarm = keyring.current
        clock = asyncio.get_running_loop().time
        self.disk = Disk(disk) if disk is not None else None
        started_ms = int(time.time() * 1000)
        self.replica = Replica(
            self.id,
            swarm=swarm.id,
            sign=identity.sign,
            verify=verify,
            is_member=self._is_allowed,
            disk=self.disk,
            started_ms=started_ms,
        )
        self.views = Views(self.replica)
        self.awareness = Awareness(
            self.id,
            swarm=swarm.id,
            sign=identity.sign,
            verify=verify,
            is_member=self._is_allowed,
            started_ms=started_ms,
        )
        self.switch = Switch(self.id, lambda peer_id: self.mesh.peer(peer_id))
        self.mesh = Mesh(
            identity,
            swarm,
            handler=self._receive,
            is_allowed=self._is_allowed,
            on_up=lambda peer: self.gossip.link_up(peer.peer_id),
            on_down=lambda peer_id, _: self.gossip.link_down(peer_id, is_failure=False),
        )
        self.members = Members(
            identity,
            swarm=swarm.id,
            founder=swarm.founder,
            replica=self.replica,
            views=self.views,
            awareness=self.awareness,
            mesh=self.mesh,
            on_removed=self.removals.put_nowait,
            on_standing=lambda: self.epochs.look(),
        )
        self.epochs = Epochs(
            identity,
            keyring,
            members=self.members,
            mesh=self.mesh,
            switch=self.switch,
            save=lambda ring: setattr(self, "saved", ring),
            on_new_secret=lambda _: None,
            clock=clock,
            rng=random.Random(1),
        )
        self.switch.on_message(
            MembershipNotice, lambda _, notice, __: self.members.take_notice(notice.statements)
        )
        self.gossip = Gossip(
            self.mesh, self.switch, self.replica, self.awareness, clock, random.Random(2)
        )

    @property
    def epoch(self) -> int:
        return self.epochs.swarm.epoch

    async def dial(self, other: MemberNode) -> Peer:
        """A link to another node, as discovery makes it."""
        self.mesh.learn(other.id, other.mesh.addresses)
        try:
            return await self.mesh.peer(other.id)
        except TransportError as error:
            self.epochs.dial_failed(other.id, error)
            raise

    def publish_card(self) -> None:
        card = MemberCard(
            peer_id=self.id,
            name=self.name,
            addresses=self.mesh.addresses,
            control_addresses=(),
            models=(),
            max_blocks=None,
            memory_bytes=None,
            version="0",
            started_at=0.0,
        )
        self.replica.set(card.key, card.to_value())

    def _is_allowed(self, peer_id: str) -> bool:
        return self.members.is_allowed(peer_id)

    def _receive(self, peer: Peer, frame: Frame) -> None:
        if self._is_allowed(peer.peer_id):
            self.n_frames += 1
            self.switch.receive(peer, frame)


@asynccontextmanager
async def running(node: MemberNode) -> AsyncIterator[MemberNode]:
    """The node with its loops, from first to last."""
    async with node.mesh:
        node.publish_card()
        loops = [
            asyncio.create_task(node.gossip.run()),
            asyncio.create_task(node.epochs.run()),
        ]
        try:
            yield node
        finally:
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            await node.epochs.aclose()
            await node.gossip.aclose()
            await node.switch.aclose()
    if node.disk is not None:
        node.disk.close()


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> float:
    """Wait for something that other tasks bring about; the seconds it took."""
    began_at = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  what brings it about has no event
            await asyncio.sleep(0.01)
    return time.monotonic() - began_at
