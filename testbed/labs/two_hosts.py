"""Two machines that share a cable and nothing else: one founds, the other pastes the invite.

Each may hold 20 of the 30 blocks of SmolLM2-135M, so neither can answer alone. Homes and caches
are separate; the model's file is the only one they share. The commands are those a person types.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.rows import Row

from covey.cli.child import wait_for
from covey.errors import CoveyError
from testbed import namespaces
from testbed.machines import Machine
from testbed.namespaces import join_by_cable

MODEL = "smollm2"
MAX_BLOCKS = 20
PROMPT = "Why is the sky blue? Answer in two sentences."
MAX_TOKENS = "48"
PLAN_S = 90.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Whether with mDNS."""
    parser.add_argument("--mdns", choices=("on", "off", "both"), default="both")


def measure(folder: Path, options: argparse.Namespace) -> list[Row]:
    """Run it once, or once each way."""
    rows: list[Row] = []
    for choice in ("on", "off"):
        if options.mdns in (choice, "both"):
            measured = _measure_once(folder / f"mdns-{choice}", mdns=choice == "on")
            rows += [replace(row, figure=f"{row.figure}, mDNS {choice}") for row in measured]
    return rows


def _measure_once(folder: Path, *, mdns: bool) -> list[Row]:
    option = "--mdns" if mdns else "--no-mdns"
    with _two_machines(folder) as (first, second):
        reference = first.covey("run", MODEL, PROMPT, "--max-tokens", MAX_TOKENS, "--alone")
        began_at = time.monotonic()
        with first.start("up", MODEL, option, max_blocks=MAX_BLOCKS) as founder:
            invite = founder.facts["invite"]
            invited_s = time.monotonic() - began_at
            arguments = ("join", invite, "--model", MODEL, option)
            with second.start(*arguments, max_blocks=MAX_BLOCKS) as joiner:
                joiner.wait_until_up()
                wait_for(lambda: _is_planned(second), PLAN_S, "no plan over both hosts")
                planned_s = time.monotonic() - began_at
                text = second.covey("run", MODEL, PROMPT, "--max-tokens", MAX_TOKENS)
                stages = [_stage_used(machine) for machine in (first, second)]
    rows = [
        Row("first command to invite, s", invited_s),
        Row("first command to plan over both, s", planned_s),
        Row("text on the second host equals one process", float(text == reference), 1, "at least"),
    ]
    for name, stage in zip(("first", "second"), stages, strict=True):
        start, end = stage["span"]
        rows += [
            Row(f"blocks on the {name} host", end - start, MAX_BLOCKS),
            Row(f"steps done by the {name} host", stage["forwards"], int(MAX_TOKENS), "at least"),
            Row("bytes of hidden states it received", stage["received_bytes"], 1, "at least"),
        ]
    return rows


@contextmanager
def _two_machines(folder: Path) -> Iterator[tuple[Machine, Machine]]:
    hosts = namespaces.create(("first", "second"))
    for name in hosts:
        (folder / name).mkdir(parents=True)
    first, second = (Machine(host, folder / name) for name, host in hosts.items())
    try:
        join_by_cable(
            first.host,
            second.host,
            left_address="198.51.100.1/24",
            right_address="198.51.100.2/24",
        )
        yield first, second
    finally:
        namespaces.remove(hosts)


def _is_planned(machine: Machine) -> bool:
    active = machine.facts("plan", MODEL)["active"]
    return active is not None and len(active["stages"]) == 2


def _stage_used(machine: Machine) -> dict[str, Any]:
    """The stage that did the work; a better plan may have brought another meanwhile."""
    stages: list[dict[str, Any]] = machine.facts("status")["stages"]
    if not stages:
        raise CoveyError(f"{machine.host.name} serves no stage")
    return max(stages, key=lambda stage: int(stage["forwards"]))
