"""Makes a fast machine behave like a slow one, for the testbed's device classes.

What a call took in CPU time it takes again as sleep, as often as the machine is to be slower. CPU
time and not wall time, so that nodes that share a machine slow down by their own work only.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_MOST_CREDIT_S = 0.05  # of having slept too long; more than a busy system makes one wait


class Pacer:
    """A context manager around each call: leaves it when a machine of `speed` would have.

    Args:
        speed: share of this machine's speed, above 0 and up to 1.
        cpu_clock: seconds of CPU time of the calling thread.
        clock: seconds, monotonic.
        sleep: for so many seconds.
    """

    def __init__(
        self,
        speed: float,
        *,
        cpu_clock: Callable[[], float] = time.thread_time,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not 0 < speed <= 1:
            raise ValueError(f"speed = {speed}: must be above 0 and at most 1")
        self._factor = 1 / speed - 1
        self._cpu_clock = cpu_clock
        self._clock = clock
        self._sleep = sleep
        self._began = 0.0
        self._owed_s = 0.0  # sleep that is due; sleeping too long is made good by later calls

    def __enter__(self) -> None:
        """A call begins."""
        self._began = self._cpu_clock()

    def __exit__(self, *_: object) -> None:
        """It ended: sleep."""
        self._owed_s += (self._cpu_clock() - self._began) * self._factor
        if self._owed_s <= 0:
            return
        before = self._clock()
        self._sleep(self._owed_s)
        self._owed_s = max(self._owed_s - (self._clock() - before), -_MOST_CREDIT_S)
