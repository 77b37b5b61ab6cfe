"""Which rows of which tensor a matrix is, and what `check` says of tensors that do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey.node.model.checkpoint import Checkpoint, open_checkpoint
from covey.node.model.config import ModelConfig
from covey.node.model.errors import CorruptModel, UnsupportedModel
from covey.node.model.layouts import block_parts, gguf_names
from covey.node.model.tensor_source import TensorInfo, TensorSlice
from support.tiny_models import TINY, tiny_metadata, write_gguf

PHI3 = replace(TINY, architecture="phi3", rope_interleaved=False)
MOE = replace(
    TINY,
    architecture="qwen3moe",
    rope_interleaved=False,
    has_qk_norm=True,
    intermediate_size=16,
    n_experts=3,
    n_experts_used=2,
)
ALL = replace(TINY, has_qkv_bias=True, has_qk_norm=True, has_post_norms=True)


def metadata(config: ModelConfig) -> dict[str, Any]:
    plain = tiny_metadata(config)
    name = config.architecture
    renamed = {key.replace("llama.", f"{name}.", 1): value for key, value in plain.items()}
    renamed["general.architecture"] = name
    if config.n_experts:
        renamed[f"{name}.expert_count"] = config.n_experts
        renamed[f"{name}.expert_used_count"] = config.n_experts_used
        renamed[f"{name}.expert_feed_forward_length"] = config.intermediate_size
    return renamed


def tensors(config: ModelConfig) -> dict[str, np.ndarray[Any, Any]]:
    names, random = gguf_names(config), np.random.default_rng(0)
    shapes = {names.embedding: (config.vocab_size, config.hidden_size)}
    shapes[names.output_norm] = (config.hidden_size,)  # type: ignore[assignment]
    for block_idx in range(config.n_blocks):
        parts = block_parts(names, config, block_idx).values()
        shapes |= {part.name: part.tensor_shape for part in parts}  # type: ignore[misc]
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@contextmanager
def opened(
    folder: Path, config: ModelConfig, held: dict[str, np.ndarray[Any, Any]]
) -> Iterator[Checkpoint]:
    path = write_gguf(folder / "m.gguf", metadata(config), held)
    with open_checkpoint(path, cache_dir=folder) as checkpoint:
        yield checkpoint


def test_plain_llama_is_whole_tensors(tmp_path: Path) -> None:
    held = tensors(TINY)
    with opened(tmp_path, TINY, held) as checkpoint:
        parts = checkpoint.block_parts(2)
        assert parts["gate"].tensor == "blk.2.ffn_gate.weight"
        for part in parts.values():
            assert (part.row_start, part.row_stop) == (0, held[part.tensor].shape[0])
            assert checkpoint.raw(part) == held[part.tensor].tobytes()


def test_fused_matrices_are_rows_of_one_tensor(tmp_path: Path) -> None:
    held = tensors(PHI3)
    with opened(tmp_path, PHI3, held) as checkpoint:
        parts = checkpoint.block_parts(1)
        block = checkpoint.block(1)
        assert checkpoint.config == PHI3
    rows = {f: (p.tensor, p.row_start, p.row_stop) for f, p in parts.items() if f in "qkvgateup"}
    assert rows == {
        "q": ("blk.1.attn_qkv.weight", 0, 32),
        "k": ("blk.1.attn_qkv.weight", 32, 48),
        "v": ("blk.1.attn_qkv.weight", 48, 64),
        "gate": ("blk.1.ffn_up.weight", 0, 64),
        "up": ("blk.1.ffn_up.weight", 64, 128),
    }
    assert np.array_equal(block.k.numpy(), held["blk.1.attn_qkv.weight"][32:48])
    assert np.array_equal(block.up.numpy(), held["blk.1.ffn_up.weight"][64:])


def test_experts_are_slices_of_a_stack(tmp_path: Path) -> None:
    held = tensors(MOE)
    with opened(tmp_path, MOE, held) as checkpoint:
        parts, block = checkpoint.block_parts(3), checkpoint.block(3)
        down = parts["down.2"]
        assert (down.tensor, down.row_start, down.row_stop) == (
            "blk.3.ffn_down_exps.weight",
            64,
            96,
        )
        assert down.info.shape == (32, 16)
        assert checkpoint.raw(down) == held["blk.3.ffn_down_exps.weight"][2].tobytes()
        assert checkpoint.config == MOE
    assert np.array_equal(block.down.numpy(), held["blk.3.ffn_down_exps.weight"])
    assert np.array_equal(block.gate.numpy(), held["blk.3.ffn_gate_exps.weight"])


def test_a_shared_tensor_is_once_in_its_blob(tmp_path: Path) -> None:
    held = tensors(MOE)
    with opened(tmp_path, MOE, held) as checkpoint:
        size = sum(tensor.nbytes for name, tensor in held.items() if "blk.0." in name)
        header = len(b"".join(checkpoint.blob_parts("block.0"))) - size
        assert 0 < header < 2000


def test_rows_of_a_quantised_tensor_are_a_byte_range() -> None:
    stacked = TensorInfo("t", "Q8_0", (3, 16, 64), offset=1000, nbytes=3 * 16 * 2 * 34)
    part = TensorSlice.of(stacked, 16, 32)
    assert part.info == TensorInfo("t", "Q8_0", (16, 64), 1000 + 16 * 68, 16 * 68)
    rows = TensorSlice.of(TensorInfo("t", "Q4_1", (8, 32), 64, 160), 2, 5)
    assert (rows.info.shape, rows.info.offset, rows.info.nbytes) == ((3, 32), 104, 60)


def test_every_optional_tensor_is_counted() -> None:
    for config in (TINY, PHI3, MOE, ALL):
        parts = block_parts(gguf_names(config), config, 0).values()
        shapes = {part.name: part.tensor_shape for part in parts}
        assert config.block_weights == sum(np.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize(
    ("config", "name", "shape"),
    [
        (PHI3, "blk.0.attn_qkv.weight", (63, 32)),
        (PHI3, "blk.2.ffn_up.weight", (64, 32)),
        (MOE, "blk.1.ffn_gate_exps.weight", (2, 16, 32)),
        (MOE, "blk.1.ffn_down_exps.weight", (3, 16, 32)),
        (MOE, "blk.1.ffn_gate_inp.weight", (3, 16)),
        (MOE, "blk.0.attn_q_norm.weight", (32,)),
    ],
)
def test_tensors_of_another_shape_are_named(
    tmp_path: Path, config: ModelConfig, name: str, shape: tuple[int, ...]
) -> None:
    held = tensors(config)
    held[name] = np.zeros(shape, np.float32)
    with pytest.raises(CorruptModel, match="expected shape") as caught:
        open_checkpoint(write_gguf(tmp_path / "m.gguf", metadata(config), held))
    assert caught.value.where == name
    del held[name]
    with pytest.raises(CorruptModel, match="expected a tensor of shape") as caught:
        open_checkpoint(write_gguf(tmp_path / "n.gguf", metadata(config), held))
    assert caught.value.where == name


@pytest.mark.parametrize(
    ("architecture", "change", "feature"),
    [
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping in 'gemma3'"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("qwen2", {"attention.sliding_window": 9}, "a sliding window without a pattern in 'qwen2'"),
        ("llama", {"expert_count": 8}, "mixture of experts in 'llama'; supported: qwen3moe"),
        ("qwen3moe", {"expert_weights_scale": 2.5}, "expert_weights_scale = 2.5"),
        ("llama", {"attention.causal": False}, "attention that is not causal"),
    ],
)
def test_features_in_gguf_are_refused_by_name(
    tmp_path: Path, architecture: str, change: dict[str, Any], feature: str
) -> None:
    config = MOE if architecture == "qwen3moe" else replace(TINY, architecture=architecture)
    changed = {f"{architecture}.{key}": value for key, value in change.items()}
    path = write_gguf(tmp_path / "m.gguf", metadata(config) | changed, tensors(config))
    with pytest.raises(UnsupportedModel, match=feature):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"attention.sliding_window": "9"}, "attention.sliding_window"),
        ({"attention.sliding_window_pattern": [1, 0]}, "attention.sliding_window_pattern"),
        ({"attention.sliding_window_pattern": "x"}, "attention.sliding_window_pattern"),
        ({"embedding_length": 0}, "embedding_length"),
        ({"attention.head_count": [4, 4, 4, 4]}, "attention.head_count"),
        ({"rope.freq_base_swa": "x"}, "rope.freq_base_swa"),
    ],
)
def test_metadata_of_the_wrong_type_is_named(
    tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    config = replace(TINY, architecture="gemma3")
    window = {"gemma3.attention.sliding_window": 9}
    changed = metadata(config) | window | {f"gemma3.{k}": value for k, value in change.items()}
    with pytest.raises(CorruptModel) as caught:
        open_checkpoint(write_gguf(tmp_path / "m.gguf", changed, tensors(config)))
    assert caught.value.where == f"gemma3.{key}"
