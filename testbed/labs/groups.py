"""Tensor parallel: blocks shared out over devices, over one of them; and the same text.

Two and four emulated Raspberry Pis on Ethernet run Llama-3.2-1B's shape (random weights, Q4_0);
each plan is pinned and asked for at its hub, which also has the whole output head. Two processes
of this machine run a small model over loopback, where a group cannot win, beside one process with
as many threads. SmolLM2, with its three KV heads, runs on two and three nodes with uneven shares in
fp32: the text must be that of one node.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.rows import Row
from benchmarks.synthetic import SHAPES, synthetic

from covey.errors import CoveyError
from testbed.artefacts import Artefacts
from testbed.asker import Session
from testbed.fleet import Fleet, Member, named, running_fleet, running_on_one_host
from testbed.namespaces import LabBroken, LabUnavailable, PartlyMeasured
from testbed.plans import Plan, apply, chain, group, heads

PIS = "llama-3.2-1b"
SMALL = "tp-512"
TYPE = "Q4_0"
#: Of blocks only and of a whole token, by the number of devices.
TARGETS: Mapping[int, tuple[float, float]] = {2: (1.5, 1.3), 4: (2.2, 1.7)}
LANES: Mapping[str, tuple[Mapping[str, str], float]] = {
    "TLS": ({"COVEY_LANES": "tls"}, 0.18),
    "same-host path": ({}, 0.33),
}
#: KV heads and MLP columns of each node's share of SmolLM2.
UNEVEN = (((2, 1), (1024, 512)), ((1, 1, 1), (768, 512, 256)))
PROMPT, N_TOKENS, WARM_TOKENS = 16, 24, 4
N_ROUNDS = 3
TEXT_TOKENS = 64
TEXT_PROMPT = range(2000, 2032)  # any tokens will do, as long as all are asked for the same


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which parts."""
    parser.add_argument("--only", action="append", choices=PARTS, help="run this part only")
    parser.add_argument("--keep", action="store_true", help="keep the logs of all parts")


def measure(folder: Path, options: argparse.Namespace) -> Sequence[Row]:
    """Run the parts; one that cannot be measured is named, and the others go on."""
    rows: list[Row] = []
    failed: list[str] = []
    with Artefacts("groups") as artefacts:
        for name, part in PARTS.items():
            if options.only is not None and name not in options.only:
                continue
            try:
                with artefacts.cell(name) as cell:
                    rows += part(cell.folder)
                    cell.has_failed = options.keep
            except (CoveyError, LabBroken, LabUnavailable, subprocess.SubprocessError) as error:
                print(f"{name} could not be measured: {error}", flush=True)
                failed.append(name)
    if not rows:
        raise CoveyError("nothing could be measured")
    if failed:
        raise PartlyMeasured(rows, failed)
    return rows


