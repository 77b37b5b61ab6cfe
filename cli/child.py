"""A node as a child process: the same command a person would type, its first line, its end.

Knows no model and no plan. The node says goodbye by itself when this process is gone, however it
went, so nobody who starts one can leave it behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from covey.errors import CoveyError

START_S = 120.0  # a Raspberry Pi imports torch for half a minute
STOP_S = 20.0  # a node lets its generations finish for ten
POLL_S = 0.05


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block ends; for the main thread.

    A process that is started within it is in the hands of whoever will stop it before either is
    noticed; an exception out of the middle of a start would leave it behind.
    """
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda it, _: came.append(it))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for it in came:
            signal.raise_signal(it)


class NodeProcess:
    """One node, from its construction to `stop`; its home outlives it.

    `node.out` and `node.log` in its home are what it printed and logged.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        home: Path,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it; does not wait.

        Args:
            arguments: of `covey`, beginning with `up` or `join`; it is told `--home` besides.
            prefix: a program that becomes this one, like `ip netns exec NAME`.
            environment: instead of this process's own.
        """
        home.mkdir(mode=0o700, exist_ok=True)
        self.home = home
        self._out_path, self._log_path = home / "node.out", home / "node.log"
        command = [
            *(*prefix, sys.executable, "-m", "covey.cli", *arguments),
            *("--home", str(home), "--json", "--verbose", "--exit-with", str(os.getpid())),
        ]
        with self._out_path.open("w") as out, self._log_path.open("a") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env={**(environment or os.environ), "OMP_NUM_THREADS": "1"},
                # Ctrl-C reaches this process only, which then stops its nodes in good order.
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        """Whether the process is there; it may not be up yet."""
        return self.process.poll() is None

    @property
    def facts(self) -> dict[str, Any]:
        """What it printed when it was up: invite, url, peer_id, home; waits for it."""
        self.wait_until_up()
        facts: dict[str, Any] = json.loads(self._out_path.read_text())
        return facts

    def wait_until_up(self) -> None:
        """Wait until it has printed its facts.

        Raises:
            CoveyError: it ended instead, or took longer than `START_S`.
        """
        wait_for(self._has_spoken, START_S, f"the node in {self.home} did not start")

    def stop(self) -> int:
        """Ask it to end, insist after `STOP_S`, and return its exit code; again does nothing."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """End it at once, as a power cut would."""
        self.process.kill()
        return self.process.wait()

    def log_tail(self, n_lines: int) -> list[str]:
        """The last lines that it logged."""
        return self._log_path.read_text(errors="replace").splitlines()[-n_lines:]

    def _has_spoken(self) -> bool:
        # In this order: what it said last is read after it ended.
        is_over = not self.is_running
        if self._out_path.read_text().endswith("\n"):
            return True
        if is_over:
            said = self.log_tail(1)
            raise CoveyError(f"a node ended at once: {said[0] if said else 'it said nothing'}")
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Look until `condition` holds.

    Raises:
        CoveyError: it did not within `timeout_s`; the text begins with `what`.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise CoveyError(f"{what} within {timeout_s:g} s")
        time.sleep(POLL_S)
