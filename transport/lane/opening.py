"""How two members get a lane: agreed over their link, then by the fastest way there is.

Whoever opens draws an id and a key and offers them over the authenticated link, with the purpose;
the other then waits for them. Tried in turn: a socket within the machine, a TLS connection to the
listening port by whichever side dialled the link, then by the other, and last the link itself.
Nobody but the two who agreed can use the key, and it opens one lane.

Which lanes are wanted, and what for, is the caller's business: a purpose is opaque bytes here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from weakref import WeakSet

from covey.transport.addresses import format_address
from covey.transport.errors import (
    ErrorCode,
    LinkBroken,
    LinkTimeout,
    PeerUnreachable,
    TransportError,
)
from covey.transport.frame import Frame
from covey.transport.link import LinkKind
from covey.transport.listener import accept_one
from covey.transport.mesh import Mesh
from covey.transport.messages import (
    Failure,
    LaneDial,
    LaneOffer,
    LaneOverLink,
    LaneReady,
)
from covey.transport.paths import direct_ways, open_path
from covey.transport.peer import Peer
from covey.transport.preamble import NONCE_BYTES, build_preamble
from covey.transport.tasks import Tasks

from .inbox import LinkLane
from .lane import Lane, LaneKind
from .local import connect_local, listen_local
from .over_links import OverLinks
from .secure import KEY_BYTES, LANE_ID_BYTES, secure_local, secure_tls
from .stream import StreamLane
from .waiting import SPIN_S

logger = logging.getLogger(__name__)

OPEN_S = 12.0  # all ways together
ANSWER_S = 3.0
DIAL_S = 3.0
PARKED_S = 10.0  # how long a lane that came waits for `accept`
MAX_AGREED = 64  # lanes being opened, or parked
MAX_AGREED_PER_PEER = 20  # the largest group, and some that are over
ALL_KINDS: tuple[LaneKind, ...] = ("local", "tls", "link")


@dataclass(slots=True)
class _Agreed:
    """A lane that is being opened, at either end."""

    peer_id: str
    id: bytes
    key: bytes
    purpose: bytes
    came: asyncio.Future[Lane] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def settle(self, lane: Lane) -> bool:
        """This lane is it, if none was before; else it is closed."""
        if self.came.done():
            lane.close()
            return False
        self.came.set_result(lane)
        return True

    def leave(self, taken: Lane | None) -> None:
        """It is over here; a lane that came and was not taken is closed."""
        if not self.came.cancel() and not self.came.cancelled():
            lane = self.came.result()
            if lane is not taken:
                lane.close()


class Lanes:
    """The lanes of one node: opens them, and takes those that members open to it.

    `kinds` are the ways that may be used; what the other end excludes fails there.
    """

    def __init__(
        self, mesh: Mesh, *, kinds: Collection[LaneKind] = ALL_KINDS, spin_s: float = SPIN_S
    ) -> None:
        self._mesh = mesh
        self._kinds = frozenset(kinds)
        self._spin_s = spin_s
        self._agreed: dict[bytes, _Agreed] = {}
        self._waiting: dict[tuple[str, bytes], list[asyncio.Future[Lane]]] = {}
        self._parked: dict[tuple[str, bytes], list[Lane]] = {}
        self._n_agreed: Counter[str] = Counter()  # by members, not by us; and parked
        self._over_links = OverLinks(mesh, spin_s=spin_s)
        self._open: WeakSet[StreamLane | LinkLane] = WeakSet()
        self._tasks = Tasks()
        mesh.add_door(self)
        mesh.serve(LaneOffer, self._on_offer)
        mesh.serve(LaneDial, self._on_dial)
        mesh.serve(LaneOverLink, self._on_over_link)

    # --- for the node -----------------------------------------------------------------------------

    async def open(self, peer_id: str, purpose: bytes, *, timeout_s: float = OPEN_S) -> Lane:
        """A lane to a member, which takes it with `accept` and the same purpose (<= 256 bytes).

        Raises:
            PeerUnreachable: no way worked.
            RefusedByPeer: it has too many lanes under way already.
            LinkTimeout: it took too long.
            TransportError: there is no link to it, or it ended.
        """
        peer = await self._mesh.peer(peer_id)
        agreed = _Agreed(peer_id, os.urandom(LANE_ID_BYTES), os.urandom(KEY_BYTES), purpose)
        self._agreed[agreed.id] = agreed
        lane: Lane | None = None
        try:
            async with asyncio.timeout(timeout_s):
                offer = LaneOffer(lane=agreed.id, key=agreed.key, purpose=purpose)
                await peer.request(offer, timeout_s=timeout_s)
                lane = await self._by_some_way(peer, agreed)
        except TimeoutError as error:
            raise LinkTimeout("opening a lane", timeout_s) from error
        finally:
            del self._agreed[agreed.id]
            agreed.leave(lane)
        logger.info("lane open", extra={"peer": peer_id[-8:], "kind": lane.kind})
        return lane

    async def accept(self, peer_id: str, purpose: bytes, *, timeout_s: float = OPEN_S) -> Lane:
        """The lane that a member opens for `purpose`; it may have come already.

        Raises:
            LinkTimeout: it did not.
        """
        key = (peer_id, purpose)
        parked = self._parked.get(key)
        if parked:
            lane = parked.pop(0)
            self._unpark(key)
            return lane
        came: asyncio.Future[Lane] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, []).append(came)
        try:
            async with asyncio.timeout(timeout_s):
                return await came
        except TimeoutError as error:
            raise LinkTimeout("the opening of a lane", timeout_s) from error
        finally:
            waiting = self._waiting[key]
            if came in waiting:  # else it was taken out with its lane
                waiting.remove(came)
            if not waiting:
                del self._waiting[key]

    def drop(self, peer_id: str) -> None:
        """Close every lane to a member, which was removed."""
        for lane in [lane for lane in self._open if lane.peer_id == peer_id]:
            lane.close()

    async def aclose(self) -> None:
        """Close every lane, and give up what is under way."""
        await self._tasks.aclose()
        for lane in list(self._open):
            lane.close()

    # --- the ways, as whoever opens ---------------------------------------------------------------

    async def _by_some_way(self, peer: Peer, agreed: _Agreed) -> Lane:
        ways: list[tuple[LaneKind, Callable[[Peer, _Agreed], Awaitable[Lane]]]]
        ways = [("local", self._connect_local)]
        if peer.kind in (LinkKind.DIRECT, LinkKind.MAPPED):
            ways += [("tls", self._dial), ("tls", self._be_dialled)]
            if peer.dialled_address is None:  # it dialled us: that way is known to work
                ways[1:] = reversed(ways[1:])
        ways.append(("link", self._use_link))
        reasons: list[str] = []
        for kind, way in ways:
            if kind in self._kinds:
                try:
                    return await way(peer, agreed)
                except TransportError as error:
                    reasons.append(f"{kind}: {error}")
        raise PeerUnreachable(peer.peer_id, "no lane: " + "; ".join(reasons))

    async def _connect_local(self, peer: Peer, agreed: _Agreed) -> Lane:
        connection = await connect_local(agreed.key)
        wire = await secure_local(connection, agreed.key, agreed.id, is_dialer=True)
        return self._keep(StreamLane(wire, peer.peer_id, "local", spin_s=self._spin_s))

    async def _dial(self, peer: Peer, agreed: _Agreed) -> Lane:
        """By either end: to the peer's listening port, where it is known."""
        found = peer.dialled_address
        addresses = [format_address(*found)] if found is not None else []
        addresses += [it for it in self._mesh.addresses_of(peer.peer_id) if it not in addresses]
        ways = direct_ways(addresses, self._mesh.mapped_of(peer.peer_id))

        async def secure(connection: socket.socket, _: LinkKind) -> Lane:
            _announce(connection, agreed)
            return await self._secure(connection, agreed, is_dialer=True)

        return await open_path(peer.peer_id, ways, (), secure, deadline_s=DIAL_S)

    async def _be_dialled(self, peer: Peer, agreed: _Agreed) -> Lane:
        await peer.request(LaneDial(lane=agreed.id), timeout_s=ANSWER_S + DIAL_S)
        # It is here already, or about to be.
        await asyncio.wait({agreed.came}, timeout=ANSWER_S)
        if not agreed.came.done():
            raise LinkTimeout("the peer's dial for a lane", ANSWER_S)
        return agreed.came.result()

    async def _use_link(self, peer: Peer, agreed: _Agreed) -> Lane:
        lane = self._lane_over(peer, agreed)
        is_open = False
        try:
            await peer.request(LaneOverLink(lane=agreed.id), timeout_s=ANSWER_S)
            is_open = True
        finally:
            if not is_open:
                lane.close()
        return lane

    # --- the other end ----------------------------------------------------------------------------

    def key_of(self, key_id: bytes) -> bytes | None:
        """See `Door.key_of`."""
        agreed = self._agreed.get(key_id)
        return agreed.key if agreed is not None and not agreed.came.done() else None

    async def enter(
        self, connection: socket.socket, key_id: bytes, source: tuple[str, int]
    ) -> bool:
        """See `Door.enter`; at whichever end is dialled."""
        agreed = self._agreed.get(key_id)
        if agreed is None or "tls" not in self._kinds:
            connection.close()
            return False
        return agreed.settle(await self._secure(connection, agreed, is_dialer=False))

    def _on_offer(self, peer: Peer, frame: Frame) -> None:
        offer = frame.message
        if not isinstance(offer, LaneOffer) or frame.request is None:
            return
        n_of_peer = self._n_agreed[peer.peer_id]
        if (
            n_of_peer >= MAX_AGREED_PER_PEER
            or self._n_agreed.total() >= MAX_AGREED
            or offer.lane in self._agreed
        ):
            peer.reply(frame, Failure(code=ErrorCode.NOT_READY))
            return
        agreed = _Agreed(peer.peer_id, offer.lane, offer.key, offer.purpose)
        self._agreed[offer.lane] = agreed
        self._n_agreed[peer.peer_id] += 1
        listening = listen_local(offer.key) if "local" in self._kinds else None
        expecting = self._tasks.spawn(self._expect(agreed, listening), "expect a lane")
        expecting.add_done_callback(lambda _: self._expected(agreed, listening))
        peer.reply(frame, LaneReady(lane=offer.lane))

    async def _expect(self, agreed: _Agreed, listening: socket.socket | None) -> None:
        """Until the lane has come, then hand it over, or give up."""
        async with self._answering(agreed, listening):
            await asyncio.wait({agreed.came}, timeout=OPEN_S)
        if agreed.came.done():
            self._hand_over(agreed, agreed.came.result())

    @asynccontextmanager
    async def _answering(
        self, agreed: _Agreed, listening: socket.socket | None
    ) -> AsyncIterator[None]:
        if listening is None:
            yield
            return
        answering = self._tasks.spawn(self._answer(agreed, listening), "local lane")
        try:
            yield
        finally:
            answering.cancel()

    async def _answer(self, agreed: _Agreed, listening: socket.socket) -> None:
        while not agreed.came.done():
            try:
                connection, _ = await accept_one(listening)
                connection.setblocking(False)
                wire = await secure_local(connection, agreed.key, agreed.id, is_dialer=False)
            except (OSError, TransportError):
                await asyncio.sleep(0.01)  # a stranger who found the name in /proc; at leisure
                continue
            lane = StreamLane(wire, agreed.peer_id, "local", spin_s=self._spin_s)
            agreed.settle(self._keep(lane))

    def _expected(self, agreed: _Agreed, listening: socket.socket | None) -> None:
        """The other end's part is over, whatever came of it."""
        del self._agreed[agreed.id]
        self._count_down(agreed.peer_id)
        if listening is not None:
            listening.close()
        agreed.came.cancel()  # nothing that comes now will be taken

    def _on_dial(self, peer: Peer, frame: Frame) -> None:
        request = frame.message
        if not isinstance(request, LaneDial) or frame.request is None:
            return
        agreed = self._agreed_with(peer, request.lane)
        if agreed is None or "tls" not in self._kinds:
            peer.reply(frame, Failure(code=ErrorCode.NOT_READY))
            return
        self._tasks.spawn(self._dial_back(peer, agreed, frame), "dial for a lane")

    async def _dial_back(self, peer: Peer, agreed: _Agreed, frame: Frame) -> None:
        try:
            agreed.settle(await self._dial(peer, agreed))
        except TransportError:
            peer.reply(frame, Failure(code=ErrorCode.PEER_LOST))
        else:
            peer.reply(frame, LaneReady(lane=agreed.id))

    def _hand_over(self, agreed: _Agreed, lane: Lane) -> None:
        """To whoever waits for it, or will soon."""
        key = (agreed.peer_id, agreed.purpose)
        for came in self._waiting.get(key, []):
            if not came.done():
                came.set_result(lane)
                return
        self._parked.setdefault(key, []).append(lane)
        self._n_agreed[agreed.peer_id] += 1
        asyncio.get_running_loop().call_later(PARKED_S, self._forget, key, lane)

    def _forget(self, key: tuple[str, bytes], lane: Lane) -> None:
        if lane in self._parked.get(key, []):
            self._parked[key].remove(lane)
            self._unpark(key)
            lane.close()

    def _unpark(self, key: tuple[str, bytes]) -> None:
        self._count_down(key[0])
        if not self._parked[key]:
            del self._parked[key]

    # --- lanes over links -------------------------------------------------------------------------

    def _on_over_link(self, peer: Peer, frame: Frame) -> None:
        request = frame.message
        if not isinstance(request, LaneOverLink) or frame.request is None:
            return
        agreed = self._agreed_with(peer, request.lane)
        if agreed is None or agreed.came.done() or "link" not in self._kinds:
            peer.reply(frame, Failure(code=ErrorCode.NOT_READY))
            return
        agreed.settle(self._lane_over(peer, agreed))
        peer.reply(frame, LaneReady(lane=agreed.id))

    def _lane_over(self, peer: Peer, agreed: _Agreed) -> LinkLane:
        lane = self._over_links.lane(peer, agreed.id)
        self._open.add(lane)
        return lane

    # --- small things -----------------------------------------------------------------------------

    async def _secure(
        self, connection: socket.socket, agreed: _Agreed, *, is_dialer: bool
    ) -> StreamLane:
        wire = await secure_tls(
            connection,
            self._mesh.credentials.contexts,
            agreed.id,
            peer_id=agreed.peer_id,
            is_dialer=is_dialer,
            is_allowed=self._mesh.is_allowed,
        )
        return self._keep(StreamLane(wire, agreed.peer_id, "tls", spin_s=self._spin_s))

    def _keep(self, lane: StreamLane) -> StreamLane:
        self._open.add(lane)
        return lane

    def _agreed_with(self, peer: Peer, lane_id: bytes) -> _Agreed | None:
        agreed = self._agreed.get(lane_id)
        return agreed if agreed is not None and agreed.peer_id == peer.peer_id else None

    def _count_down(self, peer_id: str) -> None:
        self._n_agreed[peer_id] -= 1
        if not self._n_agreed[peer_id]:
            del self._n_agreed[peer_id]


def _announce(connection: socket.socket, agreed: _Agreed) -> None:
    """Show the listener which lane this is. Raises LinkBroken."""
    preamble = build_preamble(
        key_id=agreed.id,
        key=agreed.key,
        expected_peer_id=agreed.peer_id,
        nonce=os.urandom(NONCE_BYTES),
        unix_time=time.time(),
    )
    try:
        connection.send(preamble)  # a fresh socket has room for it
    except OSError as error:
        connection.close()
        raise LinkBroken("the listener hung up") from error
