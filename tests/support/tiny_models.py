"""Writes tiny random models with a real tokenizer, in milliseconds: a whole GGUF file by hand."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from covey.node.model.config import ModelConfig
from covey.node.model.layouts import GGUF_NAMES
from covey.node.model.tokenizer_spec import byte_alphabet

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# One token per byte and two merges, so that encoding is not trivial.
VOCABULARY = (*SPECIALS, *sorted(byte_alphabet()), "th", "the")
MERGES = ("t h", "th e")

TINY = ModelConfig(
    architecture="llama",
    n_blocks=4,
    hidden_size=32,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    intermediate_size=64,
    vocab_size=len(VOCABULARY),
    context_length=512,
    rope_theta=10000.0,
    rope_dim=8,
    rope_interleaved=True,
    rms_norm_eps=2**-17,  # exact in the file's float32
    tied_embeddings=True,
)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(item: Any) -> bytes:
    """A typed GGUF value: str, bool, int (u32), float (f32), list of str or of int (i32)."""
    if isinstance(item, str):
        return struct.pack("<I", 8) + string(item)
    if isinstance(item, bool):
        return struct.pack("<I?", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if all(isinstance(entry, str) for entry in item):
        return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(string, item))
    return struct.pack("<IIQ", 9, 5, len(item)) + struct.pack(f"<{len(item)}i", *item)


def tensor_entry(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    """`dims` as GGUF has them: columns first."""
    packed = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return string(name) + packed


def gguf_header(metadata: Mapping[str, Any], entries: list[bytes], version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(entries), len(metadata))
    keys = b"".join(string(key) + value(item) for key, item in metadata.items())
    header = head + keys + b"".join(entries)
    return header + b"\0" * (-len(header) % 32)


def tiny_metadata(config: ModelConfig = TINY) -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.block_count": config.n_blocks,
        "llama.context_length": config.context_length,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.rope_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": list(VOCABULARY),
        "tokenizer.ggml.token_type": [3 if token in SPECIALS else 1 for token in VOCABULARY],
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def tiny_tensors(config: ModelConfig = TINY, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Random fp32 tensors of every name that GGUF gives them."""
    random = np.random.default_rng(seed)
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes = {
        "attn_norm": (hidden,),
        "q": (q_rows, hidden),
        "k": (kv_rows, hidden),
        "v": (kv_rows, hidden),
        "o": (hidden, q_rows),
        "ffn_norm": (hidden,),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    named: dict[str, tuple[int, ...]] = {GGUF_NAMES.embedding: (config.vocab_size, hidden)}
    for block_idx in range(config.n_blocks):
        named |= {name: shapes[f] for f, name in GGUF_NAMES.block.at(block_idx).items()}
    named[GGUF_NAMES.output_norm] = (hidden,)
    if not config.tied_embeddings:
        named[GGUF_NAMES.head] = (config.vocab_size, hidden)
    return {
        name: random.normal(1.0 if "norm" in name else 0.0, 0.2, shape).astype(np.float32)
        for name, shape in named.items()
    }


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray[Any, Any]]
) -> Path:
    entries, data = [], b""
    for name, tensor in tensors.items():
        entries.append(tensor_entry(name, tensor.shape[::-1], 0, len(data)))
        raw = tensor.tobytes()
        data += raw + b"\0" * (-len(raw) % 32)
    path.write_bytes(gguf_header(metadata, entries) + data)
    return path


def write_tiny_gguf(path: Path, config: ModelConfig = TINY, seed: int = 0) -> Path:
    """A whole model: random weights, a tokenizer of bytes, a chat template."""
    return write_gguf(path, tiny_metadata(config), tiny_tensors(config, seed))
