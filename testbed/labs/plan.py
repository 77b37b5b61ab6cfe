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
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks.rows import Row
from benchmarks.synthetic import SHAPES, synthetic

from covey.cli.child import wait_for
from covey.errors import CoveyError
from covey.node.catalog import open_model
from covey.node.engines import Engines
from covey.partition.cost import kv_bytes_per_block
from covey.partition.profile import ModelLayout, Workload
from testbed.artefacts import Artefacts
from testbed.asker import Asker, tokens_per_s
from testbed.figures import Figures, Tried, prediction_rows, ratio_rows
from testbed.fleet import CONTEXT, SESSIONS, Fleet, Member, named, running_fleet
from testbed.namespaces import LabBroken
from testbed.plans import Plan, apply, chain, heads, shape, text
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
PLANNED_S, CALM_S = 90.0, 2.0
PROMPT, SHORT_PROMPT = 128, 16  # tokens; the first is the workload's
TEXT_S = 2.5  # what one text should take after its first token
MIN_TOKENS, MAX_TOKENS = 8, 48
ROUNDS_S = 6.0  # one session is measured again and again for so long,
MAX_ROUNDS = 3  # but not more often
MB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One lab."""

    name: str
    members: tuple[Member, ...]
    model: str = "smollm2"  # or a shape of `benchmarks.synthetic` and its type, as "tp-512.Q4_0"


def _case(devices: str, links: str, **options: object) -> Case:
    """Kinds of devices, and one link for all or one for each."""
    kinds, presets = devices.split(), links.split()
    if len(presets) == 1:
        presets *= len(kinds)
    caps = options.pop("max_blocks", None)
    memory = options.pop("memory", None)
    members = tuple(
        Member(kind=kind, link=link, memory=memory, max_blocks=caps)  # type: ignore[arg-type]
        for kind, link in zip(kinds, presets, strict=True)
    )
    forced = "" if caps is None else f", {caps} blocks each"
    forced += "" if memory is None else f", {memory // MB} MB each"  # type: ignore[operator]
    model = options.get("model", "smollm2")
    named_model = "" if model == "smollm2" else f"{model}, "
    name = f"{named_model}{'+'.join(kinds)}, {'+'.join(dict.fromkeys(presets))}{forced}"
    return Case(name=name, members=members, **options)  # type: ignore[arg-type]


CASES = (
    _case("desktop laptop", "ethernet"),
    _case("desktop pi4", "ethernet"),
    _case("pi5 pi5", "ethernet"),
    _case("pi4 pi4 pi4 pi4", "ethernet"),
    _case("laptop pi5 pi4", "ethernet"),
    _case("desktop laptop", "good-wifi"),
    _case("laptop pi5", "good-wifi"),
    _case("laptop pi4 pi4", "good-wifi"),
    _case("desktop laptop pi5 pi4", "good-wifi"),
    _case("desktop pi5", "bad-wifi"),
    _case("laptop laptop", "bad-wifi"),
    _case("desktop laptop", "uplink"),
    _case("laptop pi5", "tpi-llm"),
    _case("pi5 pi5 pi5 pi5", "tpi-llm"),
    _case("laptop pi5", "paretopipe"),
    _case("desktop laptop pi5", "ethernet good-wifi bad-wifi"),
    # From here on nobody can hold all of it.
    _case("laptop pi5", "ethernet", model="tp-512.Q4_0", max_blocks=20),
    _case("desktop laptop pi5 pi4", "ethernet", model="tp-512.Q4_0", max_blocks=14),
    _case("laptop pi5 pi5", "ethernet good-wifi bad-wifi", memory=110 * MB),
    _case("desktop laptop", "paretopipe", max_blocks=20),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which labs."""
    parser.add_argument("--list", action="store_true", help="name the labs and run none")
    parser.add_argument(
        "--only",
        action="append",
        type=int,
        metavar="N",
        choices=range(1, len(CASES) + 1),
        help="run this one; may be repeated",
    )
    parser.add_argument("--keep", action="store_true", help="keep the logs of all labs")


def measure(folder: Path, options: argparse.Namespace) -> Sequence[Row]:
    """Run the labs, each with a swarm of its own; Ctrl-C ends with what there is by then."""
    if options.list:
        for number, case in enumerate(CASES, 1):
            print(f"{number:3}  {case.name}")
        return []
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
                        tried += _run(case, cell.folder)
                        cell.has_failed = options.keep
                except (CoveyError, LabBroken, subprocess.SubprocessError) as error:
                    print(f"      could not be measured: {error}", flush=True)
                    failed.append(case.name)
        except KeyboardInterrupt:
            print("      interrupted: what was measured until now", flush=True)
    if not tried:
        raise CoveyError("no lab could be measured")
    return rows(tried, failed)


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

    made: dict[str, Plan] = {}
    for name, rule in {
        EQUAL: lambda: shared(equal_split(layout.n_blocks, len(order))),
        MEMORY: lambda: shared(memory_proportional(layout.n_blocks, memories)),
        SPEED: lambda: shared(
            water_filling(layout.n_blocks, [members[name].speed for name in order], caps)
        ),
        FEWEST: fewest,
    }.items():
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


