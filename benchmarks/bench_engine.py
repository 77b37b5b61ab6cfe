"""How fast the engine is, side by side with llama.cpp and with the memory: issue 3's table.

    make bench-engine [MODEL=1b]
    python -m benchmarks.bench_engine [--model smollm2|1b] [--rounds N] [--only PATTERN]

At first use it builds llama.cpp twice, for this CPU and for AVX2, and requantises or writes the
models; all of that stays in the user's cache. Needs an idle machine of two cores or more. A figure
that misses its target is printed like any other; one that cannot be measured is named, and the
exit status is 1.
"""

from __future__ import annotations

import argparse
import fnmatch
import subprocess
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType

from rich.console import Console

from covey.errors import CoveyError
from covey.node.model.resolve import resolve_model

from . import figures
from .accuracy import accuracy
from .contest import ContestantFailed
from .installs import CannotBuild
from .lab import Lab
from .llama_cpp import FORMATS, ensure_build, requantized
from .nodes import memory, pipeline
from .rows import report
from .synthetic import SHAPES, synthetic

Figure = Callable[[Lab], None]
FIGURES: Mapping[str, Mapping[str, Figure]] = MappingProxyType(
    {
        "smollm2": {
            "decode": figures.decode,
            "depth": figures.depth,
            "prefill": figures.prefill,
            "batch": figures.batch,
            "avx2": figures.avx2,
            "burner": figures.burner,
            "pipeline": pipeline,
            "memory": memory,
            "accuracy": accuracy,
        },
        "1b": {"decode": figures.decode, "prefill": figures.prefill},
    }
)
STEPS = {"smollm2": 32, "1b": 8}
ROUNDS = {"smollm2": 5, "1b": 5}


def _lab(model: str, rounds: int) -> Lab:
    console = Console(stderr=True)
    site = ensure_build("native", console.print)
    if model == "1b":
        files = {
            kind: synthetic(SHAPES["llama-3.2-1b"], kind, console.print)
            for kind in ("Q4_K", "Q8_0")
        }
    else:
        shipped = resolve_model(model)
        files = {"Q4_1": shipped} | {kind: requantized(shipped, kind, site) for kind in FORMATS}
    return Lab(model, files, rounds, STEPS[model], console)


def _measure(lab: Lab, name: str, figure: Figure) -> None:
    """One figure; if it breaks, the others are measured all the same."""
    try:
        figure(lab)
    except (
        *(CannotBuild, ContestantFailed, CoveyError),
        *(OSError, ValueError, subprocess.SubprocessError),
    ) as error:
        lab.failures.append((name, str(error)))


def main() -> None:
    """Measure, print, and say what could not be measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=FIGURES, default="smollm2")
    parser.add_argument("--rounds", type=int, help="5 by default")
    parser.add_argument("--only", default="*", help=f"of {', '.join(FIGURES['smollm2'])}; or d*")
    options = parser.parse_args()
    rounds = options.rounds or ROUNDS[options.model]
    chosen = {
        name: figure
        for name, figure in FIGURES[options.model].items()
        if fnmatch.fnmatch(name, options.only)
    }
    if not chosen or rounds < 1:
        parser.error(f"nothing to measure: {options.only}, {rounds} rounds")
    lab = _lab(options.model, rounds)
    for name, figure in chosen.items():
        _measure(lab, name, figure)
    for name, why in lab.failures:
        print(f"NOT MEASURED  {name}: {why}")
    report(lab.rows)
    sys.exit(1 if lab.failures else 0)


if __name__ == "__main__":
    main()
