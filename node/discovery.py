"""Finds the other members and keeps links to enough of them.

Three sources: the DHT (every member's signed, expiring record), the local network (mDNS), and
the member cards in the replica, which outlive a restart. Whatever one yields goes into the
mesh's address book; links are dialled until there are enough neighbours.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from covey.store.views import Views
from covey.transport.control import ControlPlane
from covey.transport.control_records import ControlError, PeerRecord
from covey.transport.errors import TransportError
from covey.transport.mesh import Mesh
from covey.transport.tasks import Tasks

from .gossip import N_NEIGHBOURS

logger = logging.getLogger(__name__)

RECORD_TTL_S = 3600
ANNOUNCE_S = 1200.0  # a third of the record's life
SEARCH_S = (2.0, 4.0, 8.0, 15.0, 30.0, 60.0)  # between searches; starts over after a change
REDIAL_S = 2.0


class Discovery:
    """Announces this node and looks for the others; `run` is its one loop."""

    def __init__(
        self,
        *,
        control: ControlPlane,
        mesh: Mesh,
        views: Views,
        swarm: str,
        own_peer_id: str,
        bootstrap: Iterable[str],
        is_allowed: Callable[[str], bool],
        rng: random.Random,
        on_failed: Callable[[str, TransportError], None],
    ) -> None:
        """`on_failed(peer_id, error)` is called when a member could not be dialled."""
        self._control = control
        self._mesh = mesh
        self._views = views
        self._swarm = swarm
        self._own = own_peer_id
        self._bootstrap = set(bootstrap)
        self._is_allowed = is_allowed
        self._rng = rng
        self._on_failed = on_failed
        self._tasks = Tasks()
        self._known: set[str] = set()
        self._hurry = asyncio.Event()
        self._announce = asyncio.Event()
        self.n_found_by_dht = 0
        control.on_discovered(self._found_on_lan)

    async def run(self) -> None:
        """Announce, search and dial until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._announce_for_ever())
            group.create_task(self._search_for_ever())
            group.create_task(self._dial_for_ever())

    async def aclose(self) -> None:
        """Stop what is under way."""
        await self._tasks.aclose()

    def use_control(self, control: ControlPlane) -> None:
        """Go on with another control plane, which has been started."""
        self._control = control
        control.on_discovered(self._found_on_lan)
        self._announce.set()
        self.hurry()

    def forget(self, peer_id: str) -> None:
        """Do not dial a member that was removed any more."""
        self._known.discard(peer_id)

    def hurry(self) -> None:
        """Search again soon: a member came or went."""
        self._hurry.set()

    async def _announce_for_ever(self) -> None:
        while True:
            try:
                await self._control.bootstrap(self._bootstrap_addresses())
                await self._control.announce(self._own_record())
                delay_s = ANNOUNCE_S
            except ControlError as error:
                logger.warning("not announced in the DHT: %s", error)
                delay_s = 10.0
            with suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._announce.wait()
            self._announce.clear()

    async def _search_for_ever(self) -> None:
        attempt = 0
        while True:
            try:
                for record in await self._control.discover():
                    self._learn(record)
            except ControlError as error:
                logger.warning("the DHT cannot be searched: %s", error)
            delay_s = SEARCH_S[min(attempt, len(SEARCH_S) - 1)]
            attempt += 1
            try:
                async with asyncio.timeout(delay_s):
                    await self._hurry.wait()
            except TimeoutError:
                continue
            self._hurry.clear()
            attempt = 0
            await asyncio.sleep(SEARCH_S[0] / 4)  # however often members come and go

    async def _dial_for_ever(self) -> None:
        while True:
            for peer_id, card in self._views.members().items():
                if peer_id != self._own and self._is_allowed(peer_id):
                    self._mesh.learn(peer_id, card.addresses)
                    self._known.add(peer_id)
            absent = sorted(self._known - self._mesh.peers.keys() - {self._own})
            n_wanted = N_NEIGHBOURS - len(self._mesh.peers)
            for peer_id in self._rng.sample(absent, min(max(n_wanted, 0), len(absent))):
                self._tasks.spawn(self._dial(peer_id), "dial")
            await asyncio.sleep(REDIAL_S * (0.5 + self._rng.random()))

    async def _dial(self, peer_id: str) -> None:
        try:
            await self._mesh.peer(peer_id)
        except TransportError as error:
            logger.debug("not reached: %s", error, extra={"peer": peer_id[-8:]})
            self._on_failed(peer_id, error)

    def _learn(self, record: PeerRecord) -> None:
        if not self._is_allowed(record.peer_id):
            return
        self._mesh.learn(record.peer_id, record.addresses)
        if record.peer_id not in self._known:
            self.n_found_by_dht += 1
            self._known.add(record.peer_id)
            self._tasks.spawn(self._dial(record.peer_id), "dial")

    def _found_on_lan(self, peer_id: str, addresses: tuple[str, ...]) -> None:
        if self._is_allowed(peer_id) and not self._bootstrap.issuperset(addresses):
            self._bootstrap.update(addresses)
            self._tasks.spawn(self._meet(addresses), "meet")

    async def _meet(self, addresses: tuple[str, ...]) -> None:
        try:
            await self._control.bootstrap(addresses)
        except ControlError as error:
            logger.debug("a member on this network was not reached: %s", error)
        self.hurry()

    def _bootstrap_addresses(self) -> list[str]:
        cards = self._views.members()
        seen = {
            a for peer, card in cards.items() if peer != self._own for a in card.control_addresses
        }
        return sorted(self._bootstrap | seen)

    def _own_record(self) -> PeerRecord:
        now = time.time()
        return PeerRecord(
            peer_id=self._own,
            swarm=self._swarm,
            addresses=self._mesh.addresses[:16],
            control_addresses=self._control.addresses[:16],
            sequence=int(now * 1000),
            expires_at=int(now) + RECORD_TTL_S,
        )
