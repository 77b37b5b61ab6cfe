"""A group of threads computes what one stage does, whatever becomes of its lanes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey.node.engine.errors import (
    CacheFull,
    EngineError,
    NonFiniteValues,
    PositionGap,
    UnknownSession,
)
from covey.node.engine.shard import Shard
from covey.node.engine.stage import Stage, Step
from covey.node.engines import Engines
from covey.node.group.all_reduce import GroupLink
from covey.node.group.errors import GroupBroken
from covey.node.kernels.packed_cache import PackedCache
from covey.node.model.checkpoint import Checkpoint, open_checkpoint
from covey.transport.frame import Buffer
from covey.transport.lane.lane import Lane
from support.groups import MemoryGroup, memory_group
from support.shard_group import slices
from support.tiny_weights import SMALL, rows, write_quantized

CONFIG = replace(SMALL, n_heads=6, n_kv_heads=3)
SPAN = (0, CONFIG.n_blocks)
TWO = slices((2, 32), (1, 128))
THREE = slices((2, 0), (0, 96), (1, 64))  # one without heads and one without columns
N = 40

Shards = Callable[..., list[Shard]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    folder = tmp_path_factory.mktemp("groups")
    path = write_quantized(folder / "F16.gguf", CONFIG, "F16")
    with open_checkpoint(path, cache_dir=folder) as opened:
        yield opened


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines("fp32", 1, PackedCache(tmp_path_factory.mktemp("packed")))


@pytest.fixture
def shards(engines: Engines, checkpoint: Checkpoint) -> Shards:
    def load(cuts: Any, **options: Any) -> list[Shard]:
        return [engines.load_shard(checkpoint, SPAN, cut, "fp32", **options) for cut in cuts]

    return load


@pytest.fixture
def alone(engines: Engines, checkpoint: Checkpoint) -> Stage:
    return engines.load_stage(checkpoint, SPAN, "fp32")


def close_to(actual: Any, expected: Any, tolerance: float = 1e-5) -> bool:
    """Another order of sums; relative to all of it."""
    error = np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))
    return bool(error < tolerance)


def text_of(stage: Stage, hidden: Any, session: str = "s") -> Any:
    """A prompt, then rows one at a time."""
    assert stage.open_session(session, len(hidden)) == 0
    n_prompt = len(hidden) - 4
    parts = [stage.forward(session, 0, hidden[:n_prompt])]
    parts += [stage.forward(session, at, hidden[at : at + 1]) for at in range(n_prompt, N)]
    stage.close_session(session)
    return np.concatenate(parts)


@pytest.mark.parametrize("cuts", [TWO, THREE], ids=["two", "three"])
@pytest.mark.parametrize("codec", ["exact", "fp16"])
def test_it_computes_what_one_stage_does(
    cuts: Any, codec: str, shards: Shards, alone: Stage
) -> None:
    hidden = rows(N, CONFIG)
    expected = text_of(alone, hidden)
    with memory_group(shards(cuts), codec=codec, hub_idx=len(cuts) - 1) as group:
        found = text_of(group.stage, hidden)
        spread = group.stage.spread()
    assert close_to(found, expected, 1e-5 if codec == "exact" else 3e-3)
    assert spread is not None
    assert spread >= 0


@pytest.mark.parametrize("without_ring", [(), (1,)], ids=["ring", "a lane is missing"])
def test_large_sums_go_round_if_all_have_the_lanes(
    without_ring: tuple[int, ...], shards: Shards, alone: Stage
) -> None:
    hidden = rows(N, CONFIG)
    expected = text_of(alone, hidden)
    slow = GroupLink(latency_s=1e-3, bytes_per_s=1e6)
    with memory_group(shards(THREE), link=slow, without_ring=without_ring) as group:
        assert close_to(text_of(group.stage, hidden), expected)
        largest = max(one.nbytes for one in group.reduces[-1].rounds)
    # What goes round is added up nowhere, and so by nobody.
    n_bytes = 4 * (N - 4) * CONFIG.hidden_size
    assert (largest == n_bytes) == bool(without_ring)


def test_steps_of_several_sessions_are_taken_together(shards: Shards, alone: Stage) -> None:
    hidden = rows(12, CONFIG)
    steps = [
        Step("a", 0, hidden[:5]),
        Step("b", 0, hidden[5:6]),
        Step("nobody", 0, hidden[:1]),
        Step("a", 5, hidden[6:7]),  # in one batch with the step before it
        Step("b", 7, hidden[7:8]),
    ]
    with memory_group(shards(TWO)) as group:
        for stage in (alone, group.stage):
            for session in "ab":
                stage.open_session(session, 20)
        found, expected = (stage.forward_batch(steps) for stage in (group.stage, alone))
        n_runs = group.spokes[1].n_runs
    kinds = [type(one) for one in expected]
    assert kinds == [type(one) for one in found]
    assert kinds[2:5:2] == [UnknownSession, PositionGap]
    for one, other in zip(found, expected, strict=True):
        if not isinstance(one, EngineError):
            assert close_to(one, other)
    assert n_runs == 2


def test_rows_that_are_not_finite_spoil_their_own_session(shards: Shards, alone: Stage) -> None:
    good, bad = rows(3, CONFIG), np.full((1, CONFIG.hidden_size), np.nan, np.float32)
    with memory_group(shards(TWO)) as group:
        for session in ("good", "bad"):
            group.stage.open_session(session, 20)
        spoilt, fine = group.stage.forward_batch([Step("bad", 0, bad), Step("good", 0, good)])
        assert isinstance(spoilt, NonFiniteValues)
        assert spoilt.is_received
        alone.open_session("good", 20)
        assert close_to(fine, alone.forward("good", 0, good))
        # It is as long as before: nothing.
        with pytest.raises(PositionGap):
            group.stage.forward("bad", 1, good)


def test_a_session_that_one_member_has_no_room_for_is_refused(shards: Shards) -> None:
    members = shards(TWO)
    with memory_group(members) as group:
        group.stage.open_session("first", 20)

        def full(session: str, n_tokens: int, prefix: object = ()) -> int:
            raise CacheFull(needed_bytes=1, free_bytes=0)

        members[1].open_session = full  # type: ignore[method-assign]
        with pytest.raises(CacheFull):
            group.stage.open_session("second", 20)
        group.stage.forward("first", 0, rows(1, CONFIG))
        with pytest.raises(UnknownSession):
            group.stage.forward("second", 0, rows(1, CONFIG))


class Failing:
    """A lane that fails at the n-th message sent."""

    def __init__(self, lane: Lane, n: int, fail: Callable[[Lane], bool]) -> None:
        self._lane, self._left, self._fail = lane, n, fail

    def send(self, *parts: Buffer) -> None:
        self._left -= 1
        if self._left == 0 and self._fail(self._lane):
            return
        self._lane.send(*parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lane, name)


def swallow(_: Lane) -> bool:
    return True


def cut(lane: Lane) -> bool:
    lane.close()
    return False


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9, 10, 11, 12])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fail", [swallow, cut])
def test_what_fails_is_made_again_with_the_same_input(
    n: int, rank: int, fail: Callable[[Lane], bool], shards: Shards, alone: Stage
) -> None:
    hidden = rows(N, CONFIG)
    expected = text_of(alone, hidden)
    wrapped = threading.Event()

    def wrap(of: int, lane: Lane) -> Lane:
        if of != rank or wrapped.is_set():
            return lane
        wrapped.set()
        return Failing(lane, n, fail)

    with memory_group(shards(TWO), wrap=wrap, timeout_s=0.1) as group:
        found = text_of(group.stage, hidden)
        assert close_to(found, expected)
        assert len(group.reduces) == (2 if fail is cut else 1)


def test_a_member_that_is_gone_breaks_the_group(shards: Shards) -> None:
    with memory_group(shards(THREE), may_form=False) as group:
        group.stage.open_session("s", 20)
        group.stage.forward("s", 0, rows(1, CONFIG))
        group.spokes[2].stop()
        with pytest.raises(GroupBroken):
            group.stage.forward("s", 1, rows(1, CONFIG))
        assert group.is_over
        assert group.stage.is_broken
        group.stage.close_session("s")  # whatever state it is in
        with pytest.raises(GroupBroken):
            group.stage.open_session("t", 20)
        again(group)


def again(group: MemoryGroup) -> None:
    """It comes back, and knows none of the sessions before."""
    group.may_form = True
    group.stage.use(group.form())
    group.stage.open_session("new", 20)
    group.stage.forward("new", 0, rows(1, CONFIG))


def test_a_spoke_that_lost_a_session_ends_just_that_one(shards: Shards) -> None:
    with memory_group(shards(TWO)) as group:
        for session in ("kept", "lost"):
            group.stage.open_session(session, 20)
            group.stage.forward(session, 0, rows(2, CONFIG))
        group.spokes[1].stop()
        group.spokes[1]._close("lost")
        steps = [Step(session, 2, rows(1, CONFIG)) for session in ("lost", "kept")]
        lost, kept = group.stage.forward_batch(steps)
        assert isinstance(lost, UnknownSession)
        assert not isinstance(kept, EngineError)


def test_a_group_that_is_given_up_while_it_waits_ends_at_once(shards: Shards) -> None:
    blocked = threading.Event()

    def wrap(rank: int, lane: Lane) -> Lane:
        def block(_: Lane) -> bool:
            blocked.set()
            return True

        return Failing(lane, 3, block) if rank == 1 else lane

    with memory_group(shards(TWO), wrap=wrap, timeout_s=30.0, may_form=False) as group:
        group.stage.open_session("s", 20)

        def give_up() -> None:
            blocked.wait(10.0)
            group.stage.give_up("a peer was lost")

        giving_up = threading.Thread(target=give_up)
        giving_up.start()
        with pytest.raises(GroupBroken, match="a peer was lost"):
            group.stage.forward("s", 0, rows(1, CONFIG))
        giving_up.join()


def test_prefixes_are_held_as_far_as_all_hold_them(checkpoint: Checkpoint, tmp_path: Path) -> None:
    engines = Engines("auto", 1, PackedCache(tmp_path))
    if engines.why_portable(checkpoint) is not None:
        pytest.skip("no native kernels here")
    members = [engines.load_shard(checkpoint, SPAN, cut, "native") for cut in TWO]
    hidden, keys = rows(130, CONFIG), [bytes([n] * 16) for n in range(2)]
    with memory_group(members) as group:
        assert group.stage.open_session("first", 140, keys) == 0
        whole = group.stage.forward("first", 0, hidden)
        assert group.stage.open_session("second", 140, keys) == 128
        again = group.stage.forward("second", 128, hidden[128:])
        assert close_to(again, whole[128:], 1e-3)
        # One that forgot makes all begin anew.
        members[1].open_session, opened = (  # type: ignore[method-assign]
            lambda session, n_tokens, prefix=(): opened(session, n_tokens),
            members[1].open_session,
        )
        assert group.stage.open_session("third", 140, keys) == 0
        assert close_to(group.stage.forward("third", 0, hidden), whole, 1e-3)
