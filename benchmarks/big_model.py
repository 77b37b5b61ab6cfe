"""Folders of noise in bf16, as Hugging Face keeps a Llama: larger than the memory they get.

Nothing they say means anything.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from .installs import cache_folder
from .synthetic import Shape

CONTEXT = 4096
STANDARD_DEVIATION = 0.02

#: Sixteen blocks of 121.6 MB and one matrix for both ends.
BIG = Shape(
    name="2gb",
    n_blocks=16,
    hidden=2048,
    inner=8192,
    n_heads=32,
    n_kv_heads=8,
    head_dim=64,
    vocabulary=32000,
)


def big_model(say: Callable[[str], None], shape: Shape = BIG) -> Path:
    """The folder of a shape; written at first use, in half a minute for each GB."""
    folder = cache_folder() / f"big-{shape.name}"
    if not folder.exists():
        say(f"writing {folder}")
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        (unfinished / "config.json").write_text(json.dumps(_config(shape)))
        _write(unfinished / "model.safetensors", shape)
        unfinished.rename(folder)
    return folder


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.n_blocks,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.is_tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _write(path: Path, shape: Shape) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dimensions in _tensors(shape):
        end = at + 2 * int(np.prod(dimensions))
        header[name] = {"dtype": "BF16", "shape": list(dimensions), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(0)
    noise: dict[tuple[int, ...], bytes] = {}  # takes longer to make than to write
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for idx, (_, dimensions) in enumerate(_tensors(shape)):
            if dimensions not in noise:
                values = np.ones(dimensions, dtype=np.float32)
                if len(dimensions) > 1:
                    values = random.standard_normal(dimensions, dtype=np.float32)
                    values *= STANDARD_DEVIATION
                noise[dimensions] = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
            # No two matrices are alike: what is alike has one hash, and lies on disk once.
            first = 2 * idx
            file.write(noise[dimensions][first:])
            file.write(noise[dimensions][:first])


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.hidden)
    q_rows, kv_rows = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (shape.hidden,),
        "self_attn.q_proj": (q_rows, shape.hidden),
        "self_attn.k_proj": (kv_rows, shape.hidden),
        "self_attn.v_proj": (kv_rows, shape.hidden),
        "self_attn.o_proj": (shape.hidden, q_rows),
        "post_attention_layernorm": (shape.hidden,),
        "mlp.gate_proj": (shape.inner, shape.hidden),
        "mlp.up_proj": (shape.inner, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.inner),
    }
    for idx in range(shape.n_blocks):
        for name, dimensions in shapes.items():
            yield f"model.layers.{idx}.{name}.weight", dimensions
    yield "model.norm.weight", (shape.hidden,)
    if not shape.is_tied:
        yield "lm_head.weight", (shape.vocabulary, shape.hidden)
