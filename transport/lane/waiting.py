"""Waiting for lanes: look again and again for a short while, then sleep until something comes.

Between two messages of an all-reduce lie tens of microseconds, and waking a sleeping thread costs
as much again. So a waiting thread looks for `SPIN_S` first, and gives way to whoever wants its
core after each look (D6): beside another program it costs that program one look in each turn.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from .lane import Lane

# Measured with two processes on two cores, 4 KB there and back on TLS: without looking 106 us, with
# 20 us of it 23, with 50 us 20, with 200 us 20 (`benchmarks/bench_allreduce.py --spin`).
SPIN_S = 50e-6

L = TypeVar("L", bound=Lane)

_give_way: Callable[[], object] = getattr(os, "sched_yield", lambda: time.sleep(0))


class Readiness:
    """Tells when one of some files may be read; made once for files that are waited for often."""

    def __init__(self, files: Sequence[int], *, spin_s: float = SPIN_S) -> None:
        self._files = tuple(files)
        self._spin_s = spin_s
        self._poll: select.poll | None = None
        if hasattr(select, "poll"):  # all but Windows
            self._poll = select.poll()
            for file in self._files:
                self._poll.register(file, select.POLLIN)

    def wait(self, timeout_s: float) -> list[int]:
        """The files that are ready, or have failed; none if `timeout_s` goes by first."""
        ready = self._look(0.0)
        if ready or timeout_s <= 0:
            return ready
        started = now = time.perf_counter()
        spins_until = started + min(self._spin_s, timeout_s)
        while now < spins_until:
            _give_way()
            ready = self._look(0.0)
            if ready:
                return ready
            now = time.perf_counter()
        return self._look(max(0.0, timeout_s - (now - started)))

    def _look(self, timeout_s: float) -> list[int]:
        if self._poll is None:
            return list(select.select(self._files, (), (), timeout_s)[0])
        # Rounded up: a wait of less than a millisecond must not become none at all.
        found = self._poll.poll(-int(-timeout_s * 1000 // 1))
        return [file for file, _ in found]


def wait_room(file: int, *, also_readable: bool, timeout_s: float) -> bool:
    """Until a file takes more bytes, or perhaps has some; whether it has, or has failed."""
    reading = (file,) if also_readable else ()
    if not hasattr(select, "poll"):
        return bool(select.select(reading, (file,), (), timeout_s)[0])
    poll = select.poll()
    poll.register(file, select.POLLOUT | (select.POLLIN if also_readable else 0))
    return any(events & ~select.POLLOUT for _, events in poll.poll(timeout_s * 1000))


def wait_any(lanes: Sequence[L], timeout_s: float) -> list[L]:
    """The lanes whose `poll` may have something now, or raises; none if the time goes by first.

    What a lane has in memory already makes no file readable: `poll` each of them before.
    """
    if not lanes:
        return []
    by_file = {lane.fileno(): lane for lane in lanes}
    return [by_file[file] for file in Readiness(tuple(by_file)).wait(timeout_s)]
