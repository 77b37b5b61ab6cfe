"""One model in a process of its own that may be held to less memory than the model takes.

    python -m benchmarks.window_node MODEL PACKED MEMORY THREADS [QUANTIZATION]

MODEL is a folder or file, PACKED where its packed blocks are kept, MEMORY how many bytes its blocks
may take; those that do not fit are streamed, and the head too. It says how many when it is loaded,
then reads commands and answers each, one JSON object a line:

    {"n_streamed": 14, "n_blocks": 16}
    {"prompt": 8, "tokens": 4}       make so many tokens behind a new prompt of so many, greedily
    {"s": [...], "streamed_bytes": [...], "peak_bytes": ...}
                                     of each seconds, the first has the prompt in it; what was read

With MEMORY 0 it packs everything there is and ends.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from covey.node.catalog import LocalModel
from covey.node.engine.tensors import Quantization
from covey.node.engines import QUANTIZATIONS, Engines, weight_sizes
from covey.node.kernels.block_source import fewest_streamed
from covey.node.kernels.native_head import NativeHead
from covey.node.kernels.native_stage import NativeStage
from covey.node.kernels.packed_cache import PackedCache
from covey.node.model.checkpoint import open_checkpoint

SESSION = "benchmark"
FIRST_TOKEN = 100  # any will do


def main(model_path: str, packed: str, memory: str, threads: str, *quantize: str) -> None:
    """Load, then make tokens as told."""
    quantization: Quantization | None = next(
        (kind for kind in QUANTIZATIONS if kind in quantize), None
    )
    cache = PackedCache(Path(packed))
    engines = Engines("native", int(threads), cache, quantize=quantization, head_bytes=0)
    checkpoint = open_checkpoint(Path(model_path))
    model = LocalModel("big", checkpoint, engines)
    blocks = weight_sizes(checkpoint, model.engine).blocks
    n_streamed = fewest_streamed(blocks, int(memory)) if int(memory) else len(blocks)
    if n_streamed is None:
        raise ValueError("not even a window fits")
    stage, head = model.load_stage((0, len(blocks)), streamed_blocks=n_streamed), model.head
    if not isinstance(stage, NativeStage) or not isinstance(head, NativeHead):
        raise TypeError("only the native engine streams")
    _say({"n_streamed": n_streamed, "n_blocks": len(blocks)})
    if not int(memory):
        return
    for line in sys.stdin:
        command = json.loads(line)
        taken = _generate(stage, head, command["prompt"], command["tokens"])
        seconds, streamed_bytes = zip(*taken, strict=True)
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        _say({"s": seconds, "streamed_bytes": streamed_bytes, "peak_bytes": peak_bytes})


def _generate(
    stage: NativeStage, head: NativeHead, n_prompt: int, n_tokens: int
) -> list[tuple[float, int]]:
    """Seconds of each token, and bytes that were read meanwhile."""
    stage.open_session(SESSION, n_prompt + n_tokens)
    feed, position = list(range(FIRST_TOKEN, FIRST_TOKEN + n_prompt)), 0
    taken: list[tuple[float, int]] = []
    for _ in range(n_tokens):
        began_at, before = time.perf_counter(), _streamed_bytes(stage, head)
        hidden = stage.forward(SESSION, position, head.embed(feed))
        position += len(feed)
        feed = [int(head.logits(hidden[-1:])[0].argmax())]
        streamed_bytes = _streamed_bytes(stage, head) - before
        taken.append((time.perf_counter() - began_at, streamed_bytes))
    stage.close_session(SESSION)
    return taken


def _streamed_bytes(stage: NativeStage, head: NativeHead) -> int:
    return sum(facts.read_bytes for facts in (stage.streaming, head.streaming) if facts)


def _say(what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
