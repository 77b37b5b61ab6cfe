"""How fast a relay carries, and whose turn it is when it may carry no faster.

Sans-IO. Two kinds of token buckets, one for the whole relay and one for each member that pays, and
one queue: who finds a bucket empty goes to its end, and moves one quantum when it comes to the
front again. So a greedy circuit gets as many quanta as a modest one that waits beside it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

MAX_QUANTUM_BYTES = 128 << 10
_MIN_QUANTUM_BYTES = 16 << 10
_QUANTUM_S = 0.005
_BURST_S = 0.05

Flow = TypeVar("Flow", bound=Hashable)


@dataclass(slots=True)
class TokenBucket:
    """What may be spent now; a little may be owed."""

    rate: float  # per second
    burst: float
    balance: float
    counted_at: float

    @classmethod
    def of_bytes(cls, rate: float, *, now: float) -> TokenBucket:
        """A full bucket for bytes per second."""
        burst = max(rate * _BURST_S, _MIN_QUANTUM_BYTES)
        return cls(rate, burst, burst, now)

    def refill(self, *, now: float) -> float:
        """The balance at `now`; positive if something may be spent."""
        self.balance = min(self.burst, self.balance + (now - self.counted_at) * self.rate)
        self.counted_at = now
        return self.balance

    def wait_s(self) -> float:
        """Seconds from the last count until something may be spent."""
        # One more than nothing, so that who waits this long does not come a rounding too early.
        return max(0.0, (1.0 - self.balance) / self.rate)


class Shaper(Generic[Flow]):
    """Who may move a quantum of bytes now, and who waits."""

    def __init__(self, *, rate: float, rate_per_payer: float, now: float) -> None:
        self.quantum = int(min(max(rate * _QUANTUM_S, _MIN_QUANTUM_BYTES), MAX_QUANTUM_BYTES))
        self._rate_per_payer = rate_per_payer
        self._total = TokenBucket.of_bytes(rate, now=now)
        self._payers: dict[str, TokenBucket] = {}
        self._waiting: OrderedDict[Flow, str] = OrderedDict()

    def ask(self, flow: Flow, payer: str, *, now: float) -> bool:
        """Whether `flow` may move one quantum at once; if not it is in the queue now."""
        # It must not overtake one who waits and could go.
        if self._is_open(payer, now) and self._front(now) is None:
            return True
        self._waiting.setdefault(flow, payer)
        return False

    def moved(self, payer: str, nbytes: int, *, now: float) -> None:
        """Charge for what was moved."""
        self._total.balance -= nbytes
        self._payer(payer, now).balance -= nbytes

    def pop(self, *, now: float) -> Flow | None:
        """The first in the queue that may move one quantum now."""
        flow = self._front(now)
        if flow is not None:
            del self._waiting[flow]
        return flow

    def next_at(self, *, now: float) -> float | None:
        """When `pop` may give somebody; None if nobody waits."""
        if not self._waiting:
            return None
        self._total.refill(now=now)
        payers = set(self._waiting.values())
        return now + max(self._total.wait_s(), min(self._wait_s(payer, now) for payer in payers))

    def forget_flow(self, flow: Flow) -> None:
        """It has ended."""
        self._waiting.pop(flow, None)

    def forget_payer(self, payer: str, *, now: float) -> None:
        """It has no circuit left; a debt of its is kept until it is paid."""
        bucket = self._payers.get(payer)
        if bucket is not None and bucket.refill(now=now) >= bucket.burst:
            del self._payers[payer]

    def _front(self, now: float) -> Flow | None:
        if not self._waiting or self._total.refill(now=now) <= 0:
            return None
        return next(
            (flow for flow, payer in self._waiting.items() if self._is_open(payer, now)), None
        )

    def _is_open(self, payer: str, now: float) -> bool:
        return self._total.refill(now=now) > 0 and self._payer(payer, now).refill(now=now) > 0

    def _wait_s(self, payer: str, now: float) -> float:
        bucket = self._payer(payer, now)
        bucket.refill(now=now)
        return bucket.wait_s()

    def _payer(self, payer: str, now: float) -> TokenBucket:
        bucket = self._payers.get(payer)
        if bucket is None:
            bucket = self._payers[payer] = TokenBucket.of_bytes(self._rate_per_payer, now=now)
        return bucket
