"""Finds a direct way for links that go through a relay, while they work.

The end with the lower peer id leads: it asks the other what it knows of its NAT, makes the list of
attempts (`punch/attempts.py`), and tries one after the other until the link has moved. What an end
does in one attempt is in `ways.py`. If none works it tries again, more and more seldom.

A moment is agreed on without clocks: the follower begins half a round trip after it said that it is
ready, the leader when it hears so.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from covey.transport.errors import MalformedFrame, TransportError
from covey.transport.frame import Frame
from covey.transport.link import LinkKind
from covey.transport.mesh import Mesh
from covey.transport.messages import PathAnswer, PathOffer, PathText, PathTry
from covey.transport.nat.facts import NatFacts
from covey.transport.nat.service import NatService
from covey.transport.peer import Peer
from covey.transport.punch.attempts import Attempt, attempts
from covey.transport.tasks import Tasks

from .ways import Follower, Leader

logger = logging.getLogger(__name__)

ASK_S = 5.0
PAUSES_S = (0.0, 2.0, 10.0, 30.0, 120.0, 600.0)  # before each round; the last one again and again
NEEDED_PAUSE_S = 10.0  # at most, while somebody depends on the link
LOOK_S = 2.0  # whether somebody does


@dataclass(frozen=True, slots=True)
class Tried:
    """One attempt and what came of it; for people (`covey doctor`)."""

    attempt: Attempt
    took_s: float
    failure: str  # empty if it made a link


class Upgrader:
    """Watches the links of one mesh, and answers the upgraders of others."""

    def __init__(
        self,
        mesh: Mesh,
        nat: NatService,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tried: dict[str, tuple[Tried, ...]] = {}  # the last round, by peer id
        self._mesh = mesh
        self._nat = nat
        self._clock = clock
        self._tasks = Tasks()
        self._leading: dict[str, asyncio.Task[None]] = {}
        self._stirred: dict[str, asyncio.Event] = {}  # for those: begin again with short pauses
        self._leader = Leader(mesh, nat)
        self._follower = Follower(mesh, nat)
        mesh.on_path(self._consider)
        mesh.serve(PathOffer, self._answer)
        mesh.serve(PathTry, self._follower.on_try)
        mesh.serve(PathText, self._take_text)

    async def aclose(self) -> None:
        """Give up what is under way."""
        await self._tasks.aclose()
        await self._follower.aclose()

    def forget(self, peer_id: str) -> None:
        """The link to a peer has ended."""
        self._follower.facts.pop(peer_id, None)
        self._stirred.pop(peer_id, None)
        leading = self._leading.pop(peer_id, None)
        if leading is not None:
            leading.cancel()

    def facts_changed(self) -> None:
        """Other ways may work now than those that were tried."""
        for stirred in self._stirred.values():
            stirred.set()

    def _consider(self, peer: Peer) -> None:
        """A link came up, or moved: does it need a better way?"""
        if peer.kind is not LinkKind.RELAYED or self._mesh.peer_id > peer.peer_id:
            return
        leading = self._leading.get(peer.peer_id)
        if leading is not None and not leading.done():
            self._stirred[peer.peer_id].set()
            return
        stirred = self._stirred[peer.peer_id] = asyncio.Event()
        self._leading[peer.peer_id] = self._tasks.spawn(self._lead(peer, stirred), "upgrade")

    def _answer(self, peer: Peer, frame: Frame) -> None:
        if isinstance(frame.message, PathOffer) and frame.request is not None:
            theirs = NatFacts.from_card(frame.message.nat, now=self._clock())
            self._follower.facts[peer.peer_id] = theirs
            peer.reply(frame, PathAnswer(nat=self._nat.facts.to_card(now=self._clock())))

    def _take_text(self, peer: Peer, frame: Frame) -> None:
        if isinstance(frame.message, PathText):
            for end in (self._leader, self._follower):
                end.take_text(peer.peer_id, frame.message.text)

    async def _lead(self, peer: Peer, stirred: asyncio.Event) -> None:
        n_rounds = 0
        while True:
            if await self._pause(peer, stirred, PAUSES_S[min(n_rounds, len(PAUSES_S) - 1)]):
                n_rounds = 0
            n_rounds += 1
            if peer.error is not None or peer.kind is not LinkKind.RELAYED:
                return
            try:
                await self._round(peer)
            except TransportError as error:
                extra = {"peer": peer.peer_id[-8:], "reason": str(error)}
                logger.info("no better way was agreed on", extra=extra)

    async def _pause(self, peer: Peer, stirred: asyncio.Event, pause_s: float) -> bool:
        """Until it is time for another round; True if that is because something is new."""
        began_at = self._clock()
        while (left_s := began_at + pause_s - self._clock()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, LOOK_S)):
                    await stirred.wait()
                stirred.clear()
                return True
            if peer.is_needed:
                pause_s = min(pause_s, NEEDED_PAUSE_S)
        return False

    async def _round(self, peer: Peer) -> None:
        ours = self._nat.facts
        offer = PathOffer(nat=ours.to_card(now=self._clock()))
        answer = (await peer.request(offer, timeout_s=ASK_S)).message
        if not isinstance(answer, PathAnswer):
            raise MalformedFrame("the peer did not say what it knows of its NAT")
        theirs = NatFacts.from_card(answer.nat, now=self._clock())
        tried: list[Tried] = []
        for attempt in attempts(ours, theirs):
            if peer.error is not None or peer.kind is not LinkKind.RELAYED:
                break
            began_at = self._clock()
            try:
                await self._leader.make(peer, attempt, theirs)
                failure = ""
            except TransportError as error:
                failure = str(error)
            tried.append(Tried(attempt, self._clock() - began_at, failure))
            logger.info(
                "tried a way",
                extra={
                    "peer": peer.peer_id[-8:],
                    "way": attempt.kind.value,
                    "reason": failure or "it works",
                },
            )
            self.tried[peer.peer_id] = tuple(tried)
