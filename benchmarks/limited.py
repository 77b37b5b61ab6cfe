"""Processes that are held to so much memory and answer lines of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from testbed.devices import MemoryLimit, memory_limit


class NodeFailed(RuntimeError):
    """A process ended before its time, or could not be held to its memory; the text says how."""


class Node:
    """A process that answers lines."""

    def __init__(self, process: subprocess.Popen[str], name: str) -> None:
        self.process = process
        self._name = name

    def ask(self, **command: object) -> Any:
        """What it answers. Raises NodeFailed."""
        stdin = self.process.stdin
        if stdin is not None:
            with suppress(BrokenPipeError):  # it has ended, as its answer says
                stdin.write(json.dumps(command) + "\n")
                stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """What it says next. Raises NodeFailed."""
        line = self.process.stdout.readline() if self.process.stdout is not None else ""
        if not line:
            raise NodeFailed(f"{self._name} has ended: exit status {self.process.wait()}")
        return json.loads(line)


@contextmanager
def running(name: str, limit_bytes: int, arguments: Sequence[str]) -> Iterator[Node]:
    """A module, with its arguments, in a process that has so much memory, until the end.

    Raises:
        NodeFailed: nothing here can hold it to that.
    """
    group = f"covey-bench-{os.getpid()}-{name.split()[0].lower()}"
    with memory_limit(group, limit_bytes) as (kind, join):
        if kind is MemoryLimit.ADDRESS_SPACE:
            raise NodeFailed("no control group for memory can be made here: it needs root")
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            preexec_fn=join,
        )
        try:
            yield Node(process, name)
        finally:
            process.kill()
            process.communicate()
