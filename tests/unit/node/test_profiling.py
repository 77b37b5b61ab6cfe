"""What a node measures of its machine: complete, kept, and right for a machine that is paced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from covey.node.catalog import LocalModel
from covey.node.config import NodeConfig
from covey.node.engine.measure import MAX_ROUNDS, time_in_turn
from covey.node.engines import Engines
from covey.node.home import Home
from covey.node.kernels.pacer import Pacer
from covey.node.model.checkpoint import open_checkpoint
from covey.node.profiling import busy_share, device_profile
from covey.partition.profile import BATCHES, DeviceProfile
from support.tiny_models import write_tiny_gguf


@pytest.fixture
def model(tmp_path: Path) -> LocalModel:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    return LocalModel("tiny", open_checkpoint(path, cache_dir=tmp_path), Engines("fp32", 1))


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with Home(tmp_path / "home") as home:
        yield home


def measured(model: LocalModel, home: Home) -> tuple[DeviceProfile, list[float]]:
    shares: list[float] = []
    config = NodeConfig(home=home.path, name="n", memory_bytes=10**9, max_blocks=2)
    return device_profile(model, config, "me", home, progress=shares.append), shares


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("covey.node.profiling.BLOCKS_BUDGET_S", 0.0)
    monkeypatch.setattr("covey.node.profiling.HEAD_BUDGET_S", 0.0)
    monkeypatch.setattr("covey.node.profiling.BUSY_LOOK_S", 0.01)


def test_every_figure_is_measured_and_progress_only_rises(model: LocalModel, home: Home) -> None:
    profile, shares = measured(model, home)
    assert len(profile.batch_decode_s_per_block) == len(profile.batch_head_s) == len(BATCHES)
    times = [profile.decode_s_per_block, *profile.batch_decode_s_per_block]
    assert times == sorted(times)
    assert [n for n, _ in profile.prefill_s_per_block] == [16, 64, 128]
    assert 0 < profile.step_s < 0.1
    assert profile.head_s > profile.step_s
    assert (profile.memory_bytes, profile.max_blocks, profile.n_cores) == (10**9, 2, 1)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_what_was_measured_is_kept_but_not_what_the_owner_gives(
    model: LocalModel, home: Home
) -> None:
    first, _ = measured(model, home)
    again, shares = measured(model, home)
    assert replace(again, busy_share=first.busy_share) == first
    assert shares == [1.0]
    config = NodeConfig(home=home.path, name="n", memory_bytes=5)
    assert device_profile(model, config, "me", home).memory_bytes == 5


@pytest.mark.parametrize("spoil", [{"head_s": float("inf")}, {"step_s": -1.0}, {"engine": "x"}])
def test_kept_figures_that_are_not_sound_are_measured_anew(
    model: LocalModel, home: Home, spoil: dict[str, object]
) -> None:
    measured(model, home)
    kept = home.load("profile.json")
    assert kept is not None
    spoilt = {key: {**value, **spoil} for key, value in kept.items()}
    home.profile.write_text(json.dumps(spoilt))
    profile, shares = measured(model, home)
    assert profile.engine == "fp32"
    assert len(shares) > 1


def test_a_paced_machine_is_measured_as_slow_as_it_is_though_sleeps_are_too_long() -> None:
    """The pacer makes up for a sleep that was too long in the calls that follow."""
    now = [0.0]
    cpu = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds + 0.004  # as a busy system wakes one

    pacer = Pacer(0.1, cpu_clock=lambda: cpu[0], clock=lambda: now[0], sleep=sleep)

    def step(work_s: float) -> None:
        with pacer:
            now[0] += work_s
            cpu[0] += work_s

    works = {"short": lambda: step(0.0004), "long": lambda: step(0.01)}
    times = time_in_turn(works, budget_s=60.0, clock=lambda: now[0])
    assert times["short"] == pytest.approx(0.004, rel=0.25)
    assert times["long"] == pytest.approx(0.1, rel=0.05)
    assert MAX_ROUNDS > 2


def test_cores_that_others_use_count_only_where_the_engine_wants_them() -> None:
    assert 0.0 <= busy_share(1, look_s=0.02) <= 1.0
    assert busy_share(10_000, look_s=0.02) <= 1.0


def test_what_comes_before_each_step_is_not_timed() -> None:
    now, order = [0.0], list[str]()

    def take(name: str, seconds: float) -> None:
        order.append(name)
        now[0] += seconds

    times = time_in_turn(
        {"work": lambda: take("work", 0.5)},
        budget_s=0.0,
        before=lambda key: take(f"before {key}", 100.0),
        clock=lambda: now[0],
    )
    assert times == {"work": 0.5}
    assert order == ["before work", "work"] * (len(order) // 2)
