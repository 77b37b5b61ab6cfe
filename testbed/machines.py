"""Hosts of a lab with a home of their own, and the commands that a person types there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from covey.cli.child import NodeProcess

from .namespaces import Namespace

COMMAND_S = 120.0


@dataclass(frozen=True, slots=True)
class Machine:
    """A host, and what one node on it has of its own: folders, and its name among members."""

    host: Namespace
    folder: Path
    has_own_caches: bool = True  # else this machine's: what is packed there is packed already
    own_name: str | None = None  # where several nodes share a host
    own_environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What other members see."""
        return self.own_name or self.host.name

    @property
    def home(self) -> Path:
        """Where its node keeps its state."""
        return self.folder / "home"

    def environment(self) -> dict[str, str]:
        """Ours, but with its own caches, if it has some, and what else is its own."""
        folders = {"HOME": self.folder, "XDG_CACHE_HOME": self.folder / "cache"}
        caches = {name: str(folder) for name, folder in folders.items()}
        return {**os.environ, **(caches if self.has_own_caches else {}), **self.own_environment}

    def start(self, *arguments: str, max_blocks: int | None = None) -> NodeProcess:
        """Run a node here, as `covey ARGUMENTS`."""
        cap = () if max_blocks is None else ("--max-blocks", str(max_blocks))
        return NodeProcess(
            [*arguments, "--name", self.name, *cap],
            home=self.home,
            prefix=self.host.prefix,
            environment=self.environment(),
        )

    def covey(self, *arguments: str) -> str:
        """What a command prints here; raises CalledProcessError if it fails."""
        done = subprocess.run(
            [*self.host.prefix, sys.executable, "-m", "covey.cli", *arguments],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=COMMAND_S,
            env={**self.environment(), "COVEY_HOME": str(self.home), "OMP_NUM_THREADS": "1"},
        )
        return done.stdout

    def facts(self, *arguments: str) -> dict[str, Any]:
        """What a command says with --json."""
        facts: dict[str, Any] = json.loads(self.covey(*arguments, "--json"))
        return facts
