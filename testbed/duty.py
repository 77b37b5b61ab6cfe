"""A program of others' held to a share of this machine's speed, by stopping it most of the time.

What a limit on CPU time would not do: whoever waits cannot save up (`testbed.devices`). Our own
engine keeps to its share by itself.
"""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

CYCLE_S = 0.02  # long beside what a signal costs, short beside a token


@contextmanager
def at_speed(process: subprocess.Popen[str], share: float) -> Iterator[None]:
    """Let a process run for that share of the time, until the block ends."""
    if share >= 1.0:
        yield
        return
    stop = threading.Event()

    def govern() -> None:
        next_at = time.monotonic()
        while not stop.is_set() and process.poll() is None:
            process.send_signal(signal.SIGCONT)
            time.sleep(share * CYCLE_S)
            process.send_signal(signal.SIGSTOP)
            next_at += CYCLE_S
            time.sleep(max(0.0, next_at - time.monotonic()))

    governor = threading.Thread(target=govern, daemon=True)
    governor.start()
    try:
        yield
    finally:
        stop.set()
        governor.join()
        process.send_signal(signal.SIGCONT)
