"""Run a scenario from a file: a Python module with a `SCENARIO`."""

from __future__ import annotations

import argparse
import runpy
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import Row

from testbed.scenario import Scenario, run


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which file."""
    parser.add_argument("scenario", type=load, metavar="FILE")
    parser.add_argument("--capture", action="store_true", help="record packets, kept if it fails")


def measure(folder: Path, options: argparse.Namespace) -> Sequence[Row]:
    """Run it once."""
    return run(options.scenario, folder, has_captures=options.capture)


def load(file: str) -> Scenario:
    """The scenario in a file, which is executed. Raises ArgumentTypeError if there is none."""
    if not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"{file} is not there")
    scenario = runpy.run_path(file).get("SCENARIO")
    if not isinstance(scenario, Scenario):
        raise argparse.ArgumentTypeError(f"{file} has no SCENARIO")
    return scenario
