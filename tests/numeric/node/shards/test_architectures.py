"""Groups of every architecture that can be shared out, on both engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey.node.catalog import LocalModel
from covey.node.engine.slices import whole_slice
from covey.node.engine.stage import Step
from covey.node.engines import Engines
from covey.node.kernels.errors import KernelsUnavailable
from covey.node.kernels.library import load_library
from covey.node.kernels.packed_cache import PackedCache
from covey.node.model.checkpoint import Checkpoint, open_checkpoint
from support.shard_group import ShardGroup, slices
from support.tiny_architectures import TINIES, make

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

CUTS = slices((1, 32), (0, 32), (1, 32))
LONG, SHORT = 40, 30  # Phi-3's original context is between them


@pytest.fixture(scope="module", params=TINIES)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Checkpoint]:
    folder = tmp_path_factory.mktemp("model")
    make(TINIES[request.param], folder)
    with open_checkpoint(folder, cache_dir=folder / "cache") as opened:
        yield opened


@pytest.fixture(params=["fp32", "native"])
def model(request: pytest.FixtureRequest, checkpoint: Checkpoint, tmp_path: Path) -> LocalModel:
    try:
        load_library()
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    return LocalModel("tiny", checkpoint, Engines(request.param, 1, PackedCache(tmp_path)))


def test_a_group_computes_long_and_short_sessions_together(model: LocalModel) -> None:
    config = model.checkpoint.config
    span = (0, config.n_blocks)
    if not model.layout.can_split:
        assert config.n_experts or config.has_post_norms
        with pytest.raises(ValueError, match="no sums of parts"):
            model.load_shard(span, whole_slice(config))
        return
    group = ShardGroup([model.load_shard(span, cut) for cut in CUTS])
    whole = model.load_stage(span)
    random = np.random.default_rng(0)
    # In an order in which neither the long nor the short ones are together.
    hidden = {
        f"{i}": random.normal(size=(n, config.hidden_size)).astype(np.float32)
        for i, n in enumerate((LONG, SHORT, LONG, SHORT))
    }
    for stage in (group, whole):
        for session, all_rows in hidden.items():
            stage.open_session(session, len(all_rows))
    for start, end in ((0, 11), (11, 12), (12, 30)):
        steps = [Step(session, start, all_rows[start:end]) for session, all_rows in hidden.items()]
        for actual, expected in zip(
            group.forward_batch(steps), whole.forward_batch(steps), strict=True
        ):
            assert_close(actual, expected)


def assert_close(actual: Any, expected: Any) -> None:
    """Keys and values are halves in the native engine; the rest is another order of sums."""
    assert np.abs(actual - expected).max() < 5e-3 * np.abs(expected).max()
