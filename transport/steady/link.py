"""`SteadyLink`: the link a peer holds, while the carriers below it come and go.

A carrier that breaks, or is suspected, is given up; the link then waits, and its owner (`on_lost`)
finds another, dials the peer anew and calls `attach`. A better carrier is attached the same way
while the old one still works. What the peer does not have yet goes out again on the new carrier,
in the order of numbers, before anything new: nothing is lost, doubled or reordered in its stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from covey.transport.errors import (
    FrameTooLarge,
    LinkBroken,
    LinkClosed,
    MalformedFrame,
    ProtocolViolation,
    TransportError,
)
from covey.transport.frame import Frame
from covey.transport.link import Link, LinkKind, Packets
from covey.transport.messages import Ack, Failure, Receipt
from covey.transport.tasks import Tasks

from .ledger import Ledger

CLOSE_S = 2.0  # for what still waits when the link is closed


def _ignore() -> None:
    """Nobody wants to know."""


class SteadyLink:
    """A `Link` over one carrier at a time, both of them to the same peer.

    `on_lost` is called when the carrier was given up and the link needs another, `on_moved` when
    it has one; both on the event loop, and must not block.
    """

    def __init__(self, carrier: Link, link_id: bytes) -> None:
        self.peer_id = carrier.peer_id
        self.id = link_id
        self.on_lost: Callable[[], None] = _ignore
        self.on_moved: Callable[[], None] = _ignore
        self._carrier: Link | None = carrier
        self._last = carrier  # what there is to say of it outlives it
        self._sent_before = self._received_before = 0  # bytes, on earlier carriers
        self._ledger = Ledger()
        self._error: TransportError | None = None
        self.was_silent = False  # whether it was suspected, rather than cut
        self.lost_to = LinkBroken("the connection to the peer was lost")  # the last carrier
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks = Tasks()
        self._catching_up = False
        self.n_moves = 0

    # --- what it is like -----------------------------------------------------------------------

    @property
    def kind(self) -> LinkKind:
        """What carries it now, or did last."""
        return self._last.kind

    @property
    def remote(self) -> tuple[str, int] | None:
        """See `Link.remote`."""
        return self._last.remote

    @property
    def is_dialer(self) -> bool:
        """Whether this end began the carrier."""
        return self._last.is_dialer

    @property
    def bytes_sent(self) -> int:
        """Over all carriers."""
        return self._sent_before + self._last.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Over all carriers."""
        return self._received_before + self._last.bytes_received

    @property
    def packets(self) -> Packets | None:
        """Of this carrier."""
        return self._last.packets

    @property
    def needs_carrier(self) -> bool:
        """Whether it waits for one."""
        return self._carrier is None and self._error is None

    async def wait_carried(self, timeout_s: float) -> None:
        """Until it has a carrier or has ended, but no longer than `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.needs_carrier:
                    await asyncio.shield(self._changed)

    @property
    def error(self) -> TransportError | None:
        """Why it ended, if it has."""
        return self._error

    @property
    def receipt(self) -> Receipt:
        """What has arrived: what the peer needs to know to go on with another carrier."""
        return self._ledger.receipt

    # --- Link ----------------------------------------------------------------------------------

    async def send(self, frame: Frame) -> None:
        """See `Link.send`."""
        while self._error is None and not self._ledger.has_room:
            await asyncio.shield(self._changed)
        stamped = self._stamp(frame)
        carrier = self._carrier
        if carrier is None or self._catching_up:
            return  # kept, and sent when its turn comes
        self._ledger.next_unsent()
        try:
            await carrier.send(stamped)
        except (FrameTooLarge, ValueError, asyncio.CancelledError):
            self._take_back(stamped, carrier)
            raise
        except LinkBroken:
            pass  # it is kept; `receive` finds out, after what the carrier still has for us

    def post(self, frame: Frame) -> None:
        """See `Link.post`."""
        if self._ledger.is_overrun:
            self.abort(LinkBroken("the peer does not read its answers"))
        stamped = self._stamp(frame)
        carrier = self._carrier
        if carrier is None or self._catching_up:
            return
        self._ledger.next_unsent()
        try:
            carrier.post(stamped)
        except (FrameTooLarge, ValueError):
            self._take_back(stamped, carrier)
            raise
        except LinkBroken:
            pass  # it is kept; `receive` finds out, after what the carrier still has for us

    async def receive(self) -> Frame:
        """See `Link.receive`."""
        while True:
            carrier = self._carrier
            if self._error is not None:
                raise self._error
            if carrier is None:
                await asyncio.shield(self._changed)
                continue
            try:
                frame = await carrier.receive()
            except (LinkClosed, ProtocolViolation) as error:
                if carrier is self._carrier:  # else an older one, of no more interest
                    self._end(error)
            except TransportError as error:
                self._lost(carrier, error)
            else:
                if self._take(frame, carrier):
                    return frame

    def suspect(self) -> None:
        """See `Link.suspect`."""
        if self._carrier is not None:
            self.was_silent = True
            self._lost(self._carrier, LinkBroken("the peer has fallen silent"))

    def abort(self, error: TransportError) -> None:
        """See `Link.abort`."""
        self._end(error)
        if self._carrier is not None:
            self._carrier.abort(error)

    async def aclose(self) -> None:
        """See `Link.aclose`."""
        if self._error is None and self._catching_up:
            await self._tasks.join(CLOSE_S)
        self._end(LinkClosed(by_peer=False))
        if self._carrier is not None:
            await self._carrier.aclose()
        await self._tasks.aclose()

    # --- carriers ------------------------------------------------------------------------------

    def attach(self, carrier: Link, receipt: Receipt) -> None:
        """Go on with another carrier; the peer has `receipt`, and knows what we have.

        Raises:
            TransportError: the link has ended, or the receipt makes no sense; so does the carrier.
        """
        if self._error is not None:
            carrier.abort(self._error)
            raise self._error
        try:
            self._ledger.rewind(receipt)
        except MalformedFrame as error:
            carrier.abort(error)
            self.abort(error)
            raise
        before, self._carrier = self._carrier, carrier
        self._sent_before += self._last.bytes_sent
        self._received_before += self._last.bytes_received
        self._last = carrier
        self.n_moves += 1
        self.was_silent = False
        if before is not None:
            before.abort(LinkBroken("the link went on another way"))
        self._catching_up = True
        self._tasks.spawn(self._catch_up(carrier), "catch up")
        self._acknowledge(carrier)  # what the last carrier was told may have been lost with it
        self._notify()
        self.on_moved()

    async def _catch_up(self, carrier: Link) -> None:
        """Send what waits, until nothing does."""
        with suppress(TransportError):
            while carrier is self._carrier and (frame := self._ledger.next_unsent()) is not None:
                await carrier.send(frame)
        if carrier is self._carrier:
            self._catching_up = False

    def _lost(self, carrier: Link, error: TransportError) -> None:
        """A carrier is of no more use; a link that has ended does not need another."""
        if carrier is not self._carrier:
            return
        carrier.abort(error)
        if self._error is None:
            if isinstance(error, LinkBroken):
                self.lost_to = error
            self._carrier = None
            self._catching_up = False
            self._notify()
            self.on_lost()

    # --- inside --------------------------------------------------------------------------------

    def _stamp(self, frame: Frame) -> Frame:
        if self._error is not None:
            raise self._error
        return self._ledger.stamp(frame)

    def _take_back(self, stamped: Frame, carrier: Link) -> None:
        """The carrier did not take the frame: something must go out under its number."""
        filler = self._ledger.blank(stamped.number)
        if carrier is self._carrier and not self._catching_up:
            with suppress(TransportError):
                carrier.post(filler)

    def _take(self, frame: Frame, carrier: Link) -> bool:
        """Whether the frame is for whoever waits in `receive`."""
        had_room = self._ledger.has_room
        try:
            is_new = self._judge(frame)
        except MalformedFrame as error:
            with suppress(TransportError):
                carrier.post(Frame(message=Failure(code=error.code)))
            self._end(error)
            self._tasks.spawn(carrier.aclose(), "close")
            raise
        if self._ledger.owes_ack:
            self._acknowledge(carrier)
        if not had_room and self._ledger.has_room:
            self._notify()
        return is_new

    def _acknowledge(self, carrier: Link) -> None:
        with suppress(TransportError):  # `receive` finds out
            carrier.post(Frame(message=Ack(), ack=self._ledger.acknowledge()))

    def _judge(self, frame: Frame) -> bool:
        if frame.number:
            return self._ledger.take(frame) and not isinstance(frame.message, Ack)
        if isinstance(frame.message, Ack):
            self._ledger.confirm(frame.ack)
            return False
        if not isinstance(frame.message, Failure):  # which is the carrier's own last word
            raise MalformedFrame("a frame without a number")
        return True

    def _end(self, error: TransportError) -> None:
        if self._error is None:
            self._error = error
            self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.get_running_loop().create_future()
        changed.set_result(None)
