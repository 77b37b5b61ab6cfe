"""Keeps this node's replica and its picture of who is alive in step with its neighbours.

Neighbours are a few live links, chosen at random by either end and held open; what one hears
reaches all in a few hops. Store messages say what a replica holds rather than what changed, so
whatever a link loses, the next summary repairs.

Lives are told in three ways, so that what an idle node says does not grow with the swarm. A beat
floods the swarm the more seldom the more members there are. In turn, each node asks one of those
it has a link with for a sign of life, and all that it watches. Whoever does not answer, or whose
link breaks, is suspected aloud, and gone unless it beats again within moments.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from covey.store.awareness import Awareness, News, Suspicion, Told
from covey.store.errors import UpdateRejected
from covey.store.replica import Replica
from covey.store.sync import SyncSession
from covey.transport.errors import LinkTimeout, MalformedFrame, TransportError
from covey.transport.frame import Tensor
from covey.transport.mesh import Mesh
from covey.transport.messages import Beat, StoreSync
from covey.transport.tasks import Tasks

from .switch import Switch

logger = logging.getLogger(__name__)

N_NEIGHBOURS = 4  # links that a node wants
N_CHOSEN = 3  # of them, it gossips with these, and with those who chose it
STEP_S = 0.5
SHORTEST_TTL_S = 5  # five beats: one lost or late beat is not a death
MAX_BEAT_PERIOD_S = 1200.0
PROBE_S = (1.0, 2.0)  # between two probes of links, in a swarm of a few and of many
A_FEW = 8
ANSWER_S = 1.5  # to a probe, and
PATIENCE = 4.0  # times what the link takes and what this machine, being busy, is late itself:
LAG_DECAY = 0.9  # a swarm on busy machines would else talk of nothing but suspicions
LAG_S = 0.25  # answered later than that after its deadline, it was we who stood still
DENIAL_S = 2.5  # how long a suspected member has for its next beat to get here
MIN_BEAT_PERIOD_S = 1.0  # whatever for: a beat costs all members something
RETURN_S = 0.2  # a link that broke because a newer one took its place is back within this
SUMMARY_S = 10.0  # to one chosen neighbour in turn, in case something was lost
CHOICE_S = 60.0  # whoever gossips with us has chosen us for this long
QUIET_S = 0.02  # changes within this time are announced together
MAX_SYNC_PER_S = 100  # messages taken from one peer; what is dropped, the next summary repairs
MAX_NEWS_PER_S = 100


def beat_period_s(n_live: int) -> float:
    """How often each of `n_live` members beats.

    Every beat reaches every member a few times over, so that with a fixed period the traffic of
    each would grow with their number. The square makes it fall instead: 5 / n beats a second. What
    a beat is for is left to suspicion then; it is soon enough again where a few are all there is.
    """
    return min(max(MIN_BEAT_PERIOD_S, n_live**2 / 5), MAX_BEAT_PERIOD_S)


def quiet_s(n_live: int) -> float:
    """How long changes are gathered: in a larger swarm they come more often and go to more."""
    return QUIET_S * max(1.0, n_live / A_FEW)


def beat_ttl_s(period_s: float) -> int:
    """How long a beat is good: some may be lost or late."""
    return max(SHORTEST_TTL_S, int(3 * period_s))


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
    """Sends and takes summaries, beats and suspicions; `run` is its one loop."""

    def __init__(
        self,
        mesh: Mesh,
        switch: Switch,
        replica: Replica,
        awareness: Awareness,
        clock: Callable[[], float],
        rng: random.Random,
        *,
        watched: Callable[[], Iterable[str]] = tuple,
        state: Callable[[], Mapping[str, object]] = dict,
    ) -> None:
        """Prepare.

        Args:
            watched: members whose death must be noticed within seconds however large the swarm,
                because we depend on them; dialled if there is no link.
            state: what our beats say of us, up to 1 KiB of JSON; a change is told at once.
        """
        self._mesh = mesh
        self._state = state
        self._switch = switch
        self._replica = replica
        self._awareness = awareness
        self._clock = clock
        self._rng = rng
        self._watched = watched
        self._sessions: dict[str, SyncSession] = {}
        self._sync_allowances: dict[str, Allowance] = {}
        self._news_allowances: dict[str, Allowance] = {}
        self._chosen: set[str] = set()
        self._chose_us_at: dict[str, float] = {}
        self._next_beat_at = 0.0
        self._beat_at = float("-inf")
        self._told_state: dict[str, object] = {}  # with the last beat
        self._to_probe: list[str] = []  # of this turn
        self._probing: set[str] = set()
        self._lag_s = 0.0  # how late our own loop has been lately
        self._tasks = Tasks()
        self._changed = asyncio.Event()
        switch.on_message(StoreSync, self._take_sync)
        switch.on_message(Beat, self._take_news)
        replica.subscribe(lambda _author, _keys: self._changed.set())

    @property
    def neighbours(self) -> frozenset[str]:
        """The peers that hear of our changes at once."""
        now = self._clock()
        chose_us = {peer for peer, at in self._chose_us_at.items() if now - at < CHOICE_S}
        return frozenset(self._chosen | chose_us)

    def link_up(self, peer_id: str) -> None:
        """Begin the exchange with a peer whose link came up."""
        self._sessions[peer_id] = SyncSession(self._replica)
        self._choose_neighbours()
        self._say_summary(peer_id)
        known = [Beat(body=news.encode()) for news in self._awareness.known(self._clock())]
        self._tasks.spawn(self._send(peer_id, *known), "what we know of lives")

    def link_down(self, peer_id: str, *, is_failure: bool) -> None:
        """Forget a peer whose link ended; one that failed may mean that the peer is dead."""
        self._sessions.pop(peer_id, None)
        self._sync_allowances.pop(peer_id, None)
        self._news_allowances.pop(peer_id, None)
        self._chosen.discard(peer_id)
        self._chose_us_at.pop(peer_id, None)
        self._choose_neighbours()
        if is_failure:
            self._tasks.spawn(self._suspect_unless_back(peer_id), "suspicion")

    async def run(self) -> None:
        """Beat, probe, and announce changes, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._beat_for_ever())
            group.create_task(self._probe_for_ever())
            group.create_task(self._announce_for_ever())

    async def aclose(self) -> None:
        """Take leave of all neighbours, as far as that does not wait, and stop."""
        told = self._awareness.beat(self._clock(), {}, ttl_s=0)
        farewell = Beat(body=News((told,)).encode())
        for peer_id in self.neighbours:
            if (peer := self._mesh.peers.get(peer_id)) is not None:
                with suppress(TransportError):
                    peer.post(farewell)
        await self._tasks.aclose()

    # --- lives -------------------------------------------------------------------------------

    async def _beat_for_ever(self) -> None:
        next_summary_at = self._clock() + SUMMARY_S
        turn = 0
        while True:
            now = self._clock()
            self._awareness.expire(now)
            period_s = beat_period_s(len(self._awareness.live(now)))
            # What was promised with the last beat holds, even if the swarm has grown since.
            self._next_beat_at = min(self._next_beat_at, now + period_s)
            if self._state() != self._told_state:
                self._next_beat_at = min(self._next_beat_at, self._beat_at + MIN_BEAT_PERIOD_S)
            self._beat_if_due(now)
            if now >= next_summary_at and self._chosen:
                turn += 1
                self._say_summary(sorted(self._chosen)[turn % len(self._chosen)])
                next_summary_at = now + SUMMARY_S
            await asyncio.sleep(STEP_S)

    def _beat_if_due(self, now: float) -> None:
        if now < self._next_beat_at:
            return
        period_s = beat_period_s(len(self._awareness.live(now)))
        self._told_state = dict(self._state())
        told = self._awareness.beat(now, self._told_state, ttl_s=beat_ttl_s(period_s))
        self._beat_at, self._next_beat_at = now, now + period_s
        self._spread(News((told,)), skip=None)

    async def _probe_for_ever(self) -> None:
        while True:
            for peer_id in self._watched():
                self._probe(peer_id)
            if not self._to_probe:  # everybody once a turn, in an order that nobody foresees
                self._to_probe = sorted(self.neighbours)
                self._rng.shuffle(self._to_probe)
            if self._to_probe:
                self._probe(self._to_probe.pop())
            is_few = len(self._awareness.live(self._clock())) <= A_FEW
            pause_s = PROBE_S[0 if is_few or any(self._watched()) else 1]
            slept_at = self._clock()
            await asyncio.sleep(pause_s)
            lag_s = self._clock() - slept_at - pause_s
            self._lag_s = max(lag_s, LAG_DECAY * self._lag_s)

    def _probe(self, peer_id: str) -> None:
        if peer_id not in self._probing:
            self._probing.add(peer_id)
            self._tasks.spawn(self._ask(peer_id), "probe")

    async def _ask(self, peer_id: str) -> None:
        try:
            peer = await self._mesh.peer(peer_id)
            patience_s = ANSWER_S + PATIENCE * (self._lag_s + (peer.rtt_s or 0.0))
            asked_at = self._clock()
            try:
                await peer.ping(timeout_s=patience_s)
            except LinkTimeout:
                if self._clock() - asked_at < patience_s + LAG_S:
                    self._suspect(peer_id)
                return
            if peer_id not in self._awareness.live(self._clock()):
                # It lives, and nobody here knows; suspected to its face, it beats.
                await peer.send(Beat(body=News((), (Suspicion(peer_id, 0),)).encode()))
        except TransportError:
            self._suspect(peer_id)
        finally:
            self._probing.discard(peer_id)

    async def _suspect_unless_back(self, peer_id: str) -> None:
        await asyncio.sleep(RETURN_S)
        if peer_id not in self._sessions:
            self._suspect(peer_id)

    def _suspect(self, peer_id: str) -> None:
        suspicion = self._awareness.suspect(peer_id)
        if suspicion is not None:
            logger.info("no answer: suspected", extra={"peer": peer_id[-8:]})
            self._take_suspicion(suspicion, sender=None)

    def _take_suspicion(self, suspicion: Suspicion, *, sender: str | None) -> None:
        now = self._clock()
        if not self._awareness.doubt(suspicion, now, within_s=DENIAL_S):
            return
        if suspicion.author != self._switch.own_peer_id:
            self._spread(News((), (suspicion,)), skip=sender)
        else:  # soon, and once, however many say so and however often
            self._next_beat_at = min(self._next_beat_at, self._beat_at + MIN_BEAT_PERIOD_S)
            self._beat_if_due(now)

    def _take_news(self, sender: str, message: Beat, _: Mapping[str, Tensor]) -> None:
        allowance = self._news_allowances.setdefault(sender, Allowance(MAX_NEWS_PER_S))
        now = self._clock()
        if not allowance.take(now):
            logger.debug("too much news at once", extra={"peer": sender[-8:]})
            return
        try:
            news = News.decode(message.body)
        except UpdateRejected as error:
            raise MalformedFrame(str(error)) from error
        fresh = tuple(told for told in news.beats if self._is_fresh(told, now, sender))
        if fresh:
            self._spread(News(fresh), skip=sender)
        for suspicion in news.suspicions:
            self._take_suspicion(suspicion, sender=sender)

    def _is_fresh(self, told: Told, now: float, sender: str) -> bool:
        try:
            return self._awareness.receive(told, now)
        except UpdateRejected as error:
            # Refused and counted; the sender may only have passed it on.
            logger.debug("beat refused: %s", error, extra={"peer": sender[-8:]})
            return False

    def _spread(self, news: News, *, skip: str | None) -> None:
        message = Beat(body=news.encode())
        for peer_id in self.neighbours - {skip}:
            self._tasks.spawn(self._send(peer_id, message), "news")

    # --- store -------------------------------------------------------------------------------

    async def _announce_for_ever(self) -> None:
        while True:
            await self._changed.wait()
            await asyncio.sleep(quiet_s(len(self._awareness.live(self._clock()))))
            self._changed.clear()
            for peer_id in self.neighbours:
                self._say_summary(peer_id)

    def _choose_neighbours(self) -> None:
        candidates = sorted(self._sessions.keys() - self._chosen)
        n_wanted = N_CHOSEN - len(self._chosen)
        for peer_id in self._rng.sample(candidates, min(max(n_wanted, 0), len(candidates))):
            self._chosen.add(peer_id)

    def _say_summary(self, peer_id: str) -> None:
        session = self._sessions.get(peer_id)
        if session is not None:
            self._tasks.spawn(self._send(peer_id, StoreSync(body=session.summary())), "summary")

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
        self._chose_us_at[sender] = self._clock()
        allowance = self._sync_allowances.setdefault(sender, Allowance(MAX_SYNC_PER_S))
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
