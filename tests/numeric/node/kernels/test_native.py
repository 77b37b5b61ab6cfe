"""The native engine against the torch one and against itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey.node.engine.errors import (
    CacheOverflow,
    InvalidHiddenStates,
    NonFiniteValues,
    PositionGap,
    UnknownSession,
    UnknownToken,
)
from covey.node.engine.generate import generate_text
from covey.node.engine.head import load_head
from covey.node.engine.torch_stage import load_stage
from covey.node.kernels.errors import KernelsUnavailable
from covey.node.kernels.library import Engine, Library, load_library
from covey.node.kernels.native_head import load_native_head
from covey.node.kernels.native_stage import load_native_stage
from covey.node.model.checkpoint import Checkpoint, open_checkpoint
from covey.node.model.errors import CorruptModel, UnsupportedModel
from covey.node.model.resolve import resolve_model
from covey.node.model.sampling import SamplingParams
from support.tiny_weights import SMALL, rows, write_quantized

PROMPTS = (
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "List three uses of a paper clip.",
    "Explain gravity to a child.",
    "What is the capital of France, and what is it known for?",
    "Tell me a story about a dragon.",
    "How do I bake bread?",
    "Give me five facts about penguins.",
    "Write a Python function that adds two numbers.",
    "What is photosynthesis?",
)


@pytest.fixture(scope="module", params=["portable", "best"])
def library(request: pytest.FixtureRequest) -> Library:
    portable = load_library("portable")
    if request.param == "portable":
        return portable
    if portable.best_isa == "portable":
        pytest.skip("this CPU has only the portable kernels")
    return load_library(portable.best_isa)


@pytest.fixture(params=["Q4_1", "Q8_0", "F16"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Checkpoint]:
    path = write_quantized(tmp_path / "small.gguf", SMALL, request.param)
    with open_checkpoint(path, cache_dir=tmp_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    with open_checkpoint(
        resolve_model("smollm2"), cache_dir=tmp_path_factory.mktemp("cache")
    ) as opened:
        yield opened


def run(stage: Any, hidden: Any, sizes: list[int]) -> Any:
    """All rows of `hidden` in calls of these sizes, repeated."""
    stage.open_session("s", len(hidden))
    out, at, call = [], 0, 0
    while at < len(hidden):
        end = min(at + sizes[call % len(sizes)], len(hidden))
        out.append(stage.forward("s", at, hidden[at:end]))
        at, call = end, call + 1
    return np.concatenate(out)


def as_bytes(x: Any) -> Any:
    """What products see of activations [T, n]: whole steps, 1/127 of the largest of each 32."""
    blocks = x.reshape(len(x), -1, 32)
    steps = np.abs(blocks).max(-1, keepdims=True) / 127
    return (np.round(blocks / steps) * steps).reshape(x.shape)


def reference(checkpoint: Checkpoint, hidden: Any) -> Any:
    """The first block in float64, with activations, keys and values rounded as the engine does."""
    config = checkpoint.config
    half, group = config.rope_dim // 2, config.n_heads // config.n_kv_heads
    x, n = hidden.astype(np.float64), len(hidden)
    angles = np.arange(n)[:, None, None] * config.rope_theta ** (-np.arange(half) / half)
    is_float = checkpoint.source.tensors["blk.0.attn_q.weight"].type == "F16"

    def product(activations: Any, weight: Any) -> Any:
        rounded = activations if is_float else as_bytes(activations)
        return rounded @ weight.numpy().astype(np.float64).T

    def norm(rows_: Any, weight: Any) -> Any:
        mean = np.mean(rows_**2, axis=1, keepdims=True)
        return rows_ / np.sqrt(mean + config.rms_norm_eps) * weight.numpy()

    def heads(flat: Any) -> Any:
        return flat.reshape(n, -1, config.head_dim)

    def rotate(each: Any) -> Any:
        a, b = each[..., 0::2], each[..., 1::2]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.stack((a * cos - b * sin, b * cos + a * sin), axis=-1).reshape(each.shape)

    w = checkpoint.block(0)
    normed = norm(x, w.attn_norm)
    # Two bytes: what the first leaves out is rounded and multiplied too.
    q, k, v = (
        product(normed, weight) + product(normed - as_bytes(normed), weight) * (not is_float)
        for weight in (w.q, w.k, w.v)
    )
    q, k = rotate(heads(q)), rotate(heads(k))
    k, v = (a.astype(np.float16).astype(np.float64) for a in (k, heads(v)))
    scores = np.einsum("thd,shd->hts", q, k.repeat(group, 1)) / np.sqrt(config.head_dim)
    scores[:, np.triu(np.ones((n, n), dtype=bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    x = x + product(np.einsum("hts,shd->thd", weights, v.repeat(group, 1)).reshape(n, -1), w.o)
    normed = norm(x, w.ffn_norm)
    gate = product(normed, w.gate)
    return x + product(gate / (1 + np.exp(-gate)) * product(normed, w.up), w.down)


def relative_error(actual: Any, expected: Any) -> float:
    return float(np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2)))


def test_a_block_computes_the_reference_with_rounded_activations(
    small: Checkpoint, library: Library
) -> None:
    stage = load_native_stage(small, (0, 1), engine=Engine(library, 1))
    hidden = rows(150)
    error = relative_error(run(stage, hidden, [150]), reference(small, hidden))
    assert error < 0.005  # what is left are values that fall on the other side of a half step


def test_a_small_model_is_near_what_torch_computes(small: Checkpoint, library: Library) -> None:
    span = (0, SMALL.n_blocks)
    hidden = rows(150)
    expected = run(load_stage(small, span), hidden, [150])
    stage = load_native_stage(small, span, engine=Engine(library, 1))
    assert relative_error(run(stage, hidden, [150]), expected) < 0.1  # random weights amplify


def test_head_dimensions_and_rope_layouts(tmp_path: Path, library: Library) -> None:
    odd = replace(SMALL, n_heads=4, n_kv_heads=1, head_dim=80, rope_dim=48)
    with open_checkpoint(
        write_quantized(tmp_path / "odd.gguf", odd, "F16"), cache_dir=tmp_path
    ) as checkpoint:
        expected = run(load_stage(checkpoint, (0, 3)), rows(70), [70])
        stage = load_native_stage(checkpoint, (0, 3), engine=Engine(library, 2))
        assert np.abs(run(stage, rows(70), [70]) - expected).max() < 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_and_threads_change_no_bit(
    small: Checkpoint, library: Library, threads: int
) -> None:
    hidden = rows(330)
    single: Any = load_native_stage(small, (0, 3), engine=Engine(library, 1))
    chunked: Any = load_native_stage(small, (0, 3), engine=Engine(library, threads))
    expected = run(single, hidden, [1])
    for sizes in ([330], [128], [1, 2, 3, 5, 7, 11, 13, 40]):
        assert np.array_equal(run(chunked, hidden, sizes), expected)
        pages = [stage._sessions._sessions["s"].pages.table for stage in (single, chunked)]
        assert len(pages[0]) == 6
        for one, other in zip(*pages, strict=True):
            assert np.array_equal(one.memory, other.memory)


def test_instruction_sets_give_the_same_bits(small: Checkpoint) -> None:
    portable = load_library("portable")
    best = load_library(portable.best_isa)
    hidden = rows(90)
    results = [
        run(load_native_stage(small, (0, 3), engine=Engine(each, 1)), hidden, [50])
        for each in (portable, best)
    ]
    heads = [load_native_head(small, engine=Engine(each, 1)) for each in (portable, best)]
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(heads[0].logits(hidden), heads[1].logits(hidden))


def test_a_stage_cut_in_two_computes_the_same(small: Checkpoint, library: Library) -> None:
    engine = Engine(library, 1)
    whole = load_native_stage(small, (0, 3), engine=engine)
    parts = [load_native_stage(small, span, engine=engine) for span in ((0, 1), (1, 3))]
    hidden = rows(20)
    first = run(parts[0], hidden, [20])
    assert np.array_equal(run(parts[1], first, [20]), run(whole, hidden, [20]))


def test_a_session_can_be_rewound(small: Checkpoint, library: Library) -> None:
    stage = load_native_stage(small, (0, 3), engine=Engine(library, 1))
    hidden = rows(100)
    expected = run(stage, hidden, [100])
    stage.forward("s", 60, rows(40, seed=1))
    assert np.array_equal(stage.forward("s", 60, hidden[60:]), expected[60:])
    stage.forward("s", 10, hidden[10:11])
    with pytest.raises(PositionGap):
        stage.forward("s", 60, hidden[60:])


def test_values_that_are_not_finite_are_reported_and_leave_no_trace(
    small: Checkpoint, library: Library
) -> None:
    stage = load_native_stage(small, (0, 3), engine=Engine(library, 1))
    hidden = rows(70)
    expected = run(stage, hidden, [70])
    for bad in (np.nan, np.inf):
        broken = hidden.copy()
        broken[40, 3] = bad
        stage.open_session("s", 70)
        with pytest.raises(NonFiniteValues) as caught:
            stage.forward("s", 0, broken)
        assert caught.value.is_received
        assert np.array_equal(stage.forward("s", 0, hidden[:45]), expected[:45])
        assert np.array_equal(stage.forward("s", 45, hidden[45:]), expected[45:])


def test_what_the_stage_refuses(small: Checkpoint, library: Library) -> None:
    stage = load_native_stage(small, (0, 3), engine=Engine(library, 1))
    with pytest.raises(UnknownSession):
        stage.forward("s", 0, rows(1))
    with pytest.raises(CacheOverflow):
        stage.open_session("s", SMALL.context_length + 1)
    stage.open_session("s", 10)
    with pytest.raises(CacheOverflow):  # though the last tile has room for more
        stage.forward("s", 0, rows(11))
    with pytest.raises(PositionGap):
        stage.forward("s", 1, rows(1))
    with pytest.raises(InvalidHiddenStates):
        stage.forward("s", 0, rows(1).astype(np.float64))
    with pytest.raises(ValueError, match="span"):
        load_native_stage(small, (2, 4))


def test_input_is_not_modified_and_may_be_strided(small: Checkpoint, library: Library) -> None:
    stage = load_native_stage(small, (0, 3), engine=Engine(library, 1))
    hidden = rows(12)
    hidden.flags.writeable = False
    strided = hidden[::2]
    assert np.array_equal(run(stage, strided, [6]), run(stage, strided.copy(), [6]))


def test_a_scale_that_is_nan_is_refused_with_its_place(tmp_path: Path) -> None:
    path = write_quantized(tmp_path / "nan.gguf", SMALL, "Q4_1", break_scale=True)
    with open_checkpoint(path, cache_dir=tmp_path) as checkpoint:
        at = checkpoint.source.tensors["blk.1.attn_output.weight"].offset + 40
        with pytest.raises(CorruptModel, match=rf"blk\.1\.attn_output\.weight.*byte {at}"):
            load_native_stage(checkpoint, (0, 3))


def test_a_head_dimension_that_is_not_whole_vectors_is_refused(tmp_path: Path) -> None:
    config = replace(SMALL, n_heads=4, n_kv_heads=4, head_dim=24, rope_dim=24)
    path = write_quantized(tmp_path / "narrow.gguf", config, "Q8_0")
    with (
        open_checkpoint(path, cache_dir=tmp_path) as checkpoint,
        pytest.raises(UnsupportedModel, match="head_dim = 24"),
    ):
        load_native_stage(checkpoint, (0, 3))


def test_an_embedding_is_the_torch_embedding(small: Checkpoint, library: Library) -> None:
    head = load_native_head(small, engine=Engine(library, 1))
    ids = list(range(SMALL.vocab_size))
    expected = load_head(small).embed(ids)
    assert np.array_equal(head.embed(ids), expected)
    with pytest.raises(UnknownToken):
        head.embed([SMALL.vocab_size])


def test_logits_are_close_to_those_of_torch(small: Checkpoint, library: Library) -> None:
    head = load_native_head(small, engine=Engine(library, 2))
    expected = load_head(small).logits(rows(5))
    actual = head.logits(rows(5))
    assert np.abs(actual - expected).max() < 2e-2 * np.abs(expected).max()
    assert np.array_equal(actual[2:3], head.logits(rows(5)[2:3]))


def test_an_instruction_set_that_the_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelsUnavailable, match="'cray'"):
        load_library("cray")
    load_library.cache_clear()
    monkeypatch.setenv("COVEY_KERNELS", "portable")
    assert load_library().isa == "portable"
    load_library.cache_clear()


def log_softmax(logits: Any) -> Any:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    ("n_prompts", "n_tokens"), [(1, 24), pytest.param(len(PROMPTS), 64, marks=pytest.mark.lab)]
)
def test_smollm2_is_as_close_to_fp32_as_its_activations_allow(
    smollm2: Checkpoint, n_prompts: int, n_tokens: int
) -> None:
    """Teacher-forced over tokens that torch fp32 chose."""
    span = (0, smollm2.config.n_blocks)
    exact, exact_head = load_stage(smollm2, span), load_head(smollm2)
    engine = Engine(load_library(), 2)
    fast = load_native_stage(smollm2, span, engine=engine)
    fast_head = load_native_head(smollm2, engine=engine)
    tokenizer = smollm2.tokenizer()
    divergences, agreements = [], []
    for prompt in PROMPTS[:n_prompts]:
        ids = tokenizer.encode(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
        exact.open_session("s", len(ids) + n_tokens)
        fast.open_session("s", len(ids) + n_tokens)
        feed, at = ids, 0
        for _ in range(n_tokens):
            pair = [
                head.logits(stage.forward("s", at, head.embed(feed))[-1:])[0]
                for stage, head in ((exact, exact_head), (fast, fast_head))
            ]
            p, q = (log_softmax(logits) for logits in pair)
            divergences.append(float((np.exp(p) * (p - q)).sum()))
            agreements.append(p.argmax() == q.argmax())
            at += len(feed)
            feed = [int(p.argmax())]
    assert np.mean(divergences) < 5e-3
    assert np.mean(agreements) >= 0.975


def test_smollm2_speaks(smollm2: Checkpoint) -> None:
    engine = Engine(load_library(), 2)
    stage = load_native_stage(smollm2, (0, smollm2.config.n_blocks), engine=engine)
    head = load_native_head(smollm2, engine=engine)
    tokenizer = smollm2.tokenizer()
    ids = tokenizer.encode(
        "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
    )
    params = SamplingParams(temperature=0, max_tokens=24)
    assert "sky" in "".join(generate_text(stage, head, tokenizer, ids, params))
