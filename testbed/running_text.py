"""A text that is being generated on a lab's host, seen from where it is asked for."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from covey.errors import CoveyError

from .machines import Machine

LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class Path:
    """What carried a link from some moment on (`time.monotonic`)."""

    at: float
    kind: str


@dataclass(slots=True)
class Story:
    """What came so far, and when."""

    text: str = ""
    came_at: list[float] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    n_tokens: int = 0
    why: str = ""  # it did not end well
    is_over: bool = False

    def gaps_s(self) -> list[float]:
        """The time between each two pieces."""
        return [after - before for before, after in pairwise(self.came_at)]

    def path_after(self, at: float, kinds: frozenset[str]) -> Path | None:
        """The first path of one of these kinds that was seen after a moment."""
        return next((path for path in self.paths if path.at > at and path.kind in kinds), None)


class RunningText:
    """A process of `testbed.asking` on a machine with a node; `with` ends it."""

    def __init__(self, machine: Machine, wish: Mapping[str, object], *, watched: str) -> None:
        """Begin to ask.

        Args:
            machine: where, and whose node.
            wish: keywords of `Client.generate`.
            watched: name of the member whose link is watched.
        """
        self.story = Story()
        self._process = subprocess.Popen(
            [
                *(*machine.host.prefix, sys.executable, "-m", "testbed.asking"),
                *(str(machine.home), json.dumps(wish), watched),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env={**machine.environment(), "OMP_NUM_THREADS": "1"},
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> RunningText:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def wait_for_pieces(self, n_pieces: int, timeout_s: float) -> None:
        """Until so many have come. Raises CoveyError if the text ends before, or takes longer."""
        deadline = time.monotonic() + timeout_s
        while len(self.story.came_at) < n_pieces:
            if self.story.is_over:
                raise CoveyError(f"the text ended early: {self.story.why or 'it was too short'}")
            if time.monotonic() > deadline:
                raise CoveyError(f"the text does not come within {timeout_s:g} s")
            time.sleep(LOOK_S)

    def wait(self, timeout_s: float) -> Story:
        """All of it; a text that has not ended by then has `why` set."""
        deadline = time.monotonic() + timeout_s
        while not self.story.is_over and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        if not self.story.is_over:
            self.story.why = f"no end within {timeout_s:g} s"
        return self.story

    def _read(self) -> None:
        story = self.story
        for line in self._process.stdout or ():
            event = json.loads(line)
            match event["said"]:
                case "piece":
                    story.text += event["text"]
                    story.came_at.append(event["at"])
                case "path":
                    story.paths.append(Path(event["at"], event["kind"]))
                case _:
                    story.n_tokens, story.why = event["n_tokens"], event["why"]
                    story.is_over = True
        if not story.is_over:
            story.why, story.is_over = "the client died; see its words above", True
