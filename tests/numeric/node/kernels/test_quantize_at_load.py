"""The native engine on float weights that it quantises itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from covey.node.engine.head import load_head
from covey.node.engine.tensors import Quantization
from covey.node.engine.torch_stage import load_stage
from covey.node.engines import QUANTIZATIONS
from covey.node.kernels.errors import KernelsUnavailable
from covey.node.kernels.library import Library, load_library
from covey.node.kernels.matrix_type import MatrixType
from covey.node.kernels.native_head import load_native_head
from covey.node.kernels.native_stage import load_native_stage
from covey.node.kernels.packed import Packer
from covey.node.kernels.quantize import quantize_rows
from covey.node.model.checkpoint import open_checkpoint
from covey.node.model.errors import CorruptModel
from support.tiny_models import tiny_metadata, tiny_tensors, write_gguf, write_tiny_gguf
from support.tiny_weights import SMALL, rows

WIDE = replace(SMALL, n_blocks=2, hidden_size=256, n_heads=8, intermediate_size=288)


@pytest.fixture(autouse=True, scope="module")
def library() -> Library:
    try:
        return load_library()
    except KernelsUnavailable as error:
        pytest.skip(str(error))


def after(name: str, tensor: Any, quantize: Quantization) -> Any:
    """A tensor as the engine should see it."""
    if tensor.ndim == 1:
        return tensor
    is_end = name.startswith(("token_embd", "output"))
    is_whole = quantize != "q4_k" or tensor.shape[1] % 256 == 0
    kind = MatrixType[quantize.upper()] if is_whole and not is_end else MatrixType.Q8_0
    return dequantize(quantize_rows(tensor, kind), GGMLQuantizationType(int(kind)))


def run(stage: Any, hidden: Any) -> Any:
    stage.open_session("s", len(hidden))
    return stage.forward("s", 0, hidden)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_it_computes_on_what_the_quantiser_leaves_of_the_weights(
    tmp_path: Path, quantize: Quantization, tied: bool
) -> None:
    config = replace(WIDE, tied_embeddings=tied)
    tensors, metadata = tiny_tensors(config), tiny_metadata(config)
    tensors = {  # smaller than usual: random weights amplify what activations lose
        name: tensor if tensor.ndim == 1 else tensor / 4 for name, tensor in tensors.items()
    }
    exact = write_gguf(tmp_path / "exact.gguf", metadata, tensors)
    rounded = {name: after(name, tensor, quantize) for name, tensor in tensors.items()}
    left = write_gguf(tmp_path / "left.gguf", metadata, rounded)
    hidden, ids = rows(40, config), list(range(0, config.vocab_size, 7))
    with (
        open_checkpoint(exact, cache_dir=tmp_path) as given,
        open_checkpoint(left, cache_dir=tmp_path) as expected,
    ):
        stage = load_native_stage(given, (0, 2), quantize=quantize)
        head = load_native_head(given, quantize=quantize)
        reference = load_head(expected)
        wanted = run(load_stage(expected, (0, 2)), hidden)
        moved = wanted - hidden  # what the blocks add
        assert np.abs(run(stage, hidden) - wanted).max() < 0.03 * np.abs(moved).max()
        assert np.array_equal(head.embed(ids), reference.embed(ids))
        logits = reference.logits(hidden)
        assert np.abs(head.logits(hidden) - logits).max() < 0.02 * np.abs(logits).max()
        # and it is this quantisation that it is near to, not the file
        unquantized = run(load_stage(given, (0, 2)), hidden) - hidden
        if quantize != "q8_0":
            assert rms(run(stage, hidden) - wanted) < 0.5 * rms(unquantized - moved)


def rms(x: Any) -> float:
    return float(np.sqrt(np.mean(x**2)))


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
@pytest.mark.parametrize(
    ("value", "expected"), [(np.nan, "finite"), (-np.inf, "finite"), (1e30, "can hold")]
)
def test_weights_that_cannot_be_quantised_are_refused_with_their_place(
    tmp_path: Path, library: Library, quantize: Quantization, value: float, expected: str
) -> None:
    path = write_tiny_gguf(tmp_path / "a.gguf", WIDE)
    name, row, column = "blk.1.attn_q.weight", 3, 77
    with open_checkpoint(path, cache_dir=tmp_path) as checkpoint:
        start = checkpoint.source.tensors[name].offset
    at = start + 4 * (row * WIDE.hidden_size + column)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(np.float32(value).tobytes())
    if expected == "can hold":  # said of the whole block
        at = start + 4 * (row * WIDE.hidden_size + (0 if quantize == "q4_k" else column // 32 * 32))
    with (
        open_checkpoint(path, cache_dir=tmp_path) as checkpoint,
        pytest.raises(CorruptModel, match=rf"blk\.1\.attn_q\.weight.*{expected}.*byte {at};"),
    ):
        Packer(library, quantize).pack(checkpoint, checkpoint.block_parts(1))
