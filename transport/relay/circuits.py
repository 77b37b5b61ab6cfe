"""Which circuits a relay has, and whether it will have one more. Sans-IO.

A circuit is half open until both its ends have come. Memory is bounded by `RelayLimits`: a member
that floods a relay with requests is refused, and keeps nobody else from being served.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .shaping import TokenBucket

CIRCUIT_ID_BYTES = 16
CIRCUIT_KEY_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayLimits:
    """What a relay gives at most, in all and to each member that asks."""

    circuits: int = 64
    circuits_per_peer: int = 16
    half_open: int = 32
    half_open_per_peer: int = 8
    opens_per_s: float = 4.0  # of one member, after a burst of as many as it may have
    bytes_per_s: float = 500e6  # half a core; slower networks limit themselves
    bytes_per_s_per_peer: float = 250e6
    half_open_s: float = 4.0  # an end that waits longer for the other is dropped
    idle_s: float = 90.0  # links have a heartbeat every 20 s
    linger_s: float = 5.0  # once one end has ended, without progress


@dataclass(slots=True)
class Circuit:
    """One way from `origin`, who asked for it and pays, to `target`."""

    id: bytes
    key: bytes
    origin: str
    target: str
    opened_at: float
    n_ends: int = 0

    @property
    def is_half_open(self) -> bool:
        """Whether an end is still to come."""
        return self.n_ends < 2


class CircuitBook:
    """The circuits of one relay."""

    def __init__(
        self, limits: RelayLimits, *, random_bytes: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._limits = limits
        self._random_bytes = random_bytes
        self._circuits: dict[bytes, Circuit] = {}
        self._opens: dict[str, TokenBucket] = {}  # of members that opened some of late

    def __len__(self) -> int:
        """How many there are."""
        return len(self._circuits)

    def __iter__(self) -> Iterator[Circuit]:
        """All of them; the book may change meanwhile."""
        return iter(list(self._circuits.values()))

    def open(self, origin: str, target: str, *, now: float) -> Circuit | None:
        """A new circuit; None if that would be beyond a limit."""
        half_open = [circuit for circuit in self if circuit.is_half_open]
        if (
            len(self) >= self._limits.circuits
            or self.n_of(origin) >= self._limits.circuits_per_peer
            or len(half_open) >= self._limits.half_open
            or sum(circuit.origin == origin for circuit in half_open)
            >= self._limits.half_open_per_peer
        ):
            return None
        if not self._may_open(origin, now):
            return None
        circuit = Circuit(
            id=self._random_bytes(CIRCUIT_ID_BYTES),
            key=self._random_bytes(CIRCUIT_KEY_BYTES),
            origin=origin,
            target=target,
            opened_at=now,
        )
        self._circuits[circuit.id] = circuit
        return circuit

    def get(self, circuit_id: bytes) -> Circuit | None:
        """The circuit of that id."""
        return self._circuits.get(circuit_id)

    def remove(self, circuit: Circuit) -> None:
        """It is over."""
        self._circuits.pop(circuit.id, None)

    def _may_open(self, origin: str, now: float) -> bool:
        burst = float(self._limits.circuits_per_peer)
        bucket = self._opens.pop(origin, None)
        if bucket is None:
            bucket = TokenBucket(self._limits.opens_per_s, burst, burst, now)
        self._opens = {
            member: other
            for member, other in self._opens.items()
            if other.refill(now=now) < other.burst
        }
        self._opens[origin] = bucket
        if bucket.refill(now=now) < 1.0:
            return False
        bucket.balance -= 1.0
        return True

    def n_of(self, origin: str) -> int:
        """How many that member asked for."""
        return sum(circuit.origin == origin for circuit in self._circuits.values())

    def overdue(self, *, now: float) -> list[Circuit]:
        """Those whose other end has not come in time."""
        return [
            circuit
            for circuit in self
            if circuit.is_half_open and now >= circuit.opened_at + self._limits.half_open_s
        ]
