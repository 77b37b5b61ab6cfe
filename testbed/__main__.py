"""`python -m testbed LAB`: run one of the labs and print what was measured.

The last line is one JSON object. A missed target is printed and counted, and does not change the
exit status; only a failure to measure does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.rows import report

from covey.errors import CoveyError

from . import namespaces
from .labs import LABS, LabModule

DEFAULT = "two-hosts"


def main(argv: Sequence[str]) -> int:
    """Enter the lab, run, report; returns the exit status."""
    is_named = bool(argv) and argv[0] in (*LABS, "-h", "--help")
    arguments = _parser().parse_args(argv if is_named else [DEFAULT, *argv])
    lab: LabModule = LABS[arguments.lab]
    try:
        if not namespaces.is_inside():
            namespaces.check_available()
            return namespaces.enter("testbed", argv)
        rows = lab.measure(namespaces.prepare(), arguments)
    except namespaces.PartlyMeasured as error:
        print(f"could not be measured: {error}", file=sys.stderr)
        report(error.rows)
        return 1
    except namespaces.LabBroken as error:
        print(f"the lab is broken: {error}", file=sys.stderr)
        return 1
    except (namespaces.LabUnavailable, CoveyError, subprocess.SubprocessError) as error:
        print(f"the lab could not measure: {error}", file=sys.stderr)
        return 1
    report(rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m testbed", description=__doc__)
    labs = parser.add_subparsers(dest="lab", required=True, metavar="LAB")
    for name, lab in LABS.items():
        summary = (lab.__doc__ or "").partition("\n")[0]
        lab.add_options(labs.add_parser(name, help=summary, description=lab.__doc__))
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
