"""`Checkpoint`: blocks by byte range, blobs, the digest, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey.node.engine.head import load_head
from covey.node.engine.torch_stage import load_stage
from covey.node.model.checkpoint import BlockWeights, Checkpoint, open_checkpoint
from covey.node.model.errors import CorruptModel, ModelNotFound, UnsupportedModel
from covey.node.model.gguf import GgufFile
from covey.node.model.layouts import GGUF_NAMES
from covey.node.model.tokenizer_spec import build_tokenizer
from support.tiny_models import TINY, tiny_metadata, tiny_tensors, write_gguf, write_tiny_gguf


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def checkpoint(path: Path, tmp_path: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(path, cache_dir=tmp_path / "cache") as opened:
        yield opened


class CountingSource:
    """A source that remembers which tensors were read."""

    def __init__(self, file: GgufFile) -> None:
        self.path, self.tensors, self.close = file.path, file.tensors, file.close
        self._file = file
        self.read: list[str] = []

    def raw(self, name: str) -> memoryview:
        self.read.append(name)
        return self._file.raw(name)


def counted(checkpoint: Checkpoint) -> CountingSource:
    assert isinstance(checkpoint.source, GgufFile)
    counting = CountingSource(checkpoint.source)
    checkpoint.source = counting
    return counting


def test_block_holds_the_tensors_of_the_file(checkpoint: Checkpoint) -> None:
    written, block = tiny_tensors(), checkpoint.block(2)
    names = GGUF_NAMES.block.at(2)
    for field in fields(BlockWeights):
        tensor = getattr(block, field.name)
        if field.name in names:
            assert np.array_equal(tensor.numpy(), written[names[field.name]])
        else:
            assert tensor is None


def test_stage_reads_its_span_and_nothing_else(checkpoint: Checkpoint) -> None:
    source = counted(checkpoint)
    load_stage(checkpoint, (1, 3))
    names = [GGUF_NAMES.block.at(block_idx).values() for block_idx in (1, 2)]
    assert sorted(source.read) == sorted([*names[0], *names[1]])


def test_verified_stage_still_reads_its_span_only(checkpoint: Checkpoint) -> None:
    checkpoint.blobs()
    source = counted(checkpoint)
    load_stage(checkpoint, (3, 4), verify=True)
    assert set(source.read) == set(GGUF_NAMES.block.at(3).values())


def test_stage_holds_its_span_only(checkpoint: Checkpoint) -> None:
    one = sum(info.nbytes for name, info in checkpoint.source.tensors.items() if "blk.0." in name)
    assert load_stage(checkpoint, (1, 3)).weight_bytes == 2 * one


def test_tied_head_reads_no_block_and_keeps_one_matrix(checkpoint: Checkpoint) -> None:
    source = counted(checkpoint)
    head = load_head(checkpoint)
    assert source.read == [GGUF_NAMES.embedding, GGUF_NAMES.output_norm]
    assert head.weight_bytes == 4 * TINY.hidden_size * (TINY.vocab_size + 1)


def test_head_of_its_own_is_read(tmp_path: Path) -> None:
    untied = replace(TINY, tied_embeddings=False)
    path = write_tiny_gguf(tmp_path / "untied.gguf", untied)
    with open_checkpoint(path, cache_dir=tmp_path / "cache") as checkpoint:
        assert checkpoint.config == untied
        head = checkpoint.head()
        assert head is not None
        assert np.array_equal(head.numpy(), tiny_tensors(untied)[GGUF_NAMES.head])


def test_no_such_block(checkpoint: Checkpoint) -> None:
    with pytest.raises(IndexError):
        checkpoint.block(4)


def test_blobs_are_one_per_block_and_hash_their_parts(checkpoint: Checkpoint) -> None:
    blobs = checkpoint.blobs()
    names = [blob.name for blob in blobs]
    assert names == ["block.0", "block.1", "block.2", "block.3", "embedding", "head", "tokenizer"]
    for blob in blobs:
        content = b"".join(checkpoint.blob_parts(blob.name))
        assert (blob.nbytes, blob.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_tokenizer_can_be_built_from_its_blob(checkpoint: Checkpoint) -> None:
    spec = json.loads(b"".join(checkpoint.blob_parts("tokenizer")))
    text = "<|im_start|>the text"
    built = build_tokenizer(checkpoint.path, spec)
    assert built.encode(text) == checkpoint.tokenizer().encode(text)
    assert built.eos_ids == checkpoint.tokenizer().eos_ids


@pytest.mark.parametrize("name", ["block.4", "block.-1", "block.x", "block", "nothing"])
def test_no_such_blob(checkpoint: Checkpoint, name: str) -> None:
    with pytest.raises((KeyError, IndexError)):
        list(checkpoint.blob_parts(name))


def test_digest_does_not_depend_on_the_path_or_on_unrelated_metadata(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    metadata = tiny_metadata() | {"general.name": "another", "general.url": "x"}
    elsewhere = write_gguf(tmp_path / "else.gguf", metadata, tiny_tensors())
    with open_checkpoint(elsewhere, cache_dir=tmp_path / "cache") as other:
        assert other.digest == checkpoint.digest


@pytest.mark.parametrize(
    "change", [{"llama.rope.freq_base": 500.0}, {"tokenizer.ggml.eos_token_id": 0}]
)
def test_digest_depends_on_what_matters(
    checkpoint: Checkpoint, tmp_path: Path, change: dict[str, Any]
) -> None:
    other_path = write_gguf(tmp_path / "o.gguf", tiny_metadata() | change, tiny_tensors())
    with open_checkpoint(other_path, cache_dir=tmp_path / "cache") as other:
        assert other.digest != checkpoint.digest


def test_one_weight_changes_one_blob(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["blk.1.ffn_up.weight"][0, 0] += 1
    other_path = write_gguf(tmp_path / "o.gguf", tiny_metadata(), tensors)
    with open_checkpoint(other_path, cache_dir=tmp_path / "cache") as other:
        changed = set(other.blobs()) - set(checkpoint.blobs())
        assert [blob.name for blob in changed] == ["block.1"]
        assert other.digest != checkpoint.digest


def test_hashes_are_computed_once_and_then_remembered(path: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with open_checkpoint(path, cache_dir=cache) as first:
        blobs = first.blobs()
    with open_checkpoint(path, cache_dir=cache) as second:
        source = counted(second)
        assert second.blobs() == blobs
        assert source.read == []


@pytest.mark.parametrize("record", ["", "[]", "{}", '[["block.0", 1, "x"]]', "[" * 100_000])
def test_spoilt_record_counts_as_none(path: Path, tmp_path: Path, record: str) -> None:
    cache = tmp_path / "cache"
    with open_checkpoint(path, cache_dir=cache) as first:
        blobs = first.blobs()
    (saved,) = cache.iterdir()
    saved.write_text(record)
    with open_checkpoint(path, cache_dir=cache) as second:
        assert second.blobs() == blobs


def test_a_cache_that_cannot_be_written_is_done_without(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with open_checkpoint(path, cache_dir=tmp_path / "file") as checkpoint:
        assert len(checkpoint.blobs()) == 7


def test_verify_hashes_the_real_bytes(path: Path, tmp_path: Path) -> None:
    with open_checkpoint(path, cache_dir=tmp_path / "cache") as checkpoint:
        checkpoint.blobs()
        at = checkpoint.source.tensors["blk.2.ffn_up.weight"].offset
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a failing disk would do it
    with open_checkpoint(path, cache_dir=tmp_path / "cache") as checkpoint:
        checkpoint.verify_blob("block.1")
        with pytest.raises(CorruptModel) as caught:
            load_stage(checkpoint, (1, 3), verify=True)
        assert caught.value.where == "block.2"


def test_verify_against_a_manifest(checkpoint: Checkpoint) -> None:
    blobs = checkpoint.blobs()
    checkpoint.verify_blob("block.0", blobs[0].sha256)
    with pytest.raises(CorruptModel):
        checkpoint.verify_blob("block.0", blobs[1].sha256)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    del tensors["blk.3.attn_k.weight"]
    path = write_gguf(tmp_path / "m.gguf", tiny_metadata(), tensors)
    with pytest.raises(CorruptModel, match=r"blk\.3\.attn_k\.weight: expected a tensor of shape"):
        open_checkpoint(path)


def test_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["blk.0.attn_q.weight"] = tensors["blk.0.attn_q.weight"][:, :16].copy()
    path = write_gguf(tmp_path / "m.gguf", tiny_metadata(), tensors)
    with pytest.raises(CorruptModel, match=r"attn_q\.weight: expected shape \(32, 32\)"):
        open_checkpoint(path)


def test_bias_is_refused_rather_than_ignored(tmp_path: Path) -> None:
    tensors = tiny_tensors() | {"blk.0.attn_q.bias": np.zeros(32, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", tiny_metadata(), tensors)
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.attn_q\.bias"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        ({"general.architecture": "gemma2"}, "architecture 'gemma2'; supported: llama, qwen2, "),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn'"),
        ({"llama.attention.value_length": 16}, "values of another width"),
    ],
)
def test_features_the_engine_lacks_are_refused_by_name(
    tmp_path: Path, change: dict[str, Any], feature: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_metadata() | change, tiny_tensors())
    with pytest.raises(UnsupportedModel, match=feature):
        open_checkpoint(path)


def test_rope_factors_of_the_file_are_used(tmp_path: Path) -> None:
    factors = np.array([1.0, 1.5, 4.0, 8.0], np.float32)
    tensors = tiny_tensors() | {"rope_freqs.weight": factors}
    path = write_gguf(tmp_path / "m.gguf", tiny_metadata(), tensors)
    with open_checkpoint(path, cache_dir=tmp_path) as checkpoint:
        assert checkpoint.config.rope_factors == tuple(factors.tolist())


def test_missing_key_is_named(tmp_path: Path) -> None:
    metadata = tiny_metadata()
    del metadata["llama.block_count"]
    path = write_gguf(tmp_path / "m.gguf", metadata, tiny_tensors())
    with pytest.raises(CorruptModel, match=r"llama\.block_count: expected this key"):
        open_checkpoint(path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no model at"):
        open_checkpoint(tmp_path / "none.gguf")


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        open_checkpoint(tmp_path)


def test_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    path.touch()
    with pytest.raises(UnsupportedModel, match=r"model\.pth"):
        open_checkpoint(path)
