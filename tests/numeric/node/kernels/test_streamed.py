"""Blocks that come from disk for each step compute the same bits as blocks in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey.node.engine.stage import Step
from covey.node.engines import Engines
from covey.node.kernels import native_head
from covey.node.kernels.errors import CannotStream, WeightsUnreadable
from covey.node.kernels.library import Engine, load_library
from covey.node.kernels.native_stage import NativeStage, load_native_stage
from covey.node.kernels.packed_cache import PackedCache
from covey.node.model.checkpoint import Checkpoint, open_checkpoint
from support.tiny_weights import SMALL, rows, write_quantized

CONFIG = replace(SMALL, n_blocks=7)
N = 70
SPAN = (0, CONFIG.n_blocks)


@dataclass
class Model:
    checkpoint: Checkpoint
    cache: PackedCache
    folder: Path
    engine: Engine

    def stage(self, streamed_blocks: int = 0) -> NativeStage:
        return load_native_stage(
            self.checkpoint,
            SPAN,
            engine=self.engine,
            cache=self.cache,
            streamed_blocks=streamed_blocks,
        )


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    path = write_quantized(tmp_path / "small.gguf", CONFIG, "Q4_1")
    folder = tmp_path / "packed"
    with open_checkpoint(path, cache_dir=tmp_path) as checkpoint:
        yield Model(checkpoint, PackedCache(folder), folder, Engine(load_library(), 2))


def expected(model: Model, hidden: Any) -> Any:
    stage = model.stage()
    stage.open_session("s", len(hidden))
    return stage.forward("s", 0, hidden)


@pytest.mark.parametrize("n_streamed", [1, 2, 3, 4, 7])
def test_streamed_and_resident_blocks_compute_the_same(model: Model, n_streamed: int) -> None:
    hidden = rows(N, CONFIG)
    stage = model.stage(n_streamed)
    stage.open_session("s", N)
    out = [stage.forward("s", at, hidden[at : at + 10]) for at in range(0, N, 10)]
    assert np.array_equal(np.concatenate(out), expected(model, hidden))
    facts = stage.streaming
    assert facts is not None
    assert stage.stall_s == facts.stall_s >= 0
    assert facts.n_passes == N // 10 or n_streamed == 1


def test_a_batch_reads_the_weights_once(model: Model) -> None:
    inputs = [rows(3, CONFIG, seed=i) for i in range(4)]
    stage = model.stage(CONFIG.n_blocks)
    for i in range(4):
        stage.open_session(f"s{i}", N)
    outs = stage.forward_batch([Step(f"s{i}", 0, hidden) for i, hidden in enumerate(inputs)])
    assert stage.streaming is not None
    assert stage.streaming.n_passes == 1
    for out, hidden in zip(outs, inputs, strict=True):
        assert isinstance(out, np.ndarray)
        assert np.array_equal(out, expected(model, hidden))


def test_streamed_blocks_take_the_memory_of_two(model: Model) -> None:
    resident, streamed = model.stage(), model.stage(CONFIG.n_blocks)
    block_bytes = resident.weight_bytes // CONFIG.n_blocks
    assert streamed.weight_bytes <= 2 * (block_bytes + (2 << 20))


def test_a_step_that_the_disk_failed_can_be_tried_again(model: Model) -> None:
    hidden = rows(4, CONFIG)
    stage = model.stage(CONFIG.n_blocks)
    stage.open_session("s", N)
    stage.forward("s", 0, hidden[:2])
    contents = {path: path.read_bytes() for path in model.folder.iterdir()}
    for path in contents:
        path.write_bytes(b"")  # the same files, cut short
    with pytest.raises(WeightsUnreadable, match="shorter"):
        stage.forward("s", 2, hidden[2:])
    for path, content in contents.items():
        path.write_bytes(content)
    assert np.array_equal(stage.forward("s", 2, hidden[2:]), expected(model, hidden)[2:])


def test_files_that_are_replaced_or_removed_do_not_matter(model: Model) -> None:
    hidden = rows(4, CONFIG)
    wanted = expected(model, hidden)
    stage = model.stage(CONFIG.n_blocks)
    for path in model.folder.iterdir():
        path.unlink()
        path.write_bytes(b"another")
    stage.open_session("s", N)
    assert np.array_equal(stage.forward("s", 0, hidden), wanted)


@pytest.mark.parametrize("damage", ["flip", "cut", "digest"])
def test_a_damaged_file_is_made_anew_before_it_is_streamed(model: Model, damage: str) -> None:
    hidden = rows(4, CONFIG)
    wanted = expected(model, hidden)
    for path in model.folder.iterdir():
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(
            {
                "flip": bytes([content[0] ^ 1]) + content[1:],
                "cut": content[:-1],
                "digest": content[:-1] + bytes([content[-1] ^ 1]),
            }[damage]
        )
    stage = model.stage(CONFIG.n_blocks)
    stage.open_session("s", N)
    assert np.array_equal(stage.forward("s", 0, hidden), wanted)


def test_packed_in_pieces_or_as_a_whole_the_file_is_the_same(model: Model, tmp_path: Path) -> None:
    model.stage()
    other = Model(model.checkpoint, PackedCache(tmp_path / "other"), tmp_path, model.engine)
    other.stage(CONFIG.n_blocks)
    for path in model.folder.iterdir():
        assert (tmp_path / "other" / path.name).read_bytes() == path.read_bytes()


def test_without_a_disk_there_is_no_streaming(model: Model, tmp_path: Path) -> None:
    (tmp_path / "full").write_text("a file where the folder should be")
    full = Model(model.checkpoint, PackedCache(tmp_path / "full"), tmp_path, model.engine)
    with pytest.raises(CannotStream):
        full.stage(3)
    with pytest.raises(ValueError, match="cache"):
        load_native_stage(model.checkpoint, SPAN, engine=model.engine, streamed_blocks=3)
    with pytest.raises(ValueError, match="blocks to stream"):
        model.stage(CONFIG.n_blocks + 1)


def test_an_engine_is_told_how_many_to_stream(model: Model) -> None:
    engines = Engines("native", 1, model.cache)
    stage = engines.load_stage(model.checkpoint, SPAN, "native", streamed_blocks=5)
    assert isinstance(stage, NativeStage)
    assert stage.streaming is not None


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_head_that_streams_gives_the_same_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_tied: bool
) -> None:
    config = replace(CONFIG, n_blocks=1, vocab_size=200, tied_embeddings=is_tied)
    monkeypatch.setattr(native_head, "PIECE_BYTES", 5000)  # some rows of the output matrix
    path = write_quantized(tmp_path / "head.gguf", config, "Q8_0")
    hidden, ids = rows(5, config), [7, 0, 199]
    with open_checkpoint(path, cache_dir=tmp_path) as checkpoint:
        resident, streamed = (
            Engines("native", 1, PackedCache(tmp_path / "packed"), head_bytes=limit).load_head(
                checkpoint, "native"
            )
            for limit in (None, 1000)
        )
    assert isinstance(streamed, native_head.NativeHead)
    assert isinstance(resident, native_head.NativeHead)
    assert np.array_equal(streamed.embed(ids), resident.embed(ids))
    for _ in range(2):
        assert np.array_equal(streamed.logits(hidden), resident.logits(hidden))
    assert resident.streaming is None
    assert streamed.streaming is not None
    assert streamed.streaming.n_passes == 2
    assert streamed.weight_bytes <= 2 * (2 << 20)
    assert streamed.stall_s == streamed.streaming.stall_s
