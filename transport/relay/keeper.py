"""Holds links to two relays while this node needs them to be reached.

`RelayKeeper` decides, sans-IO; `RelayHolder` dials, measures and pings. Who is willing and
reachable, and whether this node needs a relay at all, others tell.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256

from covey.transport.errors import PeerUnreachable, TransportError
from covey.transport.link import LinkKind
from covey.transport.peer import Peer
from covey.transport.tasks import Tasks

from .choose import Candidate, choose_kept

logger = logging.getLogger(__name__)

MAX_PROBES = 2  # under way at once
MAX_PROBED = 8  # of many candidates only so many are ever measured
FIRST_BACKOFF_S = 5.0
MAX_BACKOFF_S = 300.0
# Between two pings to a kept relay. Pings that come less than 10 s apart tell it, too, that the
# link is needed (`liveness.py`); a hold would mean heartbeats each second, while nobody waits.
PERIOD_S = 8.0
PING_S = 5.0
MEASURE_AGAIN_S = 600.0


@dataclass(frozen=True, slots=True)
class Steps:
    """What to do now: peer ids of links to make and hold, to let go, and to measure once."""

    hold: tuple[str, ...] = ()
    release: tuple[str, ...] = ()
    probe: tuple[str, ...] = ()


class RelayKeeper:
    """Which links to relays there should be; each step it names is reported on once.

    A new relay is up before an old one is let go.
    """

    def __init__(self, own_id: str) -> None:
        self.is_needed = False
        self._own_id = own_id
        self._hosts: dict[str, str | None] = {}  # candidates
        self._rtts: dict[str, tuple[float, float]] = {}  # seconds, and measured at
        self._held: dict[str, bool] = {}  # whether it is up
        self._probing: set[str] = set()
        self._backoff: dict[str, tuple[float, float]] = {}  # not before, and after how long

    @property
    def relays(self) -> dict[str, float]:
        """The relays that are up, with the round-trip time to each (s)."""
        return {peer_id: self._rtts[peer_id][0] for peer_id, is_up in self._held.items() if is_up}

    def see(self, hosts: Mapping[str, str | None]) -> None:
        """All members that are willing and reachable now, and at which host."""
        self._hosts = {peer_id: hosts[peer_id] for peer_id in hosts if peer_id != self._own_id}
        for known in (self._rtts, self._backoff):
            for peer_id in known.keys() - self._hosts.keys() - self._held.keys():
                del known[peer_id]

    def measured(self, peer_id: str, rtt_s: float, *, now: float) -> None:
        """It answered: a probe is over, or a held link is up and this fast."""
        self._rtts[peer_id] = (rtt_s, now)
        self._probing.discard(peer_id)
        self._backoff.pop(peer_id, None)
        if peer_id in self._held:
            self._held[peer_id] = True

    def failed(self, peer_id: str, *, now: float) -> None:
        """It could not be reached, or its link ended: not again at once."""
        if peer_id not in self._held and peer_id not in self._probing:
            return
        self._held.pop(peer_id, None)
        self._probing.discard(peer_id)
        self._rtts.pop(peer_id, None)
        _, pause_s = self._backoff.get(peer_id, (0.0, FIRST_BACKOFF_S / 2))
        pause_s = min(2 * pause_s, MAX_BACKOFF_S)
        self._backoff[peer_id] = (now + pause_s, pause_s)

    def next_steps(self, *, now: float) -> Steps:
        """What to do; those to hold and to probe are under way from here on."""
        wanted = self._wanted(now)
        hold = tuple(peer_id for peer_id in wanted if peer_id not in self._held)
        self._held.update(dict.fromkeys(hold, False))
        release: tuple[str, ...] = ()
        if not self.is_needed or all(self._held[peer_id] for peer_id in wanted):
            release = tuple(peer_id for peer_id in self._held if peer_id not in wanted)
            for peer_id in release:
                del self._held[peer_id]
        return Steps(hold, release, self._to_probe(now))

    def next_at(self, *, now: float) -> float:
        """When `next_steps` may say something new, if nothing is reported before."""
        ends = (not_before for not_before, _ in self._backoff.values() if not_before > now)
        return min((now + PERIOD_S, *ends))

    def _wanted(self, now: float) -> tuple[str, ...]:
        if not self.is_needed:
            return ()
        candidates = [
            Candidate(peer_id, host, self._rtts[peer_id][0] if peer_id in self._rtts else None)
            for peer_id, host in self._hosts.items()
            if self._may_try(peer_id, now)
        ]
        return choose_kept(candidates, self._held)

    def _to_probe(self, now: float) -> tuple[str, ...]:
        if not self.is_needed:
            return ()
        # Each node asks others first, so that not all ask the same ones.
        ranked = sorted(self._hosts, key=self._rank)[:MAX_PROBED]
        unknown = [
            peer_id
            for peer_id in ranked
            if self._is_due(peer_id, now)
            and peer_id not in self._held
            and peer_id not in self._probing
            and self._may_try(peer_id, now)
        ]
        probe = tuple(unknown[: max(0, MAX_PROBES - len(self._probing))])
        self._probing.update(probe)
        return probe

    def _is_due(self, peer_id: str, now: float) -> bool:
        return peer_id not in self._rtts or now >= self._rtts[peer_id][1] + MEASURE_AGAIN_S

    def _may_try(self, peer_id: str, now: float) -> bool:
        return now >= self._backoff.get(peer_id, (now, 0.0))[0]

    def _rank(self, peer_id: str) -> bytes:
        return sha256(f"{self._own_id} {peer_id}".encode()).digest()


class RelayHolder:
    """Does what a `RelayKeeper` says; `connect(peer_id)` gives a live peer, as `Mesh.peer`."""

    def __init__(self, own_id: str, connect: Callable[[str], Awaitable[Peer]]) -> None:
        self._keeper = RelayKeeper(own_id)
        self._connect = connect
        self._kept: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._news = asyncio.Event()  # for `changed`
        self._loop = asyncio.get_running_loop()
        self._tasks = Tasks()

    @property
    def relays(self) -> dict[str, float]:
        """The relays this node can be reached by now, with the round-trip time to each (s)."""
        return self._keeper.relays

    def need(self, *, is_needed: bool) -> None:
        """Whether others cannot dial this node."""
        self._keeper.is_needed = is_needed
        self._changed.set()

    def see(self, hosts: Mapping[str, str | None]) -> None:
        """All members that are willing and reachable now, and at which host."""
        self._keeper.see(hosts)
        self._changed.set()

    def lost(self, peer_id: str) -> None:
        """A peer's link has ended (`Mesh.on_down`), or it cannot be reached."""
        self._let_go(peer_id)
        self._keeper.failed(peer_id, now=self._loop.time())
        self._changed.set()

    async def changed(self) -> None:
        """Until `relays` may be others than now."""
        await self._news.wait()
        self._news.clear()

    async def run(self) -> None:
        """Until cancelled; links that nobody else needs end by themselves after that."""
        try:
            while True:
                self._changed.clear()
                self._step(self._loop.time())
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(self._keeper.next_at(now=self._loop.time())):
                        await self._changed.wait()
        finally:
            await self._tasks.aclose()

    def _step(self, now: float) -> None:
        self._news.set()
        steps = self._keeper.next_steps(now=now)
        for peer_id in steps.release:
            self._let_go(peer_id)
        for peer_id in steps.hold:
            self._kept[peer_id] = self._tasks.spawn(self._keep(peer_id), "keep a relay")
        for peer_id in steps.probe:
            self._tasks.spawn(self._probe(peer_id), "measure a relay")

    def _let_go(self, peer_id: str) -> None:
        keeping = self._kept.pop(peer_id, None)
        if keeping is not None:
            keeping.cancel()

    async def _keep(self, peer_id: str) -> None:
        while True:
            await self._probe(peer_id)  # if it fails, this task is let go
            await asyncio.sleep(PERIOD_S)

    async def _probe(self, peer_id: str) -> None:
        try:
            peer = await self._connect(peer_id)
            if peer.kind is LinkKind.RELAYED:
                raise PeerUnreachable(peer_id, "a relay behind a relay is of no use")
            rtt_s = await peer.ping(timeout_s=PING_S)
        except TransportError as error:
            logger.info("no relay", extra={"peer": peer_id[-8:], "reason": str(error)})
            self.lost(peer_id)
            return
        self._keeper.measured(peer_id, rtt_s, now=self._loop.time())
        self._changed.set()
