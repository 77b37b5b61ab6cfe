"""A pipeline gives the bits of one stage, wherever it is cut (the same threads and chunking)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch

from covey.node.engine.head import load_head
from covey.node.engine.stage import Stage
from covey.node.engine.tensors import EngineDtype, HiddenStates
from covey.node.engine.torch_stage import load_stage
from covey.node.model.checkpoint import Checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

IDS = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198]
CHUNKS = [(0, 7), (7, 10), (10, 11), (11, 12)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def blocks(checkpoint: Checkpoint) -> list[Stage]:
    """Every block as a stage of its own, so that any cut is a matter of chaining."""
    return [load_stage(checkpoint, (block_idx, block_idx + 1)) for block_idx in range(30)]


def run(stages: list[Stage], embedded: HiddenStates) -> HiddenStates:
    for stage in stages:
        stage.open_session("s", len(embedded))
    rows = []
    for begin, end in CHUNKS:
        hidden = embedded[begin:end]
        for stage in stages:
            hidden = stage.forward("s", begin, hidden)
        rows.append(hidden)
    return np.concatenate(rows)


def test_thirty_stages_of_one_block(checkpoint: Checkpoint, blocks: list[Stage]) -> None:
    embedded = load_head(checkpoint).embed(IDS)
    whole = run([load_stage(checkpoint, (0, 30))], embedded)
    assert np.array_equal(run(blocks, embedded), whole)


@pytest.mark.lab
def test_every_cut_into_two_stages(checkpoint: Checkpoint, blocks: list[Stage]) -> None:
    embedded = load_head(checkpoint).embed(IDS)
    whole = run([load_stage(checkpoint, (0, 30))], embedded)
    for cut in range(1, 30):
        # The longer side as one real stage, the shorter from single blocks: half the loading.
        if cut <= 15:
            stages = [*blocks[:cut], load_stage(checkpoint, (cut, 30))]
        else:
            stages = [load_stage(checkpoint, (0, cut)), *blocks[cut:]]
        assert np.array_equal(run(stages, embedded), whole), f"cut at {cut}"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "cuts", [pytest.param((0, 11, 30), marks=pytest.mark.lab), (0, 1, 17, 29, 30)]
)
def test_cuts_into_real_stages(
    checkpoint: Checkpoint, dtype: EngineDtype, cuts: tuple[int, ...]
) -> None:
    embedded = load_head(checkpoint, dtype).embed(IDS)
    whole = run([load_stage(checkpoint, (0, 30), dtype)], embedded)
    stages: list[Stage] = [load_stage(checkpoint, span, dtype) for span in pairwise(cuts)]
    assert np.array_equal(run(stages, embedded), whole)


def test_bf16_is_close_to_fp32(checkpoint: Checkpoint) -> None:
    logits = []
    for dtype in ("fp32", "bf16"):
        head = load_head(checkpoint, dtype)
        logits.append(head.logits(run([load_stage(checkpoint, (0, 30), dtype)], head.embed(IDS))))
    exact, rounded = (torch.from_numpy(each).log_softmax(-1) for each in logits)
    divergence = (exact.exp() * (exact - rounded)).sum(-1).mean()
    assert divergence < 1e-2  # research/engine.md, section 5
