"""The torch stage as a `Stage`: sessions, positions, and errors with their facts."""

from __future__ import annotations

from collections.abc import Iterator

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
from covey.node.engine.generate import generate, generate_text, prefill_chunks
from covey.node.engine.head import Head, load_head
from covey.node.engine.measure import measure_blocks, rising
from covey.node.engine.stage import Stage
from covey.node.engine.tensors import NUMPY_DTYPES, EngineDtype, HiddenStates
from covey.node.engine.torch_stage import load_stage
from covey.node.model.checkpoint import Checkpoint, open_checkpoint
from covey.node.model.sampling import SamplingParams
from support.tiny_models import TINY, write_tiny_gguf


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    folder = tmp_path_factory.mktemp("model")
    with open_checkpoint(write_tiny_gguf(folder / "t.gguf"), cache_dir=folder) as opened:
        yield opened


@pytest.fixture(params=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> EngineDtype:
    return "bf16" if request.param == "bf16" else "fp32"


@pytest.fixture
def stage(checkpoint: Checkpoint, dtype: EngineDtype) -> Stage:
    loaded = load_stage(checkpoint, (1, 3), dtype)
    loaded.open_session("s", 16)
    return loaded


@pytest.fixture
def head(checkpoint: Checkpoint, dtype: EngineDtype) -> Head:
    return load_head(checkpoint, dtype)


@pytest.fixture
def rows(head: Head) -> HiddenStates:
    return head.embed(list(range(10, 18)))


def test_figures_of_a_stage(stage: Stage, dtype: EngineDtype) -> None:
    itemsize = 4 if dtype == "fp32" else 2
    assert (stage.span, stage.dtype, stage.hidden_size) == ((1, 3), dtype, 32)
    assert stage.kv_bytes_per_token == 2 * 2 * 2 * 8 * itemsize
    # Per block: two norms, q and o, k and v, gate, up and down.
    assert stage.weight_bytes == 2 * itemsize * (2 * 32 + 2 * 32**2 + 2 * 16 * 32 + 3 * 64 * 32)


def test_progress_is_told_after_each_block(checkpoint: Checkpoint) -> None:
    told: list[tuple[int, int]] = []
    load_stage(checkpoint, (0, 3), on_block=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("span", [(0, 0), (2, 1), (-1, 2), (0, 5)])
def test_span_outside_the_model(checkpoint: Checkpoint, span: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="a model of 4 blocks"):
        load_stage(checkpoint, span)


def test_shape_and_dtype_are_kept_and_the_input_is_not_touched(
    stage: Stage, rows: HiddenStates
) -> None:
    before = rows.copy()
    result = stage.forward("s", 0, rows)
    assert (result.shape, result.dtype) == (rows.shape, rows.dtype)
    assert np.array_equal(rows, before)
    assert not np.array_equal(result, before)


def test_read_only_and_strided_rows_are_taken(stage: Stage, rows: HiddenStates) -> None:
    expected = stage.forward("s", 0, rows)
    frozen = np.frombuffer(rows.tobytes(), rows.dtype).reshape(rows.shape)
    assert np.array_equal(stage.forward("s", 0, frozen), expected)
    strided = np.repeat(rows, 2, axis=0)[::2]
    assert np.array_equal(stage.forward("s", 0, strided), expected)


def test_rewind_gives_the_same_bits(stage: Stage, rows: HiddenStates) -> None:
    stage.forward("s", 0, rows[:4])
    first = stage.forward("s", 4, rows[4:])
    stage.forward("s", 2, rows[::-1].copy())
    stage.forward("s", 0, rows[:4])
    assert np.array_equal(stage.forward("s", 4, rows[4:]), first)


def test_sessions_do_not_see_each_other(stage: Stage, rows: HiddenStates) -> None:
    alone = stage.forward("s", 0, rows)
    stage.open_session("other", 16)
    stage.forward("other", 0, rows[::-1].copy())
    stage.forward("s", 0, rows[:4])
    stage.forward("other", 2, rows[:1])
    stage.open_session("s", 16)
    assert np.array_equal(stage.forward("s", 0, rows), alone)


def test_unknown_session(stage: Stage, rows: HiddenStates) -> None:
    with pytest.raises(UnknownSession) as caught:
        stage.forward("nobody", 0, rows)
    assert caught.value.session == "nobody"
    stage.close_session("s")
    stage.close_session("s")
    with pytest.raises(UnknownSession):
        stage.forward("s", 0, rows)


@pytest.mark.parametrize("position", [-1, 1, 5])
def test_gap(stage: Stage, rows: HiddenStates, position: int) -> None:
    with pytest.raises(PositionGap) as caught:
        stage.forward("s", position, rows)
    assert (caught.value.position, caught.value.length) == (position, 0)


def test_overflow_of_a_session(stage: Stage, rows: HiddenStates) -> None:
    stage.forward("s", 0, rows)
    stage.forward("s", 8, rows)
    with pytest.raises(CacheOverflow) as caught:
        stage.forward("s", 16, rows[:1])
    assert (caught.value.needed_tokens, caught.value.capacity_tokens) == (17, 16)


def test_overflow_of_the_context(stage: Stage) -> None:
    with pytest.raises(CacheOverflow):
        stage.open_session("t", TINY.context_length + 1)
    with pytest.raises(ValueError, match="n_tokens = 0"):
        stage.open_session("t", 0)


def test_rows_of_another_shape_or_dtype(stage: Stage, rows: HiddenStates) -> None:
    other = np.uint16 if rows.dtype == np.float32 else np.float32
    for bad in (rows[:, :16], rows[0], rows[:0], rows.astype(other)):
        with pytest.raises(InvalidHiddenStates, match="expected"):
            stage.forward("s", 0, bad)


def test_nan_that_came_in_is_told_from_nan_that_was_made(stage: Stage, rows: HiddenStates) -> None:
    stage.forward("s", 0, rows[:3])
    poisoned = rows[3:5].copy()
    poisoned[0, 0] = np.nan if rows.dtype == np.float32 else 0x7FC0
    with pytest.raises(NonFiniteValues) as caught:
        stage.forward("s", 3, poisoned)
    assert caught.value.is_received
    # The session is as it was: the step can be made again.
    assert np.isfinite(stage.forward("s", 3, rows[3:5]).astype(np.float32)).all()


def test_unknown_token(head: Head) -> None:
    for bad in (-1, TINY.vocab_size):
        with pytest.raises(UnknownToken) as caught:
            head.embed([bad])
        assert caught.value.token == bad


def test_logits_are_fp32_and_of_the_vocabulary(head: Head, rows: HiddenStates) -> None:
    logits = head.logits(rows)
    assert logits.shape == (8, TINY.vocab_size)
    assert logits.dtype == np.dtype(np.float32)
    with pytest.raises(InvalidHiddenStates):
        head.logits(rows[0])


@pytest.mark.parametrize(
    ("n_tokens", "start", "chunks"),
    [
        (1, 0, [(0, 1)]),
        (128, 0, [(0, 128)]),
        (300, 0, [(0, 128), (128, 256), (256, 300)]),
        (300, 100, [(100, 128), (128, 256), (256, 300)]),
        (5, 5, []),
    ],
)
def test_chunks_of_a_prompt(n_tokens: int, start: int, chunks: list[tuple[int, int]]) -> None:
    assert list(prefill_chunks(n_tokens, start=start)) == chunks


def test_generation_is_what_one_forward_per_token_gives(checkpoint: Checkpoint) -> None:
    stage, head = load_stage(checkpoint, (0, 4)), load_head(checkpoint)
    prompt = [5 + i % 200 for i in range(150)]
    tokens = [token.id for token in generate(stage, head, prompt, SamplingParams(max_tokens=5))]
    stage.open_session("by hand", 154)
    stage.forward("by hand", 0, head.embed(prompt[:128]))
    hidden = stage.forward("by hand", 128, head.embed(prompt[128:]))
    for position, token in enumerate(tokens, start=150):
        assert token == head.logits(hidden[-1:])[0].argmax()
        if position < 154:
            hidden = stage.forward("by hand", position, head.embed([token]))
    with pytest.raises(UnknownSession):
        stage.forward("local", 0, hidden)


def test_end_token_ends_the_text_and_is_not_shown(checkpoint: Checkpoint) -> None:
    stage, head = load_stage(checkpoint, (0, 4)), load_head(checkpoint)
    params = SamplingParams(max_tokens=6)
    free = [token.id for token in generate(stage, head, [7, 8], params)]
    end = frozenset({free[3]})
    run = generate(stage, head, [7, 8], params, eos_ids=end)
    assert [token.id for token in run] == free[: free.index(free[3])]


def test_generation_longer_than_the_context(checkpoint: Checkpoint) -> None:
    stage, head = load_stage(checkpoint, (0, 4)), load_head(checkpoint)
    with pytest.raises(CacheOverflow):
        next(generate(stage, head, [7] * 500, SamplingParams(max_tokens=100)))


def test_text_stops_at_a_stop_text(checkpoint: Checkpoint) -> None:
    stage, head = load_stage(checkpoint, (0, 4)), load_head(checkpoint)
    tokenizer = checkpoint.tokenizer()
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3)
    text = "".join(generate_text(stage, head, tokenizer, [7, 8], params))
    assert len(text) > 4
    stop = text[2:4]
    stopped = SamplingParams(max_tokens=12, temperature=1.0, seed=3, stop=(stop,))
    shown = "".join(generate_text(stage, head, tokenizer, [7, 8], stopped))
    assert shown == text[: text.index(stop)]


def test_measuring_leaves_no_session_and_takes_medians(stage: Stage) -> None:
    ticks = iter(float(second) for second in range(10_000))
    shares: list[float] = []
    times = measure_blocks(
        stage, stage, context_length=512, clock=lambda: next(ticks), progress=shares.append
    )
    # A fake clock that gains a second per reading, so each sample is one step of a second.
    assert times.decode_s == pytest.approx(1 / 2)
    assert times.batch_decode_s == pytest.approx((1 / 2,) * 3)
    assert times.prefill_s == ((16, 1 / 2), (64, 1 / 2), (128, 1 / 2))
    assert times.prefill_s_per_token == pytest.approx(1 / 128 / 2)
    assert times.depth_s == 0.0
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    for name in ("measure-0", "measure-shallow", "measure-chunk", "measure-deep"):
        with pytest.raises(UnknownSession):
            stage.forward(name, 0, np.zeros((1, 32), NUMPY_DTYPES[stage.dtype]))


def test_a_model_with_little_context_is_measured_within_it(stage: Stage) -> None:
    times = measure_blocks(stage, stage, context_length=24, budget_s=0.0)
    assert [n_tokens for n_tokens, _ in times.prefill_s] == [16]
    assert times.decode_s > 0


def test_times_of_larger_batches_are_made_to_never_fall() -> None:
    assert rising([1.0, 2.0, 4.0]) == [1.0, 2.0, 4.0]
    assert rising([1.0, 3.0, 2.0, 4.0]) == [1.0, 2.5, 2.5, 4.0]
    assert rising([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]
    assert rising([]) == []
