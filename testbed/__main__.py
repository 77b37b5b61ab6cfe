"""`python -m testbed`: run the lab's scenarios and print what was measured.

The last line is one JSON object. A missed target is printed and counted, and does not change the
exit status; only a failure to measure does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.rows import Row, report

from covey.errors import CoveyError

from . import namespaces, two_hosts


def main() -> int:
    """Enter the lab, run, report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m testbed", description=__doc__)
    parser.add_argument("--mdns", choices=("on", "off", "both"), default="both")
    arguments = parser.parse_args()
    try:
        if not namespaces.is_inside():
            namespaces.check_available()
            return namespaces.enter("testbed", sys.argv[1:])
        rows = _run(namespaces.prepare(), arguments.mdns)
    except (namespaces.LabUnavailable, CoveyError, subprocess.SubprocessError) as error:
        print(f"the lab could not measure: {error}", file=sys.stderr)
        return 1
    report(rows)
    return 0


def _run(folder: Path, mdns: str) -> list[Row]:
    rows: list[Row] = []
    for choice in ("on", "off"):
        if mdns in (choice, "both"):
            measured = two_hosts.measure(folder / f"mdns-{choice}", mdns=choice == "on")
            rows += [replace(row, figure=f"{row.figure}, mDNS {choice}") for row in measured]
    return rows


if __name__ == "__main__":
    sys.exit(main())
