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
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.accelerate_offload import ensure_installed
from benchmarks.big_model import big_model
from benchmarks.installs import CannotBuild, cache_folder
from benchmarks.limited import NodeFailed, running
from benchmarks.nodes import resident
from benchmarks.rows import Row
from benchmarks.synthetic import SHAPES, synthetic

from covey.node.disk import ColdFile
from testbed.artefacts import Artefacts
from testbed.duty import at_speed
from testbed.fleet import Fleet, Member, named, running_fleet
from testbed.namespaces import LabUnavailable
from testbed.plans import apply, group

MIB = 1 << 20
SHAPE, TYPE = "llama-2-7b-8of32", "Q4_0"
N_DEVICES, DEVICE, LINK = 8, "pi4", "tpi-llm"
MEMORY_BYTES = 1200 * MIB  # of the device that Accelerate has
RESIDENT_BYTES = 300 * MIB  # of weights, for Accelerate: what it needs besides varies
GIVEN_BYTES = 400 * MIB  # by each member of the group, for weights and KV cache
PROMPT, N_TOKENS, N_ROUNDS = 16, 12, 3
RIVALS_TOKENS = 3
TTFT, TPOT = f"TTFT of {PROMPT} tokens, s", "s/token"
MEMORY = "memory of the fullest device, MB"
#: What the paper saves of Accelerate's, as what may be left of it.
LEFT: Mapping[str, float] = {TTFT: 0.2, TPOT: 0.2, MEMORY: 0.1}
OURS, THEIRS = "group", "Accelerate"


@dataclass(frozen=True, slots=True)
class Figures:
    """What one system did."""

    ttft_s: float
    tpot_s: float
    memory_bytes: float

    @property
    def values(self) -> dict[str, float]:
        """The same by the names that rows have."""
        return {TTFT: self.ttft_s, TPOT: self.tpot_s, MEMORY: self.memory_bytes / 1e6}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Whether logs stay."""
    parser.add_argument("--keep", action="store_true", help="keep the logs")
    parser.add_argument("--only", choices=("group", "accelerate"), help="print one side's figures")


def measure(folder: Path, options: argparse.Namespace) -> Sequence[Row]:
    """Ours, then Accelerate at both speeds."""
    member = Member(kind=DEVICE, link=LINK, memory=GIVEN_BYTES, scale=1.0)
    found: dict[str, Figures] = {}
    if options.only != "accelerate":
        with Artefacts("tpi") as artefacts, artefacts.cell("group") as cell:
            found[OURS] = _group(cell.folder, member)
            cell.has_failed = options.keep
    if options.only != "group":
        try:
            found |= _accelerate({THEIRS: member.speed, f"{THEIRS} at this machine's speed": 1.0})
        except (CannotBuild, NodeFailed) as error:
            raise LabUnavailable(f"Accelerate: {error}") from error
    rows = []
    if options.only is None:
        name = f"{SHAPE}: group of {N_DEVICES} {DEVICE} ({TYPE}) over Accelerate (bf16) on one"
        for what, left in LEFT.items():
            ratio = found[OURS].values[what] / found[THEIRS].values[what]
            rows.append(Row(f"{name}: {what}", ratio, left))
    for who, figures in found.items():
        rows += [Row(f"{who}: {what}", value) for what, value in figures.values.items()]
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
        sessions = []
        for number in range(N_ROUNDS):
            sessions.append(hub.session(PROMPT, N_TOKENS))
            _say(f"text {number + 1} of {N_ROUNDS}: {sessions[-1].tpot_s:.2f} s/token", began_at)
        memory = [_memory_bytes(fleet, name) for name in names]
    return Figures(
        median(session.ttft_s for session in sessions),
        median(session.tpot_s for session in sessions),
        max(memory),
    )


def _accelerate(speeds: Mapping[str, float]) -> dict[str, Figures]:
    """With a device's memory, at each of these shares of this machine's speed."""
    package, model = ensure_installed(), big_model(print, SHAPES[SHAPE])
    found: dict[str, Figures] = {}
    for name, share in speeds.items():
        for path in model.iterdir():  # what is in memory already would be charged to nobody
            with ColdFile(path) as file:
                file.forget()
        began_at = time.monotonic()
        with ExitStack() as stack:
            offloaded = stack.enter_context(tempfile.TemporaryDirectory(dir=cache_folder()))
            words = [str(package), str(model), offloaded, str(RESIDENT_BYTES), "1"]
            command = ["benchmarks.accelerate_offload", *words]
            node = stack.enter_context(running(name, MEMORY_BYTES, command))
            node.answer()
            _say(f"{name} has loaded", began_at)
            stack.enter_context(at_speed(node.process, share))
            said = node.ask(prompt=PROMPT, tokens=RIVALS_TOKENS)
        first_s, *others_s = said["s"]
        _say(f"{name}: {median(others_s):.2f} s/token", began_at)
        found[name] = Figures(first_s, median(others_s), said["peak_bytes"])
    return found


def _memory_bytes(fleet: Fleet, name: str) -> int:
    """What a node has in memory, all packed weights included.

    Not what it once read of the file: that is mapped too, but never looked at again.
    """
    found = resident(fleet.nodes[name].process.pid)
    return found.total - found.checkpoint


def _say(text: str, began_at: float) -> None:
    print(f"[{time.monotonic() - began_at:4.0f} s] {text}", flush=True)
