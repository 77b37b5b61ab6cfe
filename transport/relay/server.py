"""The relay's side: makes circuits for members that ask, and lets both ends of each in.

It never learns what it carries. Both ends are members with a live link to this node, so there is
nobody to authenticate again: the key of a circuit went to them over those links.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping

from covey.transport.errors import ErrorCode, TransportError
from covey.transport.frame import Frame
from covey.transport.messages import (
    Failure,
    RelayDeclined,
    RelayOffer,
    RelayOpen,
    RelayOpened,
)
from covey.transport.peer import Peer

from .circuits import Circuit, CircuitBook, RelayLimits
from .splice import Splice, Toll

logger = logging.getLogger(__name__)

_MAX_SWEEP_S = 1.0


class RelayServer:
    """Serves `RelayOpen` and `RelayDeclined`, and is the mesh's `Door` for circuits.

    `peers` gives the live links by peer id. While `is_willing` is False new circuits are refused
    and those that stand go on.
    """

    def __init__(
        self,
        peer_id: str,
        peers: Callable[[], Mapping[str, Peer]],
        *,
        limits: RelayLimits | None = None,
        is_willing: bool = True,
    ) -> None:
        self.is_willing = is_willing
        self._peer_id = peer_id
        self._peers = peers
        self._limits = limits or RelayLimits()
        self._book = CircuitBook(self._limits)
        self._waiting: dict[bytes, socket.socket] = {}  # the end that came first
        self._splices: dict[bytes, Splice] = {}
        self._loop = asyncio.get_running_loop()
        self._toll = Toll(
            rate=self._limits.bytes_per_s, rate_per_payer=self._limits.bytes_per_s_per_peer
        )
        self._timer: asyncio.TimerHandle | None = None

    @property
    def n_circuits(self) -> int:
        """Circuits that stand or wait for an end."""
        return len(self._book)

    @property
    def nbytes(self) -> int:
        """Bytes carried so far, both ways."""
        return self._toll.nbytes

    # --- messages ------------------------------------------------------------------------------

    def on_open(self, peer: Peer, frame: Frame) -> None:
        """A member asks for a circuit."""
        message = frame.message
        if not isinstance(message, RelayOpen) or frame.request is None:
            return
        outcome = self._open(peer.peer_id, message.peer)
        if isinstance(outcome, ErrorCode):
            peer.reply(frame, Failure(code=outcome))
            return
        peer.reply(frame, RelayOpened(circuit=outcome.id, key=outcome.key))

    def on_declined(self, peer: Peer, frame: Frame) -> None:
        """The other end will not come."""
        message = frame.message
        if not isinstance(message, RelayDeclined):
            return
        circuit = self._book.get(message.circuit)
        if circuit is not None and circuit.target == peer.peer_id and circuit.is_half_open:
            self._end(circuit)

    def _open(self, origin: str, target: str) -> Circuit | ErrorCode:
        if not self.is_willing or target in (origin, self._peer_id):
            return ErrorCode.RELAY_REFUSED
        other = self._peers().get(target)
        if other is None:
            return ErrorCode.RELAY_NO_LINK
        circuit = self._book.open(origin, target, now=self._loop.time())
        if circuit is None:
            return ErrorCode.RELAY_FULL
        try:
            other.post(RelayOffer(circuit=circuit.id, key=circuit.key, origin=origin))
        except TransportError:
            self._book.remove(circuit)
            return ErrorCode.RELAY_NO_LINK
        if self._timer is None:
            self._sweep()
        return circuit

    # --- the door ------------------------------------------------------------------------------

    def key_of(self, key_id: bytes) -> bytes | None:
        """The key of a circuit that still waits for an end."""
        circuit = self._book.get(key_id)
        return circuit.key if circuit is not None and circuit.is_half_open else None

    async def enter(
        self, connection: socket.socket, key_id: bytes, source: tuple[str, int]
    ) -> bool:
        """One end of a circuit has come; what it says before the other comes waits for that."""
        circuit = self._book.get(key_id)
        if circuit is None or not circuit.is_half_open:
            connection.close()
            return False
        circuit.n_ends += 1
        first = self._waiting.pop(circuit.id, None)
        if first is None:
            self._waiting[circuit.id] = connection
            return True
        self._splices[circuit.id] = Splice(
            first,
            connection,
            toll=self._toll,
            payer=circuit.origin,
            on_end=lambda: self._end(circuit),
        )
        ends = {"origin": circuit.origin[-8:], "target": circuit.target[-8:]}
        logger.info("relaying", extra=ends)
        return True

    # --- ends ----------------------------------------------------------------------------------

    def drop(self, peer_id: str) -> None:
        """End the circuits of a peer that is no member any more."""
        for circuit in self._book:
            if peer_id in (circuit.origin, circuit.target):
                self._end(circuit)

    def close(self) -> None:
        """End every circuit."""
        self.is_willing = False
        for circuit in self._book:
            self._end(circuit)
        self._toll.close()
        if self._timer is not None:
            self._timer.cancel()

    def _end(self, circuit: Circuit) -> None:
        self._book.remove(circuit)
        waiting = self._waiting.pop(circuit.id, None)
        if waiting is not None:
            waiting.close()
        splice = self._splices.pop(circuit.id, None)
        if splice is not None:
            splice.close()
        if not self._book.n_of(circuit.origin):
            self._toll.forget_payer(circuit.origin)

    def _sweep(self) -> None:
        """End what is overdue, as long as there is something to look after."""
        self._timer = None
        now = self._loop.time()
        for circuit in self._book.overdue(now=now):
            self._end(circuit)
        for splice in list(self._splices.values()):
            limit_s = self._limits.linger_s if splice.is_ending else self._limits.idle_s
            if now >= splice.moved_at + limit_s:
                splice.close()
        if len(self._book):
            limits = self._limits
            pause_s = min(limits.half_open_s, limits.idle_s, limits.linger_s) / 4
            self._timer = self._loop.call_later(min(pause_s, _MAX_SWEEP_S), self._sweep)
