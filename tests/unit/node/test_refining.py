"""A profile follows what the device's own steps take, and is published when that matters."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.node.refining import (
    FORGET_S,
    PUBLISH_EVERY_S,
    SAMPLE_CHUNKS,
    SAMPLE_STEPS,
    HeadTiming,
    Refinement,
    Refining,
    Timing,
    Timings,
)
from covey.partition.profile import DeviceProfile
from covey.partition.speed import PREFILL_DEPTH_SHARE
from support.node_core import MODEL_DIGEST, AddingStage, Net, in_virtual_time, route_of, rows
from support.plans import device

N_BLOCKS = 10
BASE = replace(
    device("a", decode_s=1e-3),
    model_digest=MODEL_DIGEST,
    batch_decode_s_per_block=(1.2e-3, 1.6e-3, 2.4e-3),
    depth_s_per_block=1e-6,
    prefill_s_per_block=((16, 4e-3), (128, 20e-3)),
)


def decode(n_sessions: int, seconds: float, depth: int = 0) -> Timing:
    return Timing(
        model_digest=MODEL_DIGEST,
        n_blocks=N_BLOCKS,
        rows=(1,) * n_sessions,
        positions=(depth,) * n_sessions,
        seconds=seconds,
    )


def chunk(n_tokens: int, seconds: float, position: int = 0) -> Timing:
    return Timing(
        model_digest=MODEL_DIGEST,
        n_blocks=N_BLOCKS,
        rows=(n_tokens,),
        positions=(position,),
        seconds=seconds,
    )


def refined(*timings: Timing | HeadTiming, n_samples: int = 40) -> DeviceProfile:
    refinement = Refinement(BASE)
    for timing in timings:
        is_chunk = isinstance(timing, Timing) and timing.rows[0] > 1
        n_steps = SAMPLE_CHUNKS if is_chunk else SAMPLE_STEPS
        for _ in range(n_samples * n_steps):
            refinement.add(timing)
    return refinement.profile()


def test_steps_that_take_what_they_should_change_nothing() -> None:
    depth, n = 500, 2
    expected = [
        decode(n, N_BLOCKS * (1.2e-3 + n * depth * 1e-6), depth),
        chunk(128, N_BLOCKS * (20e-3 + PREFILL_DEPTH_SHARE * 128 * 128 * 1e-6), 128),
    ]
    profile = refined(*expected)
    assert profile.decode_s_per_block == pytest.approx(BASE.decode_s_per_block)
    assert profile.batch_decode_s_per_block == pytest.approx(BASE.batch_decode_s_per_block)
    assert profile.prefill_s_per_block[1][1] == pytest.approx(20e-3)


def test_a_batch_corrects_its_own_figure_and_those_that_nobody_saw_near_it() -> None:
    profile = refined(decode(1, N_BLOCKS * 2e-3), decode(8, N_BLOCKS * 7.2e-3))
    assert profile.decode_s_per_block == pytest.approx(2e-3)
    assert profile.batch_decode_s_per_block == pytest.approx((2.4e-3, 3.2e-3, 7.2e-3))
    assert profile.depth_s_per_block == pytest.approx(2e-6)
    assert profile.prefill_s_per_block == BASE.prefill_s_per_block
    assert profile.head_s == BASE.head_s


def test_prefill_is_corrected_by_itself() -> None:
    profile = refined(chunk(128, N_BLOCKS * 10e-3))
    assert [seconds for _, seconds in profile.prefill_s_per_block] == pytest.approx([2e-3, 10e-3])
    assert profile.prefill_s_per_token_per_block == pytest.approx(
        BASE.prefill_s_per_token_per_block / 2
    )
    assert profile.decode_s_per_block == BASE.decode_s_per_block


def test_the_head_s_work_is_corrected_beside_what_a_step_costs() -> None:
    base = replace(BASE, head_s=3.1e-3, batch_head_s=(4.1e-3, 6.1e-3, 10.1e-3), step_s=1e-4)
    refinement = Refinement(base)
    for _ in range(SAMPLE_STEPS):
        refinement.add(HeadTiming(MODEL_DIGEST, 1, 6e-3))
        refinement.add(HeadTiming(MODEL_DIGEST, 8, 14e-3))
    profile = refinement.profile()
    assert profile.head_s == pytest.approx(6.1e-3)
    assert profile.batch_head_s[-1] == pytest.approx(14.1e-3)
    assert profile.step_s == base.step_s
    assert profile.decode_s_per_block == base.decode_s_per_block


def test_one_slow_step_in_many_changes_nothing() -> None:
    refinement = Refinement(BASE)
    for n in range(10 * SAMPLE_STEPS):
        refinement.add(decode(1, N_BLOCKS * (1.0 if n % 4 == 0 else 1e-3)))
    assert refinement.factors == {("decode", 1): pytest.approx(1.0)}


@pytest.mark.parametrize("rows", [(1, 5), (3, 3), (5,)])
def test_batches_of_another_kind_say_nothing(rows: tuple[int, ...]) -> None:
    refinement = Refinement(BASE)
    odd = replace(chunk(128, 9.0), rows=rows, positions=(0,) * len(rows))
    for _ in range(4 * SAMPLE_STEPS):
        refinement.add(odd)
    assert refinement.factors == {}


@given(
    st.lists(st.tuples(st.integers(1, 12), st.floats(0, 1e6), st.integers(0, 4096)), max_size=30)
)
def test_whatever_steps_took_the_profile_is_a_sound_one(
    steps: list[tuple[int, float, int]],
) -> None:
    refinement = Refinement(BASE)
    for n_sessions, seconds, depth in steps:
        for _ in range(SAMPLE_STEPS):
            refinement.add(decode(n_sessions, seconds, depth))
    profile = refinement.profile()
    figures = (profile.decode_s_per_block, *profile.batch_decode_s_per_block)
    assert list(figures) == sorted(figures)


@dataclass
class Node:
    """A clock that is set by hand, and what is published."""

    now: float = 0.0
    devices: dict[str, DeviceProfile] = field(default_factory=lambda: {MODEL_DIGEST: BASE})
    timings: Timings = field(default_factory=deque)
    published: list[DeviceProfile] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.refining = Refining(self.devices, self.timings, self._publish, lambda: self.now)

    def _publish(self) -> None:
        self.published.append(self.devices[MODEL_DIGEST])

    def serve(self, seconds_per_block: float, n_samples: int = 40) -> None:
        for _ in range(n_samples):
            self.timings.extend([decode(1, N_BLOCKS * seconds_per_block)] * SAMPLE_STEPS)
            self.refining.look()
            self.now += 1.0


def test_noise_is_not_published() -> None:
    node = Node()
    for n in range(20):
        node.serve(1.05e-3 if n % 2 else 0.95e-3)
    assert node.published == []


def test_a_change_is_published_soon_and_then_now_and_then_until_it_is_told() -> None:
    node = Node()
    node.serve(3e-3, n_samples=1)
    assert len(node.published) == 1
    node.serve(3e-3, n_samples=200)
    assert len(node.published) <= 1 + 200 / PUBLISH_EVERY_S
    assert node.published[-1].decode_s_per_block == pytest.approx(3e-3, rel=0.1)
    assert [profile.version for profile in node.published] == [*range(1, len(node.published) + 1)]


def test_a_device_that_is_idle_for_long_is_what_it_was_measured_to_be() -> None:
    node = Node()
    node.serve(3e-3, n_samples=200)
    node.now += FORGET_S
    node.refining.look()
    assert node.published[-1].decode_s_per_block == BASE.decode_s_per_block


def test_a_model_that_is_not_offered_any_more_is_not_published() -> None:
    node = Node()
    node.serve(3e-3, n_samples=1)
    del node.devices[MODEL_DIGEST]
    node.now += PUBLISH_EVERY_S
    node.serve(9e-3)
    assert len(node.published) == 1
    assert MODEL_DIGEST not in node.devices


@in_virtual_time
async def test_a_stage_tells_what_its_steps_took() -> None:
    async with Net(1) as [node]:
        route = route_of(node.peer_id, spans=[(0, 3)])
        node.load(route, engine=AddingStage(3))
        session = await node.pipelines.open("s", route, hidden_size=4, n_tokens=8)
        for position, n_tokens in ((0, 3), (3, 1)):
            future = await session.send(rows(n_tokens), position=position, n_return=1)
            assert np.isfinite((await session.wait(future)).took_s)
        told = [
            (timing.n_blocks, timing.rows, timing.positions)
            for timing in node.server.timings
            if isinstance(timing, Timing)
        ]
        assert told == [(3, (3,), (0,)), (3, (1,), (3,))]
