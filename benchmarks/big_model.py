"""A folder of 2 GB of noise in bf16, as Hugging Face keeps a Llama: larger than the memory it gets.

Sixteen blocks of 121.6 MB and one matrix for both ends. Nothing it says means anything.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from .installs import cache_folder

N_BLOCKS, HIDDEN, INNER = 16, 2048, 8192
N_HEADS, N_KV_HEADS, HEAD_DIM = 32, 8, 64
VOCABULARY, CONTEXT = 32000, 4096
STANDARD_DEVIATION = 0.02

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": N_BLOCKS,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": N_KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def big_model(say: Callable[[str], None]) -> Path:
    """The folder; written at first use, in half a minute."""
    folder = cache_folder() / "big-2gb"
    if not folder.exists():
        say(f"writing {folder}")
        unfinished = folder.with_name("big-2gb.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        (unfinished / "config.json").write_text(json.dumps(_CONFIG))
        _write(unfinished / "model.safetensors")
        unfinished.rename(folder)
    return folder


def _write(path: Path) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in _tensors():
        end = at + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in _tensors():
            values = np.ones(shape, dtype=np.float32)
            if len(shape) > 1:
                values = random.standard_normal(shape, dtype=np.float32) * STANDARD_DEVIATION
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def _tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    kv_rows = N_KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (N_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (kv_rows, HIDDEN),
        "self_attn.v_proj": (kv_rows, HIDDEN),
        "self_attn.o_proj": (HIDDEN, N_HEADS * HEAD_DIM),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    for idx in range(N_BLOCKS):
        for name, shape in shapes.items():
            yield f"model.layers.{idx}.{name}.weight", shape
    yield "model.norm.weight", (HIDDEN,)
