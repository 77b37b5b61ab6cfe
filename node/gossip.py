"""Keeps this node's replica and its picture of who is alive in step with its neighbours.

Neighbours are a few live links, chosen at random among the members and held open; what one hears
reaches all in a few hops. Store messages say what a replica holds rather than what changed, so
whatever a link loses, the next hello repairs.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping

from covey.store.awareness import Awareness
from covey.store.errors import UpdateRejected
from covey.store.replica import Replica
from covey.store.sync import SyncSession
from covey.transport.errors import MalformedFrame, TransportError
from covey.transport.frame import Tensor
from covey.transport.mesh import Mesh
from covey.transport.messages import Beat, StoreSync
from covey.transport.tasks import Tasks

from .switch import Switch

logger = logging.getLogger(__name__)

N_NEIGHBOURS = 4
BEAT_S = 1.0
AWARENESS_TTL_S = 5.0  # five beats: one lost or late beat is not a death
HELLO_S = 10.0  # to one neighbour, in case a hello was lost
QUIET_S = 0.02  # changes within this time are announced together
MAX_SYNC_PER_S = 100  # messages taken from one peer; what is dropped, the next hello repairs


class Allowance:
    """A token bucket: so many a second on average, and as many at once after a quiet second."""

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._left = per_s
        self._at: float | None = None

    def take(self, now: float) -> bool:
        """Whether one more is within the allowance."""
        if self._at is not None:
            self._left = min(self._per_s, self._left + (now - self._at) * self._per_s)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class Gossip:
    """Sends and takes hellos and beats; `run` is its one loop."""

    def __init__(
        self,
        mesh: Mesh,
        switch: Switch,
        replica: Replica,
        awareness: Awareness,
        clock: Callable[[], float],
        rng: random.Random,
        *,
        state: Callable[[], Mapping[str, object]] = dict,
    ) -> None:
        """`state()` is what our beats say of us, up to 1 KiB of JSON."""
        self._mesh = mesh
        self._state = state
        self._switch = switch
        self._replica = replica
        self._awareness = awareness
        self._clock = clock
        self._rng = rng
        self._sessions: dict[str, SyncSession] = {}
        self._allowances: dict[str, Allowance] = {}
        self._neighbours: set[str] = set()
        self._tasks = Tasks()
        self._changed = asyncio.Event()
        switch.on_message(StoreSync, self._take_sync)
        switch.on_message(Beat, self._take_beat)
        replica.subscribe(lambda _author, _keys: self._changed.set())

    @property
    def neighbours(self) -> frozenset[str]:
        """The peers that hear of our changes at once."""
        return frozenset(self._neighbours)

    def link_up(self, peer_id: str) -> None:
        """Begin the exchange with a peer whose link came up."""
        self._sessions[peer_id] = SyncSession(self._replica)
        self._choose_neighbours()
        self._say_hello(peer_id)

    def link_down(self, peer_id: str) -> None:
        """Forget a peer whose link ended."""
        self._sessions.pop(peer_id, None)
        self._allowances.pop(peer_id, None)
        self._neighbours.discard(peer_id)
        self._choose_neighbours()

    async def run(self) -> None:
        """Beat, and announce changes, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._beat_for_ever())
            group.create_task(self._announce_for_ever())

    async def aclose(self) -> None:
        """Stop what is being sent."""
        await self._tasks.aclose()

    async def _beat_for_ever(self) -> None:
        next_hello_at = self._clock() + HELLO_S
        while True:
            now = self._clock()
            self._awareness.expire(now)
            self._spread(Beat(body=self._awareness.beat(now, self._state())), skip=None)
            if now >= next_hello_at and self._neighbours:
                self._say_hello(self._rng.choice(sorted(self._neighbours)))
                next_hello_at = now + HELLO_S
            await asyncio.sleep(BEAT_S)

    async def _announce_for_ever(self) -> None:
        while True:
            await self._changed.wait()
            await asyncio.sleep(QUIET_S)
            self._changed.clear()
            for peer_id in self._neighbours:
                self._say_hello(peer_id)

    def _choose_neighbours(self) -> None:
        candidates = sorted(self._sessions.keys() - self._neighbours)
        n_wanted = N_NEIGHBOURS - len(self._neighbours)
        for peer_id in self._rng.sample(candidates, min(max(n_wanted, 0), len(candidates))):
            self._neighbours.add(peer_id)

    def _say_hello(self, peer_id: str) -> None:
        session = self._sessions.get(peer_id)
        if session is not None:
            self._tasks.spawn(self._send(peer_id, StoreSync(body=session.hello())), "hello")

    def _spread(self, beat: Beat, *, skip: str | None) -> None:
        for peer_id in self._neighbours - {skip}:
            self._tasks.spawn(self._send(peer_id, beat), "beat")

    async def _send(self, peer_id: str, *messages: StoreSync | Beat) -> None:
        peer = self._mesh.peers.get(peer_id)
        if peer is None:
            return
        try:
            for message in messages:
                await peer.send(message)
        except TransportError:
            logger.debug("link ended while gossiping", extra={"peer": peer_id[-8:]})

    def _take_sync(self, sender: str, message: StoreSync, _: Mapping[str, Tensor]) -> None:
        allowance = self._allowances.setdefault(sender, Allowance(MAX_SYNC_PER_S))
        if not allowance.take(self._clock()):
            logger.debug("too many store messages at once", extra={"peer": sender[-8:]})
            return
        session = self._sessions.setdefault(sender, SyncSession(self._replica))
        try:
            answers = session.receive(message.body)
        except UpdateRejected as error:
            raise MalformedFrame(str(error)) from error
        if answers:
            replies = [StoreSync(body=answer) for answer in answers]
            self._tasks.spawn(self._send(sender, *replies), "store answer")

    def _take_beat(self, sender: str, message: Beat, _: Mapping[str, Tensor]) -> None:
        try:
            is_new = self._awareness.receive(message.body, self._clock())
        except UpdateRejected as error:
            # Refused and counted; the sender may only have passed it on.
            logger.debug("beat refused: %s", error, extra={"peer": sender[-8:]})
            return
        if is_new:
            self._spread(message, skip=sender)
