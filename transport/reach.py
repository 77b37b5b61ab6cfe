"""Makes one mesh reach, and be reached by, members behind any router.

Composes what the packages beside it do: what NAT is in the way (`nat/`), relays to be reached
through and relaying for others (`relay/`), and better ways for links that go through one
(`upgrade/`). Who the members are, and what they announce, the node tells it (`see`).
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from .errors import PeerUnreachable
from .frame import Frame
from .link import LinkKind
from .membership import Swarm
from .mesh import Mesh
from .messages import (
    HostAnswer,
    HostRequest,
    RelayDeclined,
    RelayOffer,
    RelayOpen,
)
from .nat.facts import NatFacts, is_public
from .nat.service import NatService
from .paths import Way
from .peer import Peer
from .relay.choose import order_for_dial
from .relay.client import RelayClient
from .relay.keeper import RelayHolder
from .relay.server import RelayServer
from .tasks import Tasks
from .upgrade.upgrader import Upgrader

logger = logging.getLogger(__name__)

RELAY_S = 5.0  # for a relay to answer and take our half of a circuit


def _ignore() -> None:
    """Nobody wants to know."""


class Reach:
    """All of it for one mesh; `async with` runs it, inside the mesh's own.

    `on_change` is called when what this node should announce has changed: `relays`,
    `is_reachable`, `mapped_addresses`. It must not block.
    """

    def __init__(
        self,
        mesh: Mesh,
        swarm: Swarm,
        *,
        on_change: Callable[[], None] = _ignore,
        relays_for_others: bool = True,
        maps_ports: bool = True,
        is_outside: Callable[[str], bool] = is_public,
    ) -> None:
        """`is_outside` says of a member's address whether it can judge our NAT."""
        self._mesh = mesh
        self._on_change = on_change
        self._told: tuple[object, ...] = ()
        self.nat = NatService(
            mesh,
            swarm,
            on_change=self._facts_changed,
            on_address_change=mesh.check_links,
            maps_ports=maps_ports,
            is_outside=is_outside,
        )
        self.server = RelayServer(mesh.peer_id, lambda: mesh.peers, is_willing=relays_for_others)
        self.client = RelayClient(
            addresses_of=mesh.addresses_of, on_connection=self._came_through_relay
        )
        self.holder = RelayHolder(mesh.peer_id, mesh.peer)
        self.upgrader = Upgrader(mesh, self.nat)
        self._tasks = Tasks()
        mesh.serve(RelayOpen, self.server.on_open)
        mesh.serve(RelayDeclined, self.server.on_declined)
        mesh.serve(RelayOffer, self.client.on_offer)
        mesh.serve(HostRequest, self._answer_host)
        mesh.add_door(self.server)
        mesh.use_relays(self._ways)
        mesh.on_path(self._path_changed)

    async def __aenter__(self) -> Self:
        """Begin. The mesh listens already."""
        await self.nat.start()
        self._tasks.spawn(self.holder.run(), "hold relays")
        self._tasks.spawn(self._watch_relays(), "watch relays")
        return self

    async def __aexit__(self, *_: object) -> None:
        """End all of it; links that stand go on, as long as their relay does."""
        await self._tasks.aclose()
        await self.upgrader.aclose()
        await self.client.aclose()
        self.server.close()
        await self.nat.aclose()

    # --- what to announce --------------------------------------------------------------------

    @property
    def peer_id(self) -> str:
        """Whose reach it is."""
        return self._mesh.peer_id

    @property
    def facts(self) -> NatFacts:
        """What is known of the NAT in the way."""
        return self.nat.facts

    @property
    def is_reachable(self) -> bool | None:
        """Whether members anywhere can dial this node, so that it can relay; None: unknown."""
        if not self.facts.n_observers:
            return None
        return self.facts.is_reachable or bool(self.facts.mapped_addresses)

    @property
    def mapped_addresses(self) -> tuple[str, ...]:
        """Where the router forwards to this node, and it was tried."""
        return self.facts.mapped_addresses

    @property
    def relays(self) -> tuple[str, ...]:
        """Peer ids of the relays through which this node can be reached, the nearest first."""
        held = self.holder.relays
        return tuple(sorted(held, key=lambda peer_id: held[peer_id]))

    # --- what the node tells -----------------------------------------------------------------

    def see(self, relays: Mapping[str, str | None]) -> None:
        """All members that relay for others and can be dialled, with their host if known."""
        self.holder.see(relays)

    def link_down(self, peer_id: str) -> None:
        """The link to a peer has ended."""
        self.holder.lost(peer_id)
        self.upgrader.forget(peer_id)

    def drop(self, peer_id: str) -> None:
        """A peer is no member any more."""
        self.server.drop(peer_id)

    def use_swarm(self, swarm: Swarm) -> None:
        """From now on probe and answer with another epoch's keys."""
        self.nat.use_swarm(swarm)

    # --- inside ------------------------------------------------------------------------------

    def _facts_changed(self, facts: NatFacts) -> None:
        self.holder.need(is_needed=self.is_reachable is False)
        self.upgrader.facts_changed()
        self._tell()

    def _path_changed(self, peer: Peer) -> None:
        self.nat.poke()

    async def _watch_relays(self) -> None:
        while True:
            await self.holder.changed()
            self._tell()

    def _tell(self) -> None:
        """Call `on_change` if there is something new to announce."""
        news = (self.relays, self.is_reachable, self.mapped_addresses)
        if news != self._told:
            self._told = news
            self._on_change()

    def _ways(self, peer_id: str, relays: Sequence[str]) -> list[Way]:
        live = self._mesh.peers
        rtts = {relay: live[relay].rtt_s for relay in relays if relay in live}
        known = {relay: rtt_s for relay, rtt_s in rtts.items() if rtt_s is not None}
        others = [relay for relay in relays if relay not in (peer_id, self._mesh.peer_id)]
        return [
            Way(
                f"relay {relay[-8:]}",
                LinkKind.RELAYED,
                lambda relay=relay: self._through(relay, peer_id),  # type: ignore[misc]
            )
            for relay in order_for_dial(dict.fromkeys(others), known)
        ]

    async def _through(self, relay_id: str, peer_id: str) -> socket.socket:
        relay = await self._mesh.peer(relay_id)
        if relay.kind is LinkKind.RELAYED:
            raise PeerUnreachable(relay_id, "it is behind a relay itself")
        return await self.client.open(peer_id, relay, deadline_s=RELAY_S)

    async def _came_through_relay(self, connection: socket.socket, origin: str) -> None:
        await self._mesh.reception.admit_relayed(connection)

    def _answer_host(self, peer: Peer, frame: Frame) -> None:
        if not isinstance(frame.message, HostRequest) or frame.request is None:
            return
        asked = self._mesh.peers.get(frame.message.peer)
        peer.reply(frame, HostAnswer(host=None if asked is None else asked.remote_host))