def _over_ethernet(folder: Path) -> list[Row]:
    """Groups of 2 and 4 beside one of the same devices, all in one swarm."""
    members = named([Member(kind="pi4", link="ethernet", scale=1.0)] * 4)
    shape = SHAPES[PIS]
    source = synthetic(shape, TYPE, print)
    with running_fleet(members, str(source), source.stem, folder, n_sessions=1) as fleet:
        names = list(members)
        alone = _tried(fleet, chain([(names[0], shape.n_blocks)]))
        rows = []
        for n_members, (blocks, whole) in TARGETS.items():
            plan = group(
                names[:n_members],
                n_blocks=shape.n_blocks,
                kv_heads=[shape.n_kv_heads // n_members] * n_members,
                mlp_columns=[shape.inner // n_members] * n_members,
            )
            shared = _tried(fleet, plan)
            name = f"{n_members} pi4 on ethernet over one, {PIS} {TYPE}"
            rows += [
                Row(f"{name}, blocks only", _ratio(alone, shared, _stages_s), blocks, "at least"),
                Row(f"{name}, whole token", _ratio(alone, shared, _tpot_s), whole, "at least"),
            ]
    return rows


def _on_loopback(folder: Path) -> list[Row]:
    """Two processes with a thread each, beside one with two."""
    shape = SHAPES[SMALL]
    source = synthetic(shape, TYPE, print)
    one_node = chain([("one", shape.n_blocks)])
    arguments = str(source), source.stem
    with running_on_one_host(
        ["one"], *arguments, folder / "one", options=("--threads", "2")
    ) as fleet:
        alone = _tried(fleet, one_node)
    rows = []
    names = ["one", "two"]
    plan = group(
        names,
        n_blocks=shape.n_blocks,
        kv_heads=[shape.n_kv_heads // 2] * 2,
        mlp_columns=[shape.inner // 2] * 2,
    )
    for lane, (environment, target) in LANES.items():
        with running_on_one_host(
            names,
            *arguments,
            folder / lane.replace(" ", "-"),
            options=("--threads", "1"),
            environment=environment,
        ) as fleet:
            shared = _tried(fleet, plan)
        name = f"2 processes on loopback over one with 2 threads, {SMALL} {TYPE}, {lane}"
        rows.append(Row(name, _ratio(alone, shared, _tpot_s), target, "at least"))
    return rows


def _same_text(folder: Path) -> list[Row]:
    """Groups with uneven shares beside one node, on the engine that computes in fp32."""
    rows = []
    names = [f"node-{idx}" for idx in range(3)]
    options = ("--engine", "fp32", "--threads", "1")
    with running_on_one_host(names, "smollm2", "smollm2", folder, options=options) as fleet:
        alone = _text(fleet, chain([(names[0], 30)]))
        for kv_heads, mlp_columns in UNEVEN:
            plan = group(
                names[: len(kv_heads)],
                n_blocks=30,
                kv_heads=kv_heads,
                mlp_columns=mlp_columns,
                sum_codec="exact",
            )
            shares = "+".join(map(str, kv_heads))
            name = (
                f"smollm2 over {len(kv_heads)} nodes, {shares} KV heads: "
                f"{TEXT_TOKENS} tokens equal to one node's in fp32"
            )
            rows.append(Row(name, float(_text(fleet, plan) == alone), 1, "at least"))
    return rows


PARTS: Mapping[str, Callable[[Path], list[Row]]] = {
    "ethernet": _over_ethernet,
    "loopback": _on_loopback,
    "text": _same_text,
}


def _tried(fleet: Fleet, plan: Plan) -> list[Session]:
    """Texts of one plan, one at a time; the first is thrown away."""
    began_at = time.monotonic()
    active = apply(fleet, plan)
    asker = fleet.askers[heads(plan)[0]]
    asker.session(PROMPT, WARM_TOKENS)
    sessions = [asker.session(PROMPT, N_TOKENS) for _ in range(N_ROUNDS)]
    stage = plan["pipelines"][0]["stages"][0]
    print(
        f"[{time.monotonic() - began_at:4.0f} s] {fleet.model} on "
        f"{'+'.join(member['name'] for member in stage['members'])}: "
        f"{1e3 * median(map(_tpot_s, sessions)):.1f} ms a token "
        f"(predicted {1e3 * active['tpot_s']:.1f}), of it "
        f"blocks {1e3 * median(map(_stages_s, sessions)):.1f}, "
        f"head {1e3 * median(session.head_s for session in sessions):.1f}",
        flush=True,
    )
    return sessions


def _text(fleet: Fleet, plan: Plan) -> str:
    apply(fleet, plan)
    asked = fleet.askers[heads(plan)[0]].begin(0, TEXT_TOKENS, prompt=TEXT_PROMPT)
    return asked.result().text


def _ratio(
    alone: Sequence[Session], shared: Sequence[Session], figure: Callable[[Session], float]
) -> float:
    return median(map(figure, alone)) / median(map(figure, shared))


def _tpot_s(session: Session) -> float:
    return session.tpot_s


def _stages_s(session: Session) -> float:
    return session.stages_s
