"""A model larger than memory: streamed from disk, beside Accelerate's disk offload.

    make bench-window

A 2 GB Llama in bf16 under 600 MiB, weights, caches and interpreter together, as it is and quantised
when it was packed; Accelerate under 900 MiB, from the same disk. Each in a process and a control
group of its own, in turn, round by round; between them the disk's own speed, by reading the same
packed blocks in the same way without computing. Needs root, for the groups, 6 GB of disk, and an
idle machine.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from covey.node.disk import BLOCK_BYTES, ColdFile, read_memory, room_for

from . import accelerate_offload
from .big_model import big_model
from .installs import CannotBuild, cache_folder
from .limited import Node, NodeFailed, running
from .rows import Row, report

MIB = 1 << 20
LIMIT, RIVALS_LIMIT = 600 * MIB, 900 * MIB
# Of the limit, what blocks may take: interpreter and libraries take 80 MiB, the head's window 32,
# and with less than this to spare the system throws out what stays mapped.
BLOCKS_BYTES = 470 * MIB
RIVALS_RESIDENT_BYTES = 300 * MIB  # more gets it killed as it loads, or makes it no faster
QUANTIZATION = "q4_0"
NEEDED_BYTES = 6 << 30
N_FILES = 12  # that are read to learn the disk's speed: most of those that are streamed
N_ROUNDS, PROMPT, N_TOKENS = 5, 8, 5  # the first token, which has the prompt in it, is apart
BF16, QUANTIZED, RIVAL = "bf16", f"quantised ({QUANTIZATION})", "Accelerate"
THREADS = os.cpu_count() or 1


@dataclass
class Found:
    """What a process said in each round."""

    token_s: list[float] = field(default_factory=list)  # the median of a turn
    first_s: list[float] = field(default_factory=list)
    streamed_per_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def note(self, said: Mapping[str, Any]) -> None:
        """Another round."""
        first, *others = said["s"]
        self.first_s.append(first)
        self.token_s.append(median(others))
        if "streamed_bytes" in said:
            self.streamed_per_s.append(sum(said["streamed_bytes"][1:]) / sum(others))
        self.peak_bytes = max(self.peak_bytes, said["peak_bytes"])


def main(argv: Sequence[str]) -> int:
    """Measure and report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="bench_window", description=__doc__)
    parser.add_argument("--rounds", type=int, default=N_ROUNDS)
    arguments = parser.parse_args(argv)
    try:
        rows = _measure(arguments.rounds)
    except (NodeFailed, CannotBuild, OSError, subprocess.SubprocessError) as error:
        print(f"could not be measured: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    report(rows)
    return 0


def _measure(n_rounds: int) -> list[Row]:
    packed = cache_folder() / "big-2gb.packed"
    if not packed.exists() and shutil.disk_usage(cache_folder()).free < NEEDED_BYTES:
        raise NodeFailed(f"{cache_folder()} needs {NEEDED_BYTES >> 30} GB")
    package, model = accelerate_offload.ensure_installed(), big_model(_say)
    if not packed.exists():
        _pack(model, packed)
    with ExitStack() as stack:
        offloaded = stack.enter_context(tempfile.TemporaryDirectory(dir=cache_folder()))
        ours = ["benchmarks.window_node", str(model), str(packed), str(BLOCKS_BYTES), str(THREADS)]
        theirs = ["benchmarks.accelerate_offload", str(package), str(model), offloaded]
        theirs += [str(RIVALS_RESIDENT_BYTES), str(THREADS)]
        _say("loading, and checking what was packed")
        # What another process has brought into memory is charged to nobody else.
        for path in (*packed.iterdir(), *model.iterdir()):
            with ColdFile(path) as file:
                file.forget()
        nodes = {
            name: stack.enter_context(running(name, limit, command))
            for name, limit, command in (
                (BF16, LIMIT, ours),
                (QUANTIZED, LIMIT, [*ours, QUANTIZATION]),
                (RIVAL, RIVALS_LIMIT, theirs),
            )
        }
        loaded = {name: node.answer() for name, node in nodes.items()}
        found, disk = _rounds(nodes, packed, n_rounds)
    return _rows(found, disk, loaded)


def _rounds(
    nodes: Mapping[str, Node], packed: Path, n_rounds: int
) -> tuple[dict[str, Found], list[float]]:
    """In turn: what each said, and the disk's bytes per second."""
    found = {name: Found() for name in nodes}
    disk: list[float] = []
    for node in nodes.values():
        node.ask(prompt=PROMPT, tokens=2)  # everything for the first time
    for number in range(n_rounds):
        disk.append(_disk_speed(packed))
        for name, node in nodes.items():
            found[name].note(node.ask(prompt=PROMPT, tokens=N_TOKENS))
        shown = ", ".join(f"{name} {each.token_s[-1]:.2f}" for name, each in found.items())
        _say(f"round {number + 1} of {n_rounds}, s/token: {shown}; disk {disk[-1] / 1e6:.0f} MB/s")
    return found, disk


def _disk_speed(packed: Path) -> float:
    """Bytes per second at which packed blocks are read, the largest first."""
    paths = sorted(packed.iterdir(), key=lambda path: path.stat().st_size)[-N_FILES:]
    memory = read_memory(room_for(paths[-1].stat().st_size))
    memory[::BLOCK_BYTES] = 0  # the system gives memory when it is first written to
    n_read, began_at = 0, time.perf_counter()
    for path in paths:
        with ColdFile(path) as file:
            n_read += file.read_into(memory, 0, file.size).nbytes
    return n_read / (time.perf_counter() - began_at)


def _rows(
    found: Mapping[str, Found], disk: Sequence[float], loaded: Mapping[str, Any]
) -> list[Row]:
    rows = []
    for name, target in ((BF16, 2.5), (QUANTIZED, 6.0)):
        ratios = [
            theirs / ours
            for ours, theirs in zip(found[name].token_s, found[RIVAL].token_s, strict=True)
        ]
        figure = f"{name} under {LIMIT // MIB} MiB over Accelerate under {RIVALS_LIMIT // MIB}"
        rows.append(Row(f"{figure}: tokens/s", median(ratios), target, "at least"))
    # A disk is not as fast at one moment as at another: each turn beside what was read before it.
    shares = [ours / own for ours, own in zip(found[BF16].streamed_per_s, disk, strict=True)]
    rows += [
        Row("bf16: streamed, share of the disk's own speed", median(shares), 0.9, "at least"),
        Row("  the disk's own speed, MB/s", median(disk) / 1e6),
    ]
    for name, each in found.items():
        rows += [
            Row(f"{name}: tokens/s", 1 / median(each.token_s)),
            Row(f"  first token of {PROMPT}, s", median(each.first_s)),
            Row("  resident at most, MB", each.peak_bytes / 1e6),
        ]
        if loaded[name] is not None:
            rows.append(Row("  blocks streamed, of 16", loaded[name]["n_streamed"]))
    return rows


def _pack(model: Path, packed: Path) -> None:
    """Both forms, before anything is limited."""
    unfinished = packed.with_name(f"{packed.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for quantization in ((), (QUANTIZATION,)):
        _say(f"packing {model.name} {' '.join(quantization)}")
        words = [str(model), str(unfinished), "0", str(THREADS), *quantization]
        subprocess.run(
            [sys.executable, "-m", "benchmarks.window_node", *words],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=Path(__file__).parents[1],
        )
    unfinished.rename(packed)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
