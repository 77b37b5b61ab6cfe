"""Packed weights on disk: shared, checked, and made anew when they are damaged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from covey.node.engines import Engines
from covey.node.kernels.errors import KernelsUnavailable
from covey.node.kernels.library import Library, load_library
from covey.node.kernels.packed import PackedBlock, Packer
from covey.node.kernels.packed_cache import PackedCache
from covey.node.model.checkpoint import Checkpoint, open_checkpoint
from covey.node.model.errors import CorruptModel
from support.tiny_models import TINY, write_tiny_gguf

CONFIG = replace(TINY, hidden_size=64, n_heads=4, n_kv_heads=2, head_dim=16, rope_dim=16)


@pytest.fixture(scope="module")
def library() -> Library:
    try:
        return load_library()
    except KernelsUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(
        write_tiny_gguf(tmp_path / "a.gguf", CONFIG), cache_dir=tmp_path
    ) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "packed"


def load(library: Library, checkpoint: Checkpoint, folder: Path) -> PackedBlock:
    parts = checkpoint.block_parts(1)
    return PackedCache(folder).load(Packer(library), checkpoint, "block.1", parts)


def test_a_block_from_the_disk_is_the_packed_block(
    library: Library, checkpoint: Checkpoint, folder: Path
) -> None:
    packed = Packer(library).pack(checkpoint, checkpoint.block_parts(1))
    for _ in range(2):
        loaded = load(library, checkpoint, folder)
        assert np.array_equal(loaded.buffer, packed.buffer)
        assert not loaded.buffer.flags.writeable
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_made_anew(
    library: Library, checkpoint: Checkpoint, folder: Path, damage: str
) -> None:
    good = load(library, checkpoint, folder).buffer.tobytes()
    [path] = folder.iterdir()
    content = path.read_bytes()
    path.unlink()  # the mapping stays what it was
    path.write_bytes({"flip": b"\xff" + content[1:], "cut": content[:-1], "empty": b""}[damage])
    assert load(library, checkpoint, folder).buffer.tobytes() == good
    assert path.read_bytes() == content


def test_without_a_place_on_disk_weights_stay_in_memory(
    library: Library, checkpoint: Checkpoint, folder: Path
) -> None:
    folder.write_text("a file where the folder should be")
    assert load(library, checkpoint, folder).buffer.nbytes > 0


def test_a_block_that_is_not_what_it_was_is_refused(
    library: Library, tmp_path: Path, folder: Path
) -> None:
    path = write_tiny_gguf(tmp_path / "b.gguf", CONFIG)
    with open_checkpoint(path, cache_dir=tmp_path) as first:
        first.blobs()
        at = first.source.tensors["blk.1.ffn_up.weight"].offset
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a failing disk would do it
    with (
        open_checkpoint(path, cache_dir=tmp_path) as checkpoint,
        pytest.raises(CorruptModel, match=r"block\.1"),
    ):
        load(library, checkpoint, folder)


def test_stage_and_head_of_an_engine_share_the_cache(
    library: Library, checkpoint: Checkpoint, folder: Path
) -> None:
    engines = Engines("native", 1, PackedCache(folder))
    stage = engines.load_stage(checkpoint, (0, CONFIG.n_blocks), "native")
    head = engines.load_head(checkpoint, "native")
    assert len(list(folder.iterdir())) == CONFIG.n_blocks + 2  # embedding, and norm with output
    again = engines.load_head(checkpoint, "native")
    stage.open_session("s", 3)
    hidden = stage.forward("s", 0, head.embed([1, 2, 3]))
    assert np.array_equal(head.logits(hidden), again.logits(hidden))
