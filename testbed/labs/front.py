"""The front of one lab of plans, each of its points measured, as a picture.

The nodes of `plan`'s lab N start, and every plan that `covey plan` thinks worth having is pinned
and measured (of a long front some, evenly over it). The picture shows what was predicted right
before, and what came.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import Row

from covey.cli.plan_plot import draw, measured_points
from testbed.cases import CASES, add_case_option, source_of
from testbed.figures import Figures, Tried, prediction_rows
from testbed.fleet import Fleet, named, running_fleet
from testbed.measuring import chosen, predicted_and_measured
from testbed.plans import shape, text

CASE = 9  # four unlike devices on wifi
MAX_POINTS = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which lab, and where the picture goes."""
    add_case_option(parser, "--case", default=CASE, help=f"the lab of `plan`; {CASE} by default")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="an .svg, .png or .html")
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="JSON for `covey plan MODEL --measured FILE`"
    )


def measure(folder: Path, options: argparse.Namespace) -> Sequence[Row]:
    """Measure the points, and draw them."""
    case = CASES[options.case - 1]
    print(case.name, flush=True)
    source, name = source_of(case.model)
    with running_fleet(named(case.members), source, name, folder) as fleet:
        fleet.settle()
        chosen(fleet)  # which nothing changes any more
        facts = fleet.askers[fleet.founder].plan()
        kept = spread(facts["points"], MAX_POINTS)
        facts["points"] = [{**point, "n": n} for n, point in enumerate(kept, start=1)]
        tried = [_point(fleet, case.name, point) for point in facts["points"]]
    entries = [
        _entry(point, each.measured) for point, each in zip(facts["points"], tried, strict=True)
    ]
    single = facts["single"]  # as a rule one of the points, and then it is to be where that one is
    facts["single"] = next(
        (point for point in facts["points"] if single and shape(point) == shape(single)), single
    )
    if options.save is not None:
        options.save.write_text(json.dumps(entries))
    if options.plot is not None:
        draw(facts, options.plot, measured_points(entries, "measured"))
    return prediction_rows(tried)


def spread(points: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many of the points, evenly over them, the chosen one always among them."""
    if len(points) <= most:
        return list(points)
    every = (len(points) - 1) / (most - 1)
    kept = {round(idx * every) for idx in range(most)}
    wanted = next(idx for idx, point in enumerate(points) if point["is_chosen"])
    if wanted not in kept:
        inner = kept - {0, len(points) - 1}
        kept ^= {wanted, min(inner, key=lambda idx: abs(idx - wanted))}
    return [points[idx] for idx in sorted(kept)]


def _point(fleet: Fleet, lab: str, point: dict[str, Any]) -> Tried:
    """Measure a point; its figures become those that were predicted right before."""
    predicted, measured = predicted_and_measured(fleet, point)
    point |= {
        "ttft_s": predicted.ttft_s,
        "tpot_s": predicted.tpot_s,
        "throughput_tok_per_s": predicted.tokens_per_s,
    }
    found = Tried(
        lab=lab,
        plan=text(point),
        rules=(str(point["n"]),),
        predicted=predicted,
        measured=measured,
    )
    print(f"  {found.told()}", flush=True)
    return found


def _entry(point: dict[str, Any], measured: Figures) -> dict[str, object]:
    return {
        "label": str(point["n"]),
        "ttft_s": measured.ttft_s,
        "tpot_s": measured.tpot_s,
        "throughput_tok_per_s": measured.tokens_per_s,
    }
