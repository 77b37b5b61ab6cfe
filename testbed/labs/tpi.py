"""TPI-LLM's setting (arXiv:2410.00531): eight devices as one group, beside disk offload on one.

Eight emulated Raspberry Pis on its links, 300 Mbit/s and 4 ms from one to another, run blocks of
Llama-2-7B's width (8 of 32, random weights, Q4_0) as a star of eight equal shares. On one such
device, at its speed and with its memory, Accelerate offloads the same shape in bf16 to disk, as the
paper's does; its disk is this machine's, at full speed while it runs. The paper's memory is fp32's
8 of 27 GB; here as much of what these blocks take in bf16. Accelerate at this machine's full speed
stands beside it. About six minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.accelerate_offload import ensure_installed
from benchmarks.big_model import big_model
from benchmarks.installs import CannotBuild, cache_folder
from benchmarks.limited import NodeFailed, running
from benchmarks.rows import Row
from benchmarks.synthetic import SHAPES, synthetic

from testbed.artefacts import Artefacts
from testbed.duty import at_speed
from testbed.fleet import Fleet, Member, named, running_fleet
from testbed.namespaces import LabUnavailable
from testbed.plans import apply, group

MIB = 1 << 20
SHAPE, TYPE = "llama-2-7b-8of32", "Q4_0"
N_DEVICES, DEVICE, LINK = 8, "pi4", "tpi-llm"
MEMORY_BYTES = 1200 * MIB  # of a device
RESIDENT_BYTES = 300 * MIB  # of weights, for Accelerate: what it needs besides varies
PROMPT, N_TOKENS, N_ROUNDS = 16, 12, 3
RIVALS_TOKENS = 3
#: What the paper saves of Accelerate's, as what may be left of it.
LEFT: Mapping[str, float] = {"TTFT": 0.2, "s/token": 0.2, "peak memory of a device": 0.1}


@dataclass(frozen=True, slots=True)
class Figures:
    """What one system did."""

    ttft_s: float
    tpot_s: float
    peak_bytes: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """Whether logs stay."""
    parser.add_argument("--keep", action="store_true", help="keep the logs")


def measure(folder: Path, options: argparse.Namespace) -> Sequence[Row]:
    """Ours, then Accelerate at both speeds."""
    member = Member(kind=DEVICE, link=LINK, memory=MEMORY_BYTES, scale=1.0)
    with Artefacts("tpi") as artefacts, artefacts.cell("group") as cell:
        ours = _group(cell.folder, member)
        cell.has_failed = options.keep
    try:
        slow, fast = _accelerate(member.speed)
    except (CannotBuild, NodeFailed) as error:
        raise LabUnavailable(f"Accelerate: {error}") from error
    name = f"{SHAPE}: group of {N_DEVICES} {DEVICE} ({TYPE}) over Accelerate (bf16) on one"
    pairs = {
        "TTFT": (ours.ttft_s, slow.ttft_s),
        "s/token": (ours.tpot_s, slow.tpot_s),
        "peak memory of a device": (ours.peak_bytes, slow.peak_bytes),
    }
    rows = [Row(f"{name}: {what}", a / b, LEFT[what]) for what, (a, b) in pairs.items()]
    for who, figures in (
        ("group", ours),
        ("Accelerate on one device", slow),
        ("Accelerate at this machine's full speed", fast),
    ):
        rows += [
            Row(f"{who}: TTFT of {PROMPT} tokens, s", figures.ttft_s),
            Row(f"{who}: s/token", figures.tpot_s),
            Row(f"{who}: peak memory of a device, MB", figures.peak_bytes / 1e6),
        ]
    return rows


def _group(folder: Path, member: Member) -> Figures:
    """The star of eight, asked at its hub."""
    members, shape = named([member] * N_DEVICES), SHAPES[SHAPE]
    source = synthetic(shape, TYPE, print)
    began_at = time.monotonic()
    with running_fleet(
        members, str(source), source.stem, folder, n_sessions=1, are_alike=True
    ) as fleet:
        _say(f"{N_DEVICES} nodes are up", began_at)
        names = list(members)
        plan = group(
            names,
            n_blocks=shape.n_blocks,
            kv_heads=[shape.n_kv_heads // N_DEVICES] * N_DEVICES,
            mlp_columns=[shape.inner // N_DEVICES] * N_DEVICES,
        )
        apply(fleet, plan)
        fleet.settle()
        hub = fleet.askers[names[0]]
        hub.session(PROMPT, 2)
        for name in names:  # what loading took at most says nothing about running
            _forget_peak(fleet, name)
        sessions = []
        for number in range(N_ROUNDS):
            sessions.append(hub.session(PROMPT, N_TOKENS))
            _say(f"text {number + 1} of {N_ROUNDS}: {sessions[-1].tpot_s:.2f} s/token", began_at)
        peaks = [_peak_bytes(fleet, name) for name in names]
    return Figures(
        median(session.ttft_s for session in sessions),
        median(session.tpot_s for session in sessions),
        max(peaks),
    )


def _accelerate(speed: float) -> tuple[Figures, Figures]:
    """On one device, and at this machine's full speed with as much memory."""
    package, model = ensure_installed(), big_model(print, SHAPES[SHAPE])
    found: list[Figures] = []
    for share in (speed, 1.0):
        with tempfile.TemporaryDirectory(dir=cache_folder()) as offloaded:
            words = [str(package), str(model), offloaded, str(RESIDENT_BYTES), "1"]
            command = ["benchmarks.accelerate_offload", *words]
            began_at = time.monotonic()
            with running("accelerate", MEMORY_BYTES, command) as node, contextlib.ExitStack() as it:
                node.answer()
                _say("Accelerate has loaded", began_at)
                if share < 1.0:
                    it.enter_context(at_speed(node.process, share))
                said = node.ask(prompt=PROMPT, tokens=RIVALS_TOKENS)
        first_s, *others_s = said["s"]
        _say(f"Accelerate at {share:.0%}: {median(others_s):.2f} s/token", began_at)
        found.append(Figures(first_s, median(others_s), said["peak_bytes"]))
    return found[0], found[1]


def _forget_peak(fleet: Fleet, name: str) -> None:
    """The kernel's record of the most memory a node had begins anew."""
    Path(f"/proc/{fleet.nodes[name].process.pid}/clear_refs").write_text("5\n")


def _peak_bytes(fleet: Fleet, name: str) -> float:
    """The most memory a node had, mapped weights included."""
    status = Path(f"/proc/{fleet.nodes[name].process.pid}/status").read_text()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return float(kilobytes) * 1024


def _say(text: str, began_at: float) -> None:
    print(f"[{time.monotonic() - began_at:4.0f} s] {text}", flush=True)
