"""What the codecs of hidden states lose and save: SmolLM2, teacher-forced, against exact borders.

`make bench-codecs`. One border and three; the way back to the head counts as one of them. The loss
is the mean KL divergence of the next token's distribution, and how often the most probable token
is the same one, over the tokens that the model itself generates. On fp32 it is the codec's own; the
native engine rounds activations to bytes, so that whatever changes a hidden state at all changes
some of them: its figures have that noise in them, which is as large as what the engine itself loses
against fp32 (`make bench-engine`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from covey.node.catalog import LocalModel, open_model
from covey.node.engine.stage import Stage
from covey.node.engine.tensors import HiddenStates
from covey.node.engines import EngineChoice, Engines
from covey.node.hidden import pack, unpack
from covey.node.prompt import chat_tokens
from covey.transport.messages import Codec

from .accuracy import PROMPTS
from .rows import Row, report

CODECS: tuple[Codec, ...] = ("fp16", "int8", "int4")
N_TOKENS = 48
# Borders of two plans: block 15 is the middle, and the last one is the way back to the head.
CUTS = {"one border": (0, 15, 30), "three borders": (0, 10, 20, 30)}
ENGINES: tuple[EngineChoice, ...] = ("fp32", "native")
THREADS = {"fp32": 1, "native": None}  # torch's two wait for each other on a busy machine
#: A loss nobody notices, and one that a slow link is worth: mean KL at one border, on fp32.
MOST_KL = {"fp16": 1e-6, "int8": 1e-2, "int4": 1e-1}

Logits = npt.NDArray[np.float64]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=N_TOKENS)
    arguments = parser.parse_args()
    rows: list[Row] = []
    models = {
        engine: open_model(arguments.model, Engines(engine, THREADS[engine])) for engine in ENGINES
    }
    for engine, model in models.items():
        for name, cuts in CUTS.items():
            stages = [model.load_stage(span) for span in pairwise(cuts)]
            is_one = name == "one border"
            losses = _losses(model, stages, arguments.tokens, is_way_back_counted=not is_one)
            for codec, (kl, top1) in losses.items():
                figure = f"{model.name}, {engine}, {name}, {codec}"
                most = MOST_KL[codec] if is_one and engine == "fp32" else None
                rows.append(Row(f"{figure}: mean KL", kl, most))
                rows.append(Row(f"{figure}: top-1", top1, None, "at least"))
    model = models[ENGINES[-1]]
    exact_bytes = _bytes_per_token(model, "exact")
    for codec in CODECS:
        n_bytes = _bytes_per_token(model, codec)
        rows.append(Row(f"{codec}: bytes per token", n_bytes))
        rows.append(Row(f"{codec}: share of exact", n_bytes / exact_bytes))
        for n_rows in (1, 128):
            took_s = _both_ways_s(model, codec, n_rows)
            rows.append(Row(f"{codec}: {n_rows} rows, encode and decode, us", took_s * 1e6))
    report(rows)


def _losses(
    model: LocalModel, stages: Sequence[Stage], n_tokens: int, *, is_way_back_counted: bool
) -> dict[Codec, tuple[float, float]]:
    """Of each codec, at every border of `stages`: (mean KL, share of equal top tokens)."""
    codecs: tuple[Codec, ...] = ("exact", *CODECS)
    divergences: dict[Codec, list[float]] = {codec: [] for codec in codecs}
    agreements: dict[Codec, list[bool]] = {codec: [] for codec in codecs}
    for prompt in PROMPTS:
        feed = chat_tokens(model.tokenizer, [{"role": "user", "content": prompt}], {})
        for codec in codecs:
            for stage in stages:
                stage.open_session(codec, len(feed) + n_tokens)
        at = 0
        for _ in range(n_tokens):
            embedded = model.head.embed(feed)
            said = {
                codec: _log_softmax(
                    model, stages, codec, at, embedded, is_way_back_counted=is_way_back_counted
                )
                for codec in codecs
            }
            p = said["exact"]
            for codec, q in said.items():
                divergences[codec].append(float((np.exp(p) * (p - q)).sum()))
                agreements[codec].append(bool(p.argmax() == q.argmax()))
            at += len(feed)
            feed = [int(p.argmax())]
    for codec in codecs:
        for stage in stages:
            stage.close_session(codec)
    return {
        codec: (statistics.fmean(divergences[codec]), statistics.fmean(agreements[codec]))
        for codec in CODECS
    }


def _log_softmax(
    model: LocalModel,
    stages: Sequence[Stage],
    codec: Codec,
    position: int,
    hidden: HiddenStates,
    *,
    is_way_back_counted: bool,
) -> Logits:
    for idx, stage in enumerate(stages):
        hidden = stage.forward(codec, position, hidden)
        if idx + 1 < len(stages) or is_way_back_counted:
            hidden = _over_a_border(hidden, stage, codec)
    logits = model.head.logits(hidden[-1:])[0].astype(np.float64)
    shifted = logits - logits.max()
    exact: Logits = shifted - np.log(np.exp(shifted).sum())
    return exact


def _over_a_border(hidden: HiddenStates, stage: Stage, codec: Codec) -> HiddenStates:
    tensor = pack(hidden, stage.dtype, codec)
    return unpack(tensor, stage.dtype, codec, hidden_size=stage.hidden_size, max_tokens=len(hidden))


def _bytes_per_token(model: LocalModel, codec: Codec) -> int:
    hidden = model.head.embed([0])
    return len(pack(hidden, model.head.dtype, codec).data)


def _both_ways_s(model: LocalModel, codec: Codec, n_rows: int) -> float:
    hidden = model.head.embed([idx % 1000 for idx in range(n_rows)])
    dtype, width = model.head.dtype, hidden.shape[1]

    def both() -> None:
        unpack(pack(hidden, dtype, codec), dtype, codec, hidden_size=width, max_tokens=n_rows)

    return _median_s(both)


def _median_s(work: Callable[[], None], rounds: int = 50) -> float:
    times: list[float] = []
    for _ in range(rounds):
        began_at = time.perf_counter()
        work()
        times.append(time.perf_counter() - began_at)
    return statistics.median(times)


if __name__ == "__main__":
    main()
