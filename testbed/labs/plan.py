"""Predicted and measured: plans of unlike devices on unlike links, ours and those of others' rules.

In each of twenty labs nodes start on emulated devices, measure themselves and their links, and
`covey plan` chooses. That plan is measured, and the plans that other systems' rules would make of
the same machines: an equal split, shares of memory (exo), shares of speed (Parallax). All are
applied as pins, so the figures that the node predicts for exactly these plans stand beside what
they do: time to first token of a prompt of 128 tokens, time per token of one session, tokens per
second of four. The first texts after a change of plan are thrown away.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.rows import Row

from covey.errors import CoveyError
from covey.node.catalog import open_model
from covey.node.engines import Engines
from covey.partition.cost import kv_bytes_per_block
from covey.partition.profile import ModelLayout, Workload
from testbed.artefacts import Artefacts
from testbed.cases import CASES, Case, add_case_option, source_of
from testbed.figures import Tried, prediction_rows, ratio_rows
from testbed.fleet import CONTEXT, SESSIONS, Fleet, Member, named, running_fleet
from testbed.measuring import chosen, predicted_and_measured
from testbed.namespaces import LabBroken, LabUnavailable, PartlyMeasured
from testbed.plans import Plan, chain, shape, text
from testbed.rules import (
    NoShare,
    equal_split,
    fewest_machines,
    memory_proportional,
    water_filling,
)

OURS = "chosen"
EQUAL, MEMORY, SPEED = "equal split", "shares of memory (exo)", "shares of speed (Parallax)"
FEWEST = "fewest machines (exo's own choice of them)"
RIVALS = (EQUAL, MEMORY, SPEED)
IDLE_LOAD = 0.5


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which labs."""
    parser.add_argument("--list", action="store_true", help="name the labs and run none")
    add_case_option(parser, "--only", action="append", help="run this one; may be repeated")
    parser.add_argument("--keep", action="store_true", help="keep the logs of all labs")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write all plans tried as JSON")


def measure(folder: Path, options: argparse.Namespace) -> Sequence[Row]:
    """Run the labs, each with a swarm of its own; Ctrl-C ends with what there is by then."""
    if options.list:
        for number, case in enumerate(CASES, 1):
            print(f"{number:3}  {case.name}")
        return []
    if (load := os.getloadavg()[0]) > IDLE_LOAD:
        print(f"this machine is busy with something else (load {load:.1f}): figures will be off")
    numbers = options.only or range(1, len(CASES) + 1)
    tried: list[Tried] = []
    failed: list[str] = []
    began_at = time.monotonic()
    with Artefacts("plan") as artefacts:
        try:
            for number in numbers:
                case = CASES[number - 1]
                print(f"[{time.monotonic() - began_at:5.0f} s] {number:2}  {case.name}", flush=True)
                try:
                    with artefacts.cell(f"{number}") as cell:
                        _run(case, cell.folder, tried)
                        cell.has_failed = options.keep
                except (
                    CoveyError,
                    LabBroken,
                    LabUnavailable,
                    subprocess.SubprocessError,
                ) as error:
                    print(f"      could not be measured: {error}", flush=True)
                    failed.append(f"lab {number}")
                if options.save is not None:
                    options.save.write_text(json.dumps([saved(each) for each in tried]))
        except KeyboardInterrupt:
            failed.append("what came after an interruption")
    if not tried:
        raise CoveyError("no lab could be measured")
    if failed:
        raise PartlyMeasured(rows(tried, failed), failed)
    return rows(tried)


def saved(tried: Tried) -> dict[str, object]:
    """One plan for `--save`: also an entry for `covey plan --plot FILE --measured FILE`."""
    return {
        "label": tried.rules[0],
        "ttft_s": tried.measured.ttft_s,
        "tpot_s": tried.measured.tpot_s,
        "throughput_tok_per_s": tried.measured.tokens_per_s,
        "lab": tried.lab,
        "plan": tried.plan,
        "rules": list(tried.rules),
        "predicted": asdict(tried.predicted),
    }


def rows(tried: Sequence[Tried], failed: Sequence[str] = ()) -> list[Row]:
    """The figures of all labs."""
    n_labs = len({each.lab for each in tried})
    return [
        Row("labs measured", n_labs),
        Row("labs that could not be measured", len(failed), 0),
        Row("plans measured", len(tried)),
        *prediction_rows(tried),
        *ratio_rows(tried, OURS, RIVALS),
        *[
            Row(f"  beside {FEWEST}: {name}", value)
            for name, value in _fewest_ratios(tried).items()
        ],
    ]


