"""A head-only node as a child process: it tokenises and samples here and holds no blocks.

It is started when there is an invite, or a saved swarm and no running node, and stopped with the
client that started it (also when the interpreter ends without a `close`, or is killed). Blocking
throughout; the async client calls it in a thread.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import IO

from .errors import NoLocalNode
from .local import LocalNode, find_local_node

START_TIMEOUT_S = 60.0  # on a Raspberry Pi importing torch alone takes ten
STOP_GRACE_S = 10.0  # a node says goodbye to its peers; then it is killed
POLL_S = 0.05
MAX_STDERR_BYTES = 4096  # of its end, to find the last line


def join_command(home: Path, invite: str | None, *, is_home_ours: bool) -> list[str]:
    """The command line of a head-only node; without an invite it uses the swarm in `home`.

    It stops when this process is gone, and then also removes a home that was made for it.
    """
    return [
        *(sys.executable, "-m", "covey.cli", "join"),
        *(() if invite is None else (invite,)),
        *("--max-blocks", "0", "--home", str(home)),
        *("--port", "0", "--api-port", "0", "--json"),
        *("--exit-with", str(os.getpid())),
        *(("--discard-home",) if is_home_ours else ()),
    ]


class HeadOnlyNode:
    """A child process, from its construction to `close`; its client is the only one to use it."""

    def __init__(self, *, invite: str | None, home: Path | None) -> None:
        """Start it.

        Args:
            invite: the swarm to join; None for the one saved in `home`.
            home: where its state is; None for a temporary folder that goes with it.
        """
        folder = None
        if home is None:
            folder = tempfile.TemporaryDirectory(prefix="covey-head-")  # mode 0700
            home = Path(folder.name)
        self._home = home
        self._stderr = tempfile.TemporaryFile()  # a pipe would fill up  # noqa: SIM115
        self._process = subprocess.Popen(
            join_command(home, invite, is_home_ours=folder is not None),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            process_group=0,  # Ctrl-C is for the program that uses the client
        )
        self._finalizer = weakref.finalize(self, _stop, self._process, self._stderr, folder)

    def wait(self, timeout_s: float, cancelled: threading.Event) -> LocalNode:
        """Wait until its API answers; the caller still closes it, whatever happens.

        Args:
            cancelled: set by another thread to give up.

        Raises:
            NoLocalNode: it ended, or was not ready in time, or the wait was cancelled.
        """
        give_up_at = time.monotonic() + timeout_s
        while True:
            if (node := find_local_node(self._home)) is not None:
                return node
            if self._process.poll() is not None:
                raise NoLocalNode(f"the head-only node could not start: {self._last_line()}")
            if time.monotonic() >= give_up_at:
                raise NoLocalNode(
                    f"the head-only node was not ready within {timeout_s:g} s: {self._last_line()}"
                )
            if cancelled.wait(POLL_S):
                raise NoLocalNode("the start of the head-only node was cancelled")

    def close(self) -> None:
        """Stop it, at the latest by force after `STOP_GRACE_S`; again does nothing."""
        self._finalizer()

    def _last_line(self) -> str:
        # The child shares the file offset: back to the end, or it would write over its own lines.
        end = self._stderr.seek(0, 2)
        self._stderr.seek(max(0, end - MAX_STDERR_BYTES))
        lines = self._stderr.read().decode(errors="replace").split("\n")
        said = [shown for line in lines if (shown := _printable(line))]
        return said[-1] if said else "it said nothing"


def _printable(line: str) -> str:
    return "".join(char for char in line.strip() if char.isprintable())


def _stop(
    process: subprocess.Popen[bytes],
    stderr: IO[bytes],
    folder: tempfile.TemporaryDirectory[str] | None,
) -> None:
    process.terminate()
    try:
        process.wait(STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    stderr.close()
    if folder is not None:
        folder.cleanup()
