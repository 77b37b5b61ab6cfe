"""Sessions that run together, or share pages, compute what each computes alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from covey.node.engine.errors import (
    CacheFull,
    CacheOverflow,
    InvalidHiddenStates,
    NonFiniteValues,
    PositionGap,
    UnknownSession,
)
from covey.node.engine.stage import Step
from covey.node.kernels.errors import KernelsUnavailable
from covey.node.kernels.library import Engine, load_library
from covey.node.kernels.native_stage import NativeStage, load_native_stage
from covey.node.model.checkpoint import Checkpoint, open_checkpoint
from support.tiny_weights import SMALL, rows, write_quantized

N = 340  # positions of every session
SESSIONS = 5


@dataclass
class Model:
    """Stages on one checkpoint, and the hidden states of N rows for each of a few inputs."""

    checkpoint: Checkpoint
    engines: list[Engine] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    expected: list[Any] = field(default_factory=list)

    def stage(self, engine: Engine, **options: Any) -> NativeStage:
        return load_native_stage(self.checkpoint, (0, SMALL.n_blocks), engine=engine, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("batches")
    path = write_quantized(folder / "small.gguf", SMALL, "Q4_1")
    with open_checkpoint(path, cache_dir=folder) as checkpoint:
        made = Model(checkpoint, [Engine(load_library(), n) for n in (1, 3)])
        made.inputs = [rows(N, seed=i) for i in range(SESSIONS)]
        stage = made.stage(made.engines[0])
        for hidden in made.inputs:
            stage.open_session("s", N)
            made.expected.append(stage.forward("s", 0, hidden))
        yield made


@given(
    data=st.data(),
    threads=st.sampled_from([0, 1]),
    sizes=st.lists(
        st.lists(st.sampled_from([0, 1, 1, 2, 7, 64, 150, 250]), min_size=5, max_size=5),
        min_size=1,
        max_size=12,
    ),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_session_in_any_batches_computes_what_it_does_alone(
    model: Model, data: st.DataObject, threads: int, sizes: list[list[int]]
) -> None:
    stage = model.stage(model.engines[threads])
    lengths = [0] * SESSIONS
    for i in range(SESSIONS):
        stage.open_session(str(i), N)
    for batch in sizes:
        order = data.draw(st.permutations(range(SESSIONS)))
        steps = []
        for i in order:
            end = min(lengths[i] + batch[i], N)
            if end > lengths[i]:
                steps.append(Step(str(i), lengths[i], model.inputs[i][lengths[i] : end]))
                lengths[i] = end
        for step, result in zip(steps, stage.forward_batch(steps), strict=True):
            assert not isinstance(result, Exception)
            end = step.position + len(step.hidden)
            assert np.array_equal(result, model.expected[int(step.session)][step.position : end])


def test_two_steps_of_one_session_are_taken_in_order(model: Model) -> None:
    stage = model.stage(model.engines[1])
    stage.open_session("a", N)
    hidden = model.inputs[0]
    results: Any = stage.forward_batch([Step("a", 0, hidden[:70]), Step("a", 70, hidden[70:71])])
    assert np.array_equal(results[0], model.expected[0][:70])
    assert np.array_equal(results[1], model.expected[0][70:71])


def test_a_step_that_fails_spoils_no_other(model: Model) -> None:
    stage = model.stage(model.engines[1])
    for name in ("good", "nan", "gap", "short", "other"):
        stage.open_session(name, 20 if name == "short" else N)
    broken = model.inputs[1][:30].copy()
    broken[7, 3] = np.nan
    good, more = model.inputs[0][:100], model.inputs[2][:1]
    steps = [
        *(Step("nan", 0, broken), Step("good", 0, good), Step("gap", 1, more)),
        *(Step("nobody", 0, more), Step("short", 0, good), Step("other", 0, more[:, :8])),
        Step("other", 0, more),
    ]
    results: Any = stage.forward_batch(steps)
    failed = (
        NonFiniteValues,
        None,
        PositionGap,
        UnknownSession,
        CacheOverflow,
        InvalidHiddenStates,
    )
    for result, error in zip(results, failed, strict=False):
        assert error is None or isinstance(result, error)
    assert np.array_equal(results[1], model.expected[0][:100])
    assert np.array_equal(results[6], model.expected[2][:1])
    assert np.array_equal(stage.forward("nan", 0, model.inputs[1][:30]), model.expected[1][:30])


def keys(hidden: Any) -> list[bytes]:
    """One key for each full page, as a head makes them from its tokens."""
    return [sha256(hidden[: 64 * (i + 1)].tobytes()).digest() for i in range(len(hidden) // 64)]


def test_sessions_with_the_same_beginning_share_pages(model: Model) -> None:
    stage = model.stage(model.engines[1])
    hidden, expected = model.inputs[0], model.expected[0]
    assert stage.open_session("a", N, keys(hidden)) == 0
    stage.forward("a", 0, hidden[:200])
    assert stage.open_session("b", N, keys(hidden)) == 192
    assert np.array_equal(stage.forward("b", 192, hidden[192:]), expected[192:])
    before = stage.memory_bytes
    stage.close_session("a")
    stage.close_session("b")
    assert 0 < stage.memory_bytes < before
    # All but the last position of what is kept: the page it is in is copied.
    assert stage.open_session("c", N, keys(hidden)) == 320
    assert np.array_equal(stage.forward("c", 319, hidden[319:]), expected[319:])
    # The same keys but for the last two pages, and then other rows.
    other = np.concatenate([hidden[:192], model.inputs[1][192:]])
    assert stage.open_session("d", N, keys(other)) == 192
    alone = model.stage(model.engines[0])
    alone.open_session("d", N)
    assert np.array_equal(stage.forward("d", 192, other[192:]), alone.forward("d", 0, other)[192:])


def test_what_was_rewritten_is_not_shared(model: Model) -> None:
    stage = model.stage(model.engines[0])
    hidden, others = model.inputs[0], model.inputs[1]
    stage.open_session("a", N, keys(hidden))
    stage.forward("a", 0, hidden[:130])
    stage.forward("a", 70, others[70:200])
    assert stage.open_session("b", N, keys(hidden)) == 128  # as they were before
    assert np.array_equal(stage.forward("b", 128, hidden[128:]), model.expected[0][128:])


def test_memory_is_limited_when_a_session_opens_and_not_later(model: Model) -> None:
    page = model.stage(model.engines[0]).kv_bytes_per_token * 64
    stage = model.stage(model.engines[0], kv_bytes=8 * page + 7, kept_bytes=8 * page)
    hidden = model.inputs[0]
    stage.open_session("a", N, keys(hidden))  # 6 pages
    stage.forward("a", 0, hidden)
    with pytest.raises(CacheFull) as caught:
        stage.open_session("b", 129)
    assert caught.value.free_bytes == 2 * page
    assert stage.open_session("b", 128, keys(hidden)) == 128
    assert np.array_equal(stage.forward("b", 127, hidden[127:128]), model.expected[0][127:128])
    stage.close_session("a")
    assert stage.open_session("c", N, keys(model.inputs[1])) == 0  # kept pages make way
    assert np.array_equal(stage.forward("c", 0, model.inputs[1]), model.expected[1])
    assert stage.memory_bytes <= 8 * page


def test_keys_and_values_as_bytes_lose_little_and_no_batch_changes_them(model: Model) -> None:
    one, three = (model.stage(engine, kv_dtype="int8") for engine in model.engines)
    exact = model.stage(model.engines[0])
    assert one.kv_bytes_per_token < 0.63 * exact.kv_bytes_per_token  # 32 bytes and a scale of 4
    for stage in (one, three):
        for name in ("a", "b"):
            stage.open_session(name, N)
    whole = one.forward("a", 0, model.inputs[0])
    error = np.sqrt(np.mean((whole - model.expected[0]) ** 2) / np.mean(model.expected[0] ** 2))
    assert 0 < error < 0.1  # random weights amplify
    for at in range(0, N, 20):
        chunk, other = model.inputs[0][at : at + 20], model.inputs[1][at // 20 :][:1]
        results: Any = three.forward_batch([Step("b", at // 20, other), Step("a", at, chunk)])
        assert np.array_equal(results[1], whole[at : at + 20])


def test_a_slower_engine_and_one_on_chosen_cores_compute_the_same(model: Model) -> None:
    library, hidden = load_library(), model.inputs[0]
    core = min(os.sched_getaffinity(0))
    for engine in (Engine(library, 1, speed=0.5), Engine(library, 2, helper_cores=[core])):
        stage = model.stage(engine)
        stage.open_session("a", N)
        assert np.array_equal(stage.forward("a", 0, hidden[:70]), model.expected[0][:70])


def test_cores_that_the_machine_has_not_are_refused() -> None:
    with pytest.raises(KernelsUnavailable, match=r"on cores \[1023\]"):
        Engine(load_library(), 2, helper_cores=[1023])
    with pytest.raises(ValueError, match="1 cores for 2 helpers"):
        Engine(load_library(), 3, helper_cores=[0])
