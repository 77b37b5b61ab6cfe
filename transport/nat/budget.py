"""How often somebody may ask: token buckets by name, with one for all together.

Sans-IO and bounded: a flood from many names fills neither memory nor the work that is done for
them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

MAX_TRACKED = 1024


@dataclass(frozen=True, slots=True)
class Rate:
    """So many at once, and so many a second in the long run."""

    burst: float
    per_s: float


class Budget:
    """What each name, and all of them, may still use."""

    def __init__(self, each: Rate, total: Rate) -> None:
        self._each = each
        self._total = total
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # left, counted at
        self._all: tuple[float, float] | None = None

    def take(self, name: str, *, now: float) -> bool:
        """Charge one use; False, and nothing charged, if `name` or all together have none left."""
        mine = _left(self._buckets.get(name), self._each, now)
        everyones = _left(self._all, self._total, now)
        if mine < 1.0 or everyones < 1.0:
            return False
        self._all = (everyones - 1.0, now)
        self._buckets[name] = (mine - 1.0, now)
        self._buckets.move_to_end(name)
        if len(self._buckets) > MAX_TRACKED:
            self._buckets.popitem(last=False)
        return True


def _left(bucket: tuple[float, float] | None, rate: Rate, now: float) -> float:
    if bucket is None:
        return rate.burst
    left, counted_at = bucket
    return min(rate.burst, left + max(0.0, now - counted_at) * rate.per_s)