def _run(case: Case, folder: Path) -> list[Tried]:
    members = named(case.members)
    with _model(case.model) as (source, name):
        layout = open_model(source, Engines(threads=1)).layout
        options = ("--prefer", "latency")
        with running_fleet(members, source, name, folder, options=options) as fleet:
            tried: dict[tuple[object, ...], Tried] = {}
            # Ours comes last: by then every link is measured.
            for rule, plan in rivals(members, layout).items():
                _add(tried, fleet, case, rule, plan)
            _add(tried, fleet, case, OURS, _chosen(fleet))
    return list(tried.values())


def _add(
    tried: dict[tuple[object, ...], Tried], fleet: Fleet, case: Case, rule: str, plan: Plan
) -> None:
    """Measure a plan, unless another rule has come to the same."""
    known = tried.get(shape(plan))
    if known is not None:
        tried[shape(plan)] = replace(known, rules=(*known.rules, rule))
        print(f"      {rule:40}  the same as {known.rules[0]}", flush=True)
        return
    predicted = Figures.predicted(apply(fleet, plan))
    measured = _measured(fleet.askers[heads(plan)[0]], predicted)
    tried[shape(plan)] = found = Tried(
        lab=case.name, plan=text(plan), rules=(rule,), predicted=predicted, measured=measured
    )
    _tell(found)


@contextmanager
def _model(name: str) -> Iterator[tuple[str, str]]:
    """What nodes are started with, and what they call it."""
    kind, _, type_name = name.partition(".")
    if kind not in SHAPES:
        yield name, name
        return
    path = synthetic(SHAPES[kind], type_name, print)
    yield str(path), path.stem


def _chosen(fleet: Fleet) -> Plan:
    """What the planner would run if nothing were pinned: its wish, once that stays the same.

    Raises:
        CoveyError: there is none in time.
    """
    asker = fleet.askers[fleet.founder]
    seen: list[tuple[float, Plan]] = []

    def is_calm() -> bool:
        fleet.check()
        points = asker.plan()["points"]
        plan = next((point for point in points if point["is_chosen"]), None)
        if plan is None or (seen and shape(plan) != shape(seen[-1][1])):
            seen.clear()
        if plan is not None:
            seen.append((time.monotonic(), plan))
        return bool(seen) and seen[-1][0] - seen[0][0] >= CALM_S

    wait_for(is_calm, PLANNED_S, "no plan that stays the same")
    return seen[-1][1]


def _measured(asker: Asker, predicted: Figures) -> Figures:
    """What the plan does that is active; texts are asked for where its first stage is."""
    asker.session(SHORT_PROMPT, MIN_TOKENS)  # warms links and caches
    n_tokens = _n_tokens(predicted.tpot_s)
    until = time.monotonic() + ROUNDS_S
    alone = [asker.session(PROMPT, n_tokens)]
    while time.monotonic() < until and len(alone) < MAX_ROUNDS:
        alone.append(asker.session(PROMPT, n_tokens))
    n_tokens = _n_tokens(SESSIONS / predicted.tokens_per_s)
    together = [asker.begin(SHORT_PROMPT, n_tokens) for _ in range(SESSIONS)]
    return Figures(
        ttft_s=median(session.ttft_s for session in alone),
        tpot_s=median(session.tpot_s for session in alone),
        tokens_per_s=tokens_per_s([session.result() for session in together]),
    )


def _n_tokens(tpot_s: float) -> int:
    return max(MIN_TOKENS, min(MAX_TOKENS, round(TEXT_S / tpot_s)))


def _tell(tried: Tried) -> None:
    predicted, measured = tried.predicted, tried.measured
    print(
        f"      {', '.join(tried.rules):40}  {tried.plan}\n"
        f"        predicted / measured: TTFT {predicted.ttft_s:.3f} / {measured.ttft_s:.3f} s, "
        f"TPOT {1e3 * predicted.tpot_s:.1f} / {1e3 * measured.tpot_s:.1f} ms, "
        f"{predicted.tokens_per_s:.1f} / {measured.tokens_per_s:.1f} tok/s",
        flush=True,
    )
