"""Our readers against the libraries' own: every header entry, every type that GGUF can hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from covey.node.model.checkpoint import Checkpoint
from covey.node.model.gguf import TENSOR_TYPES, GgufFile
from covey.node.model.safetensors import open_safetensors
from covey.node.model.tensor_source import to_float32
from support.tiny_models import gguf_header, tensor_entry

pytestmark = pytest.mark.slow


@pytest.mark.timeout(120)
def test_header_of_smollm2_is_what_the_gguf_package_reads(smollm2: Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(smollm2)
    with GgufFile(smollm2) as file:
        assert len(file.tensors) == len(reader.tensors) == 272
        for tensor in reader.tensors:
            info = file.tensors[tensor.name]
            assert info.type == tensor.tensor_type.name
            assert info.shape == tuple(int(size) for size in tensor.shape[::-1])
            assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        for key, field in reader.fields.items():
            if key.startswith("GGUF."):
                continue
            ours, theirs = file.metadata[key], field.contents()
            if isinstance(ours, np.ndarray):
                assert ours.tolist() == theirs
            else:
                assert (list(ours) if isinstance(ours, tuple) else ours) == theirs


def test_weights_of_smollm2_are_what_the_gguf_package_decodes(
    smollm2: Path, checkpoint: Checkpoint
) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors = {tensor.name: tensor for tensor in GGUFReader(smollm2).tensors}
    block = checkpoint.block(17)
    for ours, name in (
        (block.down, "ffn_down"),
        (block.q, "attn_q"),
        (block.attn_norm, "attn_norm"),
    ):
        theirs = tensors[f"blk.17.{name}.weight"]
        assert np.array_equal(ours.numpy(), dequantize(theirs.data, theirs.tensor_type))


@pytest.mark.parametrize("kind", TENSOR_TYPES)
def test_every_type_has_the_size_and_the_values_of_the_gguf_package(
    tmp_path: Path, kind: int
) -> None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    name, block_elements, block_bytes = TENSOR_TYPES[kind]
    assert GGML_QUANT_SIZES[GGMLQuantizationType(kind)] == (block_elements, block_bytes)
    assert GGMLQuantizationType(kind).name == name
    # Small bytes, so that no scale is a NaN of fp16.
    raw = np.random.default_rng(kind).integers(0, 60, 2 * 2 * block_bytes, dtype=np.uint8)
    path = tmp_path / "m.gguf"
    path.write_bytes(
        gguf_header({}, [tensor_entry("t", (2 * block_elements, 2), kind, 0)]) + raw.tobytes()
    )
    with GgufFile(path) as file:
        decoded = to_float32(file.tensors["t"], file.raw("t"))
    expected = dequantize(raw.reshape(2, -1), GGMLQuantizationType(kind))
    assert decoded.shape == (2, 2 * block_elements)
    assert np.array_equal(decoded, expected.reshape(decoded.shape))


def test_safetensors_written_by_the_library_is_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.float16),
        "c": torch.randn(2, 2, 2).to(torch.bfloat16),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    file = open_safetensors(tmp_path)
    for name, tensor in tensors.items():
        decoded = torch.from_numpy(to_float32(file.tensors[name], file.raw(name)))
        assert torch.equal(decoded, tensor.float())
