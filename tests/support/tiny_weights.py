"""A small quantised model and rows for it, for tests of the native engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from covey.node.model.config import ModelConfig

from .tiny_models import TINY, gguf_header, tensor_entry, tiny_metadata, tiny_tensors

SMALL = replace(
    TINY,
    n_blocks=3,
    hidden_size=96,
    n_heads=6,
    n_kv_heads=2,
    head_dim=32,
    rope_dim=32,
    intermediate_size=160,
    context_length=1024,
)


def write_quantized(
    path: Path, config: ModelConfig, kind: str, *, break_scale: bool = False
) -> Path:
    """A tiny model whose matrices are of one GGUF type; norms stay F32."""
    entries, data = [], b""
    for name, tensor in tiny_tensors(config).items():
        as_type = GGMLQuantizationType.F32 if tensor.ndim == 1 else GGMLQuantizationType[kind]
        raw = quantize(tensor, as_type).tobytes()
        if break_scale and name == "blk.1.attn_output.weight":
            raw = raw[:40] + b"\x00\x7e" + raw[42:]  # a NaN in the third block's scale
        entries.append(tensor_entry(name, tensor.shape[::-1], int(as_type), len(data)))
        data += raw + b"\0" * (-len(raw) % 32)
    path.write_bytes(gguf_header(tiny_metadata(config), entries) + data)
    return path


def rows(n: int, config: ModelConfig = SMALL, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    return random.normal(size=(n, config.hidden_size)).astype(np.float32)
