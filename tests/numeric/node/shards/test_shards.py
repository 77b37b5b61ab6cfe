"""The partial sums of a group's members add up to what one process computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
import pytest

from covey.node.engine.errors import (
    CacheFull,
    CacheOverflow,
    InvalidHiddenStates,
    PositionGap,
    UnknownSession,
)
from covey.node.engine.shard import Slice
from covey.node.engine.slices import whole_slice
from covey.node.engine.stage import Step
from covey.node.engine.tensors import EngineKind
from covey.node.engines import Engines
from covey.node.kernels.errors import KernelsUnavailable
from covey.node.kernels.library import load_library
from covey.node.kernels.packed_cache import PackedCache
from covey.node.model.checkpoint import Checkpoint, open_checkpoint
from support.shard_group import ShardGroup, as_bf16, as_floats, slices
from support.tiny_weights import SMALL, rows, write_quantized

CONFIG = replace(SMALL, n_heads=6, n_kv_heads=3)
SPAN = (0, CONFIG.n_blocks)
N = 200
SHARES = {
    "two, uneven": slices((2, 32), (1, 128)),
    "three": slices((1, 64), (1, 64), (1, 32)),
    "three, one without heads and one without columns": slices((2, 0), (0, 96), (1, 64)),
    "four, two without heads": slices((0, 32), (1, 32), (2, 64), (0, 32)),
}
UNEVEN = SHARES["two, uneven"]
ODD = SHARES["three, one without heads and one without columns"]
# Another order of sums; behind it parts are rounded in bf16, and keys and values in the native one.
TOLERANCES: dict[EngineKind, float] = {"fp32": 1e-5, "bf16": 0.04, "native": 1e-3}

Group = Callable[..., ShardGroup]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Checkpoint]]:
    folder = tmp_path_factory.mktemp("shards")
    with ExitStack() as stack:
        yield {
            stored: stack.enter_context(
                open_checkpoint(
                    write_quantized(folder / f"{stored}.gguf", CONFIG, stored), cache_dir=folder
                )
            )
            for stored in ("F16", "Q8_0", "Q4_1")
        }


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    try:
        load_library()
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    return Engines("auto", 1, PackedCache(tmp_path_factory.mktemp("packed")))


@pytest.fixture(params=["fp32", "bf16", "native"])
def kind(request: pytest.FixtureRequest) -> EngineKind:
    chosen: EngineKind = request.param
    return chosen


@pytest.fixture
def group(engines: Engines, checkpoints: dict[str, Checkpoint], kind: EngineKind) -> Group:
    """Makes a group of a kind of engine on the F16 model."""

    def make(cuts: list[Slice], **options: Any) -> ShardGroup:
        return ShardGroup(
            [engines.load_shard(checkpoints["F16"], SPAN, cut, kind, **options) for cut in cuts]
        )

    return make


def inputs(kind: EngineKind, n: int = N, seed: int = 0) -> Any:
    hidden = rows(n, CONFIG, seed)
    return as_bf16(hidden) if kind == "bf16" else hidden


def in_calls(stage: Any, hidden: Any, sizes: tuple[int, ...] = (130, 1, 1, 68)) -> Any:
    """All rows in calls of these sizes."""
    stage.open_session("s", len(hidden))
    out, at = [], 0
    for size in sizes:
        out.append(stage.forward("s", at, hidden[at : at + size]))
        at += size
    return np.concatenate(out)


def keys(hidden: Any) -> list[bytes]:
    return [sha256(hidden[: 64 * (i + 1)].tobytes()).digest() for i in range(len(hidden) // 64)]


def rms(x: Any) -> float:
    return float(np.sqrt(np.mean(x**2)))


def relative_error(actual: Any, expected: Any) -> float:
    actual, expected = as_floats(actual), as_floats(expected)
    return rms(actual - expected) / rms(expected)


@pytest.mark.parametrize("cuts", SHARES.values(), ids=SHARES)
def test_parts_add_up_to_the_whole(
    engines: Engines,
    checkpoints: dict[str, Checkpoint],
    group: Group,
    kind: EngineKind,
    cuts: list[Slice],
) -> None:
    whole = engines.load_stage(checkpoints["F16"], SPAN, kind)
    expected = in_calls(whole, inputs(kind))
    actual = in_calls(group(cuts), inputs(kind))
    assert relative_error(actual, expected) < TOLERANCES[kind]


@pytest.mark.parametrize("stored", ["Q8_0", "Q4_1"])
def test_quantised_parts_add_up_too(
    engines: Engines, checkpoints: dict[str, Checkpoint], stored: str
) -> None:
    checkpoint = checkpoints[stored]
    expected = in_calls(engines.load_stage(checkpoint, SPAN, "native"), rows(N, CONFIG))
    exact = in_calls(engines.load_stage(checkpoint, SPAN, "fp32"), rows(N, CONFIG))
    for cuts in SHARES.values():
        shards = [engines.load_shard(checkpoint, SPAN, cut, "native") for cut in cuts]
        actual = in_calls(ShardGroup(shards), rows(N, CONFIG))
        # As far from the exact result as one process is, and no further.
        assert rms(actual - exact) < 1.1 * rms(expected - exact)


def test_the_whole_as_a_shard_is_the_stage_bit_for_bit(
    engines: Engines, checkpoints: dict[str, Checkpoint]
) -> None:
    for checkpoint in checkpoints.values():
        stage = engines.load_stage(checkpoint, SPAN, "native")
        shard = engines.load_shard(checkpoint, SPAN, whole_slice(CONFIG), "native")
        hidden = rows(N, CONFIG)
        assert np.array_equal(in_calls(ShardGroup([shard]), hidden), in_calls(stage, hidden))
        assert shard.weight_bytes == stage.weight_bytes
        assert shard.kv_bytes_per_token == stage.kv_bytes_per_token


def test_a_shard_takes_the_memory_of_its_part(group: Group, kind: EngineKind) -> None:
    [whole] = group([whole_slice(CONFIG)]).shards
    parts = group(ODD).shards
    n_norms = sum(bool(cut.kv_heads[1] > cut.kv_heads[0]) for cut in ODD) + sum(
        bool(cut.mlp_columns[1] > cut.mlp_columns[0]) for cut in ODD
    )
    itemsize = 2 if kind == "bf16" else 4
    norms = CONFIG.n_blocks * CONFIG.hidden_size * itemsize
    matrices = sum(part.weight_bytes for part in parts) - n_norms * norms
    assert matrices == whole.weight_bytes - 2 * norms
    assert sum(part.kv_bytes_per_token for part in parts) == whole.kv_bytes_per_token
    assert [part.kv_bytes_per_token == 0 for part in parts] == [False, True, False]
    assert [part.slice for part in parts] == ODD
    assert {part.hidden_size for part in parts} == {CONFIG.hidden_size}


def test_sessions_in_one_step_compute_what_each_does_alone(group: Group, kind: EngineKind) -> None:
    together = group(ODD)
    hidden = [inputs(kind, 120, seed) for seed in range(3)]
    alone = [in_calls(together, each, (100, 20)) for each in hidden]
    for i in range(3):
        together.open_session(str(i), 120)
    for start, end in ((0, 100), (100, 120)):
        steps = [Step(str(i), start, hidden[i][start:end]) for i in range(3)]
        results: list[Any] = together.forward_batch(steps)
        for i, result in enumerate(results):
            assert np.array_equal(result, alone[i][start:end])


def test_a_session_can_be_rewound(group: Group, kind: EngineKind) -> None:
    members, hidden = group(ODD), inputs(kind, 100)
    expected = in_calls(members, hidden, (60, 40))
    members.forward("s", 60, inputs(kind, 40, seed=1))
    assert np.array_equal(members.forward("s", 60, hidden[60:]), expected[60:])
    members.forward("s", 10, hidden[10:11])
    with pytest.raises(PositionGap):
        members.forward("s", 60, hidden[60:])


@pytest.mark.parametrize("n_halves", [0, 1, 4, 6])
def test_a_step_that_was_given_up_leaves_no_trace(
    group: Group, kind: EngineKind, n_halves: int
) -> None:
    members, hidden = group(ODD), inputs(kind, 100)
    expected = in_calls(members, hidden, (60, 40))
    members.open_session("s", 100)
    members.forward("s", 0, hidden[:60])
    for broken in (inputs(kind, 40, seed=1), hidden[60:]):
        assert members.begin([Step("s", 60, broken)]) == [None]
        members.through(broken, n_halves)
        members.end(is_done=False)
        assert members.begin([Step("s", 61, broken[:1])])[0] is not None  # still 60 long
    assert np.array_equal(members.forward("s", 60, hidden[60:]), expected[60:])


def test_a_step_that_is_begun_again_forgets_the_one_before(group: Group, kind: EngineKind) -> None:
    members, hidden = group(UNEVEN), inputs(kind, 50)
    expected = in_calls(members, hidden, (50,))
    members.open_session("s", 50)
    members.begin([Step("s", 0, inputs(kind, 20, seed=1))])
    members.through(inputs(kind, 20, seed=1), 3)
    assert np.array_equal(members.forward("s", 0, hidden), expected)


def test_errors_spoil_no_other_session_and_all_members_have_the_same(
    group: Group, kind: EngineKind
) -> None:
    members, hidden = group(ODD), inputs(kind, 20)
    expected = in_calls(members, hidden, (20,))
    for session in ("a", "b", "c"):
        members.open_session(session, 20)
    results: list[Any] = members.forward_batch(
        [
            Step("nobody", 0, hidden),
            Step("a", 1, hidden),
            Step("s", 0, hidden),
            Step("b", 0, inputs(kind, 21)),
            Step("c", 0, hidden[:, :-1]),
        ]
    )
    kinds = [UnknownSession, PositionGap, np.ndarray, CacheOverflow, InvalidHiddenStates]
    assert [type(result) for result in results] == kinds
    assert np.array_equal(results[2], expected)
    assert all(isinstance(e, UnknownSession) for e in members.begin([Step("nobody", 0, hidden)]))
    for shard in members.shards:
        with pytest.raises(CacheOverflow):
            shard.open_session("a", CONFIG.context_length + 1)


def test_rows_that_are_not_finite_are_kept_by_no_member(group: Group, kind: EngineKind) -> None:
    members, hidden = group(ODD), inputs(kind, 90)
    expected = in_calls(members, hidden, (70, 20))
    broken = hidden[:70].copy()
    broken[40, 3] = 0x7FC0 if kind == "bf16" else np.nan
    members.open_session("s", 90, keys(hidden))
    members.open_session("other", 90)
    both: list[Any] = members.forward_batch([Step("s", 0, broken), Step("other", 0, hidden[:70])])
    assert np.array_equal(both[1], expected[:70])
    with pytest.raises(PositionGap):
        members.forward("s", 70, hidden[70:])
    if kind == "native":  # nothing of it can be found by others
        assert members.shards[0].open_session("new", 90, keys(hidden)) == 0
    assert np.array_equal(members.forward("s", 0, hidden[:70]), expected[:70])
    assert np.array_equal(members.forward("s", 70, hidden[70:]), expected[70:])
    assert np.array_equal(members.forward("other", 70, hidden[70:]), expected[70:])


def test_members_are_misused_with_an_error(group: Group, kind: EngineKind) -> None:
    hidden = inputs(kind, 5)
    for shard in group(ODD).shards:
        shard.open_session("s", 10)
        with pytest.raises(ValueError, match="no step"):
            shard.attention(0, hidden)
        with pytest.raises(ValueError, match="two steps of one session"):
            shard.begin([Step("s", 0, hidden), Step("s", 5, hidden)])
        assert shard.begin([Step("s", 0, hidden)]) == [None]
        for half in (shard.attention, shard.mlp):
            with pytest.raises(ValueError, match="block 3 of span"):
                half(3, hidden)
            with pytest.raises(InvalidHiddenStates):
                half(0, hidden[:4])
        shard.close_session("s")  # which gives up the step
        with pytest.raises((InvalidHiddenStates, ValueError)):
            shard.mlp(0, hidden)
        shard.end(is_done=True)
        with pytest.raises(ValueError, match="n_tokens = 0"):
            shard.open_session("s", 0)


def test_pages_are_shared_by_those_that_have_some(
    engines: Engines, checkpoints: dict[str, Checkpoint]
) -> None:
    shards = [engines.load_shard(checkpoints["Q8_0"], SPAN, cut, "native") for cut in ODD]
    members, hidden = ShardGroup(shards), rows(N, CONFIG)
    expected = in_calls(members, hidden, (128, 72))
    assert [shard.open_session("a", N, keys(hidden)) for shard in shards] == [0, 192, 0]
    members.forward("a", 0, hidden)
    assert [shard.open_session("b", N, keys(hidden)) for shard in shards] == [192, 192, 192]
    assert np.array_equal(members.forward("b", 192, hidden[192:]), expected[192:])
    assert np.array_equal(members.forward("b", 70, hidden[70:]), expected[70:])
    assert members.open_session("short", 100, keys(hidden)) == 64  # it has room for no more


def test_memory_for_sessions_is_limited_where_there_is_some(
    engines: Engines, checkpoints: dict[str, Checkpoint]
) -> None:
    page = 64 * engines.load_shard(checkpoints["F16"], SPAN, ODD[0], "native").kv_bytes_per_token
    with_heads, without = (
        engines.load_shard(checkpoints["F16"], SPAN, cut, "native", kv_bytes=3 * page)
        for cut in ODD[:2]
    )
    for shard in (with_heads, without):
        shard.open_session("a", 100)
    with pytest.raises(CacheFull):
        with_heads.open_session("b", 100)
    without.open_session("b", 100)