def _fewest_ratios(tried: Sequence[Tried]) -> dict[str, float]:
    return {
        row.figure.strip(): row.value
        for row in ratio_rows(tried, OURS, [FEWEST])
        if "worst" in row.figure or row.figure.endswith("rival: median")
    }


def rivals(members: Mapping[str, Member], layout: ModelLayout) -> dict[str, Plan]:
    """What each rule makes of the machines, largest memory first; without those it cannot serve."""
    order = sorted(members, key=lambda name: -members[name].memory_bytes)
    memories = [members[name].memory_bytes for name in order]
    caps = [_capacity(members[name], layout, is_head=not idx) for idx, name in enumerate(order)]
    whole = sum(layout.block_bytes) + layout.embedding_bytes + layout.head_bytes

    def fewest() -> Plan:
        taken = fewest_machines(memories, whole)
        shares = memory_proportional(layout.n_blocks, [memories[idx] for idx in taken])
        return _within(caps, order, dict(zip(taken, shares, strict=True)))

    def shared(shares: Sequence[int]) -> Plan:
        return _within(caps, order, dict(enumerate(shares)))

    rules: dict[str, Callable[[], Plan]] = {
        FEWEST: fewest,
        EQUAL: lambda: shared(equal_split(layout.n_blocks, len(order))),
        MEMORY: lambda: shared(memory_proportional(layout.n_blocks, memories)),
        SPEED: lambda: shared(
            water_filling(layout.n_blocks, [members[name].speed for name in order], caps)
        ),
    }
    made: dict[str, Plan] = {}
    for name, rule in rules.items():
        try:
            made[name] = rule()
        except NoShare as error:
            print(f"      {name}: {error}")
    return made


def _within(caps: Sequence[int], order: Sequence[str], shares: Mapping[int, int]) -> Plan:
    for idx, n_blocks in shares.items():
        if n_blocks > caps[idx]:
            raise NoShare(f"{order[idx]} cannot hold the {n_blocks} blocks it gets")
    return chain([(order[idx], n_blocks) for idx, n_blocks in shares.items()])


def _capacity(member: Member, layout: ModelLayout, *, is_head: bool) -> int:
    """How many blocks fit, with the KV cache that plans keep room for."""
    request = Workload(context_tokens=CONTEXT, n_sessions=SESSIONS)
    left = member.memory_bytes
    left -= layout.embedding_bytes + layout.head_bytes if is_head else 0
    fit = left // (max(layout.block_bytes) + kv_bytes_per_block(layout, request))
    caps = (fit, layout.n_blocks, member.max_blocks)
    return max(0, min(cap for cap in caps if cap is not None))


def _run(case: Case, folder: Path, tried: list[Tried]) -> None:
    """Add what was measured to `tried`, as far as it came."""
    members = named(case.members)
    source, name = source_of(case.model)
    layout = open_model(source, Engines(threads=1)).layout
    options = ("--prefer", "latency")
    with running_fleet(members, source, name, folder, options=options) as fleet:
        known: dict[tuple[object, ...], int] = {}  # shape -> where in `tried`
        for rule, plan in rivals(members, layout).items():
            if rule != FEWEST:  # as a rule it is one machine
                fleet.settle()
            _add(tried, known, fleet, case, rule, plan)
        _add(tried, known, fleet, case, OURS, chosen(fleet))


def _add(
    tried: list[Tried],
    known: dict[tuple[object, ...], int],
    fleet: Fleet,
    case: Case,
    rule: str,
    plan: Plan,
) -> None:
    """Measure a plan, unless another rule has come to the same."""
    idx = known.setdefault(shape(plan), len(tried))
    if idx < len(tried):
        tried[idx] = replace(tried[idx], rules=(*tried[idx].rules, rule))
        print(f"      {rule:40}  the same as {tried[idx].rules[0]}", flush=True)
        return
    try:
        predicted, measured = predicted_and_measured(fleet, plan)
    except CoveyError as error:  # a busy machine is late now and then, and a link is given up
        print(f"      {rule}, once more: {error}", flush=True)
        predicted, measured = predicted_and_measured(fleet, plan)
    tried.append(
        Tried(lab=case.name, plan=text(plan), rules=(rule,), predicted=predicted, measured=measured)
    )
    print(f"      {tried[-1].told()}", flush=True)
