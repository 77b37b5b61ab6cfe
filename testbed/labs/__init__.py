"""The labs that `python -m testbed NAME` runs: one module each, entered in `LABS`.

A module says what it is in its docstring, takes its options from the command line and measures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from benchmarks.rows import Row

from . import front, groups, links, nat, paths, plan, scenario, swarm, tpi, two_hosts


class LabModule(Protocol):
    """What a lab's module has."""

    __doc__: str | None

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Declare its options."""

    def measure(self, folder: Path, options: argparse.Namespace) -> Sequence[Row]:
        """Run it inside the namespaces.

        Args:
            folder: in memory and gone with the lab; for what need not outlive it.
            options: what was asked for.

        Raises:
            LabUnavailable, LabBroken, CoveyError, SubprocessError: it could not be measured.
        """


LABS: MappingProxyType[str, LabModule] = MappingProxyType(
    {
        "two-hosts": two_hosts,
        "links": links,
        "nat": nat,
        "paths": paths,
        "plan": plan,
        "front": front,
        "groups": groups,
        "scenario": scenario,
        "swarm": swarm,
        "tpi": tpi,
    }
)
