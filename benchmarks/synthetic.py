"""A checkpoint of Llama-3.2-1B's shape whose weights are noise: speed on a model of a real size.

Random bytes are valid quantised blocks once their scales are sane: only those are set. Nothing
it says means anything, but every byte is read and every product computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

from .installs import cache_folder

N_BLOCKS, HIDDEN, INNER = 16, 2048, 8192
N_HEADS, N_KV_HEADS, HEAD_DIM = 32, 8, 64
VOCABULARY, CONTEXT = 128256, 8192
SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>")
TYPES: Mapping[str, Any] = MappingProxyType(
    {"Q4_K": GGMLQuantizationType.Q4_K, "Q8_0": GGMLQuantizationType.Q8_0}
)
STANDARD_DEVIATION = 0.02  # of a weight, about that of a trained model

Bytes = npt.NDArray[np.uint8]


def synthetic_1b(kind: str, say: Callable[[str], None]) -> Path:
    """The file whose matrices are all of one of TYPES; written at first use, in seconds."""
    path = cache_folder() / f"synthetic-1b.{kind}.gguf"
    if not path.exists():
        say(f"writing {path}")
        unfinished = path.with_suffix(".unfinished")
        _write(unfinished, kind)
        unfinished.rename(path)
    return path


def _write(path: Path, kind: str) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_name("synthetic 1B")
    writer.add_block_count(N_BLOCKS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(VOCABULARY)
    _add_tokenizer(writer)
    random = np.random.default_rng(0)
    norm = np.ones(HIDDEN, dtype=np.float32)
    for name, shape in _matrices():
        data = BLOCKS[kind](random, *shape)
        writer.add_tensor(name, data, raw_dtype=TYPES[kind])
    for idx in range(N_BLOCKS):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{idx}.{name}.weight", norm)
    writer.add_tensor("output_norm.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: GGUFWriter) -> None:
    """As many tokens as the shape has; all but the specials are words of their own number."""
    words = [f"w{i}" for i in range(VOCABULARY - len(SPECIALS))]
    normal, special = int(TokenType.NORMAL), int(TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*SPECIALS, *words])
    writer.add_token_types([special] * len(SPECIALS) + [normal] * len(words))
    writer.add_token_merges(["w 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _matrices() -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and [rows, columns]; the embedding is also the output matrix."""
    yield "token_embd.weight", (VOCABULARY, HIDDEN)
    kv_rows = N_KV_HEADS * HEAD_DIM
    shapes = {
        "attn_q": (N_HEADS * HEAD_DIM, HIDDEN),
        "attn_k": (kv_rows, HIDDEN),
        "attn_v": (kv_rows, HIDDEN),
        "attn_output": (HIDDEN, N_HEADS * HEAD_DIM),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }
    for idx in range(N_BLOCKS):
        for name, shape in shapes.items():
            yield f"blk.{idx}.{name}.weight", shape


def _q4_k(random: np.random.Generator, rows: int, columns: int) -> Bytes:
    """[rows, blocks of 256 x 144 B]: fp16 scale and minimum, 12 bytes of 6-bit ones, nibbles."""
    blocks = _noise(random, rows, columns // 256, 144)
    # A weight is d * scale * nibble - dmin * minimum, with 6-bit scale and minimum: in the mean
    # 31.5 * 7.5 * d is taken away again if dmin is 7.5 times d, and the spread is about 200 * d.
    halves = np.array([STANDARD_DEVIATION / 200, 7.5 * STANDARD_DEVIATION / 200], dtype="<f2")
    blocks[:, :, :4] = halves.view(np.uint8)
    return blocks.reshape(rows, -1)


def _q8_0(random: np.random.Generator, rows: int, columns: int) -> Bytes:
    """[rows, blocks of 32 x 34 B]: an fp16 scale, signed bytes with a spread of 74."""
    blocks = _noise(random, rows, columns // 32, 34)
    blocks[:, :, :2] = np.array([STANDARD_DEVIATION / 74], dtype="<f2").view(np.uint8)
    return blocks.reshape(rows, -1)


def _noise(random: np.random.Generator, rows: int, n_blocks: int, block_bytes: int) -> Bytes:
    return np.frombuffer(bytearray(random.bytes(rows * n_blocks * block_bytes)), np.uint8).reshape(
        rows, n_blocks, block_bytes
    )


BLOCKS: Mapping[str, Callable[[np.random.Generator, int, int], Bytes]] = MappingProxyType(
    {"Q4_K": _q4_k, "Q8_0": _q8_0}
)
