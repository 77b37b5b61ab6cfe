"""Finds the other members and keeps links to enough of them.

Four sources: the DHT (every member's signed, expiring record), the local network (mDNS), the
member cards in the replica, and where members were last seen alive; the last two outlive a
restart. Whatever one yields goes into the mesh's address book; links are dialled until there are
enough neighbours.

The DHT is for who knows nobody: with neighbours, cards tell everything sooner. So it is searched
often only while there are too few links, and then for members that are not known yet.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence

from covey.store.views import Views
from covey.transport.control import ControlPlane
from covey.transport.control_records import (
    MAX_MAPPED,
    MAX_RELAYS,
    ControlError,
    PeerRecord,
    RecordOutdated,
)
from covey.transport.errors import TransportError
from covey.transport.mesh import Mesh
from covey.transport.messages import MemberEntry
from covey.transport.tasks import Tasks

from .errors import ConfigError
from .gossip import N_NEIGHBOURS
from .home import Home
from .seen import Seen

logger = logging.getLogger(__name__)

SEEN_FILE = "seen.json"
RECORD_TTL_S = 3600
ANNOUNCE_S = 1500.0  # two more tries before the record expires
RETRY_ANNOUNCE_S = 10.0
GROWTH = 2.0  # of the swarm, after which we announce anew
SEARCH_S = (2.0, 4.0, 8.0, 15.0, 30.0, 60.0)  # between searches of a node with too few links
FIRST_SEARCH_S = 5.0  # by then at the latest
CALM_SEARCH_S = 3600.0  # with enough of them
LOOK_S = 2.0  # whether there are still enough
N_ENOUGH = 2
REDIAL_S = 2.0
N_AT_ONCE = 4  # members whose control planes are dialled together
MAX_FOUND_WAYS = 32
N_CONTACTS = 3  # members whose control planes answer: enough to begin with
SAVE_S = 300.0


class Discovery:
    """Announces this node and looks for the others; `run` is its one loop."""

    def __init__(
        self,
        *,
        control: ControlPlane,
        mesh: Mesh,
        views: Views,
        home: Home,
        swarm: str,
        own_peer_id: str,
        known: Iterable[MemberEntry],
        is_allowed: Callable[[str], bool],
        live: Callable[[], frozenset[str]],
        rng: random.Random,
        on_failed: Callable[[str, TransportError], None],
    ) -> None:
        """`on_failed(peer_id, error)` is called when a member could not be dialled."""
        self._control = control
        self._mesh = mesh
        self._views = views
        self._home = home
        self._swarm = swarm
        self._own = own_peer_id
        self._given = list(known)  # by whoever let us in
        self._found_ways: list[tuple[str, ...]] = []  # by mDNS
        self._is_allowed = is_allowed
        self._live = live
        self._rng = rng
        self._seen = _load(home)
        self._relays: tuple[str, ...] = ()
        self._mapped: tuple[str, ...] = ()
        self._is_reachable: bool | None = None
        self._on_failed = on_failed
        self._tasks = Tasks()
        self._known = {member.peer_id for member in self._given if is_allowed(member.peer_id)}
        self._hurry = asyncio.Event()
        self._announce_now = asyncio.Event()
        self._has_tried = asyncio.Event()  # to announce, so that the DHT is entered if it can be
        self.announced = asyncio.Event()
        """Set once this node's record stands in the DHT."""
        self._n_announced_to = 0
        self._sequence = 0  # of our last record
        self.n_found_by_dht = 0
        control.on_discovered(self._found_on_lan)

    async def run(self) -> None:
        """Announce, search and dial until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._announce_for_ever())
            group.create_task(self._search_for_ever())
            group.create_task(self._dial_for_ever())
            group.create_task(self._remember_for_ever())

    async def aclose(self) -> None:
        """Stop what is under way."""
        await self._tasks.aclose()

    def use_control(self, control: ControlPlane) -> None:
        """Go on with another control plane, which has been started."""
        self._control = control
        control.on_discovered(self._found_on_lan)
        self.announced.clear()
        self._announce_now.set()
        self.hurry()

    def forget(self, peer_id: str) -> None:
        """Do not dial a member that was removed any more."""
        self._known.discard(peer_id)
        self._seen.forget(peer_id)

    def hurry(self) -> None:
        """Search again soon: a member came or went."""
        self._hurry.set()

    def update_reach(
        self,
        *,
        is_reachable: bool | None,
        relays: Sequence[str] = (),
        mapped: Sequence[str] = (),
    ) -> None:
        """Announce how we can be reached, when that has changed.

        Args:
            is_reachable: whether others can dial our addresses; None if nobody knows.
            relays: members that pass links on to us, best first; four are announced.
            mapped: where a router forwards to us.
        """
        reach = (is_reachable, tuple(relays[:MAX_RELAYS]), tuple(mapped[:MAX_MAPPED]))
        if reach != (self._is_reachable, self._relays, self._mapped):
            self._is_reachable, self._relays, self._mapped = reach
            self._announce_now.set()

    # --- announcing --------------------------------------------------------------------------

    async def announce(self) -> None:
        """Publish our record in the DHT, which we enter first if need be.

        Raises:
            ControlError: it does not stand there.
        """
        await self._control.set_reachable(is_reachable=self._is_reachable is not False)
        if not self.announced.is_set():
            await self._enter_dht()
        try:
            await self._control.announce(self._own_record())
        except RecordOutdated as error:  # of an earlier life, whose clock was ahead
            self._sequence = error.sequence
            await self._control.announce(self._own_record())
        self._n_announced_to = len(self._known)
        self.announced.set()

    async def _announce_for_ever(self) -> None:
        while True:
            self._announce_now.clear()
            try:
                await self.announce()
                delay_s = ANNOUNCE_S * (0.8 + 0.4 * self._rng.random())  # not all at one moment
            except ControlError as error:
                logger.warning("not announced in the DHT: %s", error)
                delay_s = RETRY_ANNOUNCE_S
            self._has_tried.set()
            await _at_most(self._announce_now, delay_s)

    async def _enter_dht(self) -> int:
        """Dial control planes until a few answer; how many do."""
        n_connected = 0
        ways = self._ways_in()
        for start in range(0, len(ways), N_AT_ONCE):
            batch = [a for addresses in ways[start : start + N_AT_ONCE] for a in addresses]
            n_connected += await self._control.bootstrap(batch)
            if n_connected >= N_CONTACTS:
                break
        return n_connected

    def _ways_in(self) -> list[tuple[str, ...]]:
        """Control addresses by member, the likeliest to answer first."""
        cards = self._views.members()
        live = self._live()
        by_card = {peer: card.control_addresses for peer, card in cards.items()}
        living = [
            by_card[peer]
            for peer in self._rng.sample(sorted(live), len(live))
            if peer in by_card and peer != self._own
        ]
        others = [by_card[peer] for peer in sorted(by_card.keys() - live - {self._own})]
        given = [tuple(member.control_addresses) for member in self._given]
        ways = [*self._found_ways, *given[:1], *living, *given, *self._seen.addresses(), *others]
        return [way for way in dict.fromkeys(ways) if way]

    def _own_record(self) -> PeerRecord:
        now = time.time()
        self._sequence = max(self._sequence + 1, int(now * 1000))
        return PeerRecord(
            peer_id=self._own,
            swarm=self._swarm,
            addresses=self._mesh.addresses[:16],
            control_addresses=self._control.addresses[:16],
            sequence=self._sequence,
            expires_at=int(now) + RECORD_TTL_S,
            relays=self._relays,
            mapped=self._mapped,
            is_reachable=self._is_reachable,
        )

    # --- searching ---------------------------------------------------------------------------

    async def _search_for_ever(self) -> None:
        await _at_most(self._has_tried, FIRST_SEARCH_S)
        searched_at = asyncio.get_running_loop().time()
        attempt = 0
        while True:
            if await _at_most(self._hurry, LOOK_S):
                self._hurry.clear()
                attempt = 0
                await asyncio.sleep(SEARCH_S[0] / 4)  # however often members come and go
            if self._is_time_to_search(attempt, searched_at):
                await self.search()
                searched_at = asyncio.get_running_loop().time()
                attempt += 1

    async def search(self) -> None:
        """Look in the DHT for members that we do not know."""
        try:
            known = self._known & self._views.members().keys()
            for record in await self._control.discover(known):
                self._learn(record)
        except ControlError as error:
            logger.warning("the DHT cannot be searched: %s", error)

    def _is_time_to_search(self, attempt: int, searched_at: float) -> bool:
        waited_s = asyncio.get_running_loop().time() - searched_at
        if self._has_enough_links():
            return waited_s >= CALM_SEARCH_S
        return waited_s >= SEARCH_S[min(attempt, len(SEARCH_S) - 1)]

    def _has_enough_links(self) -> bool:
        """Whether gossip keeps us informed, or we have a link to everybody we know of."""
        n_others = len(self._live() - {self._own})
        return 0 < min(N_ENOUGH, n_others) <= len(self._mesh.peers)

    def _learn(self, record: PeerRecord) -> None:
        if not self._is_allowed(record.peer_id):
            return
        self._mesh.learn(
            record.peer_id, record.addresses, mapped=record.mapped, relays=record.relays
        )
        if record.peer_id not in self._known:
            self.n_found_by_dht += 1
            self._known.add(record.peer_id)
            if not self._has_enough_links():
                self._tasks.spawn(self._dial(record.peer_id), "dial")

    def _found_on_lan(self, peer_id: str, addresses: tuple[str, ...]) -> None:
        if self._is_allowed(peer_id) and addresses not in self._found_ways:
            self._found_ways = [addresses, *self._found_ways[: MAX_FOUND_WAYS - 1]]
            self._tasks.spawn(self._meet(addresses), "meet")

    async def _meet(self, addresses: tuple[str, ...]) -> None:
        try:
            await self._control.bootstrap(addresses)
        except ControlError as error:
            logger.debug("a member on this network was not reached: %s", error)
        self.hurry()

    # --- links -------------------------------------------------------------------------------

    async def _dial_for_ever(self) -> None:
        while True:
            for peer_id, card in self._views.members().items():
                if peer_id != self._own and self._is_allowed(peer_id):
                    self._mesh.learn(
                        peer_id, card.addresses, mapped=card.mapped, relays=card.relays
                    )
                    self._known.add(peer_id)
            if self.announced.is_set() and len(self._known) > GROWTH * self._n_announced_to:
                self._announce_now.set()  # those closest to our key are others by now
            n_wanted = N_NEIGHBOURS - len(self._mesh.peers)
            for peer_id in self._absent()[: max(n_wanted, 0)]:
                self._tasks.spawn(self._dial(peer_id), "dial")
            await asyncio.sleep(REDIAL_S * (0.5 + self._rng.random()))

    def _absent(self) -> list[str]:
        """The members without a link, in random order: first those that are said to be alive."""
        absent = sorted(self._known - self._mesh.peers.keys() - {self._own})
        live = self._live()
        return sorted(self._rng.sample(absent, len(absent)), key=lambda peer: peer not in live)

    async def _dial(self, peer_id: str) -> None:
        try:
            await self._mesh.peer(peer_id)
        except TransportError as error:
            logger.debug("not reached: %s", error, extra={"peer": peer_id[-8:]})
            self._on_failed(peer_id, error)

    async def _remember_for_ever(self) -> None:
        while True:
            await asyncio.sleep(SAVE_S * (0.05 if not self._seen.addresses() else 1.0))
            now, cards = time.time(), self._views.members()
            for peer_id in self._mesh.peers.keys() & cards.keys():
                self._seen.note(peer_id, cards[peer_id].control_addresses, at=now)
            try:
                self._home.save(SEEN_FILE, self._seen.to_dict())
            except ConfigError as error:
                logger.warning("where members were seen is not remembered: %s", error)


def _load(home: Home) -> Seen:
    try:
        return Seen.from_dict(home.load(SEEN_FILE) or {})
    except ConfigError as error:
        logger.warning("where members were seen is forgotten: %s", error)
        return Seen()


async def _at_most(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event; whether it came in time."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
