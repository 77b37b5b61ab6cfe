"""Checkpoints of real models' shapes whose weights are noise: speed at a real size, no download.

Random bytes are valid quantised blocks once their scales are sane: only those are set. Nothing
it says means anything, but every byte is read and every product computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

from .installs import cache_folder

CONTEXT = 8192
SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>")
MERGED = ("w", "0")  # a tokenizer needs a merge, and the merge its parts
STANDARD_DEVIATION = 0.02  # of a weight, about that of a trained model

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A llama's dimensions."""

    name: str  # as in SHAPES; that of its file begins with "synthetic-"
    n_blocks: int
    hidden: int
    inner: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocabulary: int
    is_tied: bool = True  # the embedding is also the output matrix

    def matrices(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Names and [rows, columns]."""
        yield "token_embd.weight", (self.vocabulary, self.hidden)
        if not self.is_tied:
            yield "output.weight", (self.vocabulary, self.hidden)
        kv_rows, q_rows = self.n_kv_heads * self.head_dim, self.n_heads * self.head_dim
        shapes = {
            "attn_q": (q_rows, self.hidden),
            "attn_k": (kv_rows, self.hidden),
            "attn_v": (kv_rows, self.hidden),
            "attn_output": (self.hidden, q_rows),
            "ffn_gate": (self.inner, self.hidden),
            "ffn_up": (self.inner, self.hidden),
            "ffn_down": (self.hidden, self.inner),
        }
        for idx in range(self.n_blocks):
            for name, shape in shapes.items():
                yield f"blk.{idx}.{name}.weight", shape


#: By short name. "llama-2-7b-8of32" has 8 of Llama-2-7B's 32 blocks and all of its width: messages,
#: shares and the time of a block are those of the real one, and a token's blocks take a quarter.
SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "llama-3.2-1b": Shape(
            name="llama-3.2-1b",
            n_blocks=16,
            hidden=2048,
            inner=8192,
            n_heads=32,
            n_kv_heads=8,
            head_dim=64,
            vocabulary=128256,
        ),
        "tp-512": Shape(
            name="tp-512",
            n_blocks=30,
            hidden=512,
            inner=1536,
            n_heads=8,
            n_kv_heads=4,
            head_dim=64,
            vocabulary=32000,
        ),
        "llama-2-7b-8of32": Shape(
            name="llama-2-7b-8of32",
            n_blocks=8,
            hidden=4096,
            inner=11008,
            n_heads=32,
            n_kv_heads=32,
            head_dim=128,
            vocabulary=32000,
            is_tied=False,
        ),
    }
)


def synthetic(shape: Shape, kind: str, say: Callable[[str], None]) -> Path:
    """The file of a shape whose matrices are all of one of TYPES; written at first use."""
    path = cache_folder() / f"synthetic-{shape.name}.{kind}.gguf"
    if not path.exists():
        say(f"writing {path}")
        unfinished = path.with_suffix(".unfinished")
        _write(unfinished, shape, kind)
        unfinished.rename(path)
    return path


def _write(path: Path, shape: Shape, kind: str) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_name(shape.name.replace("-", " "))
    writer.add_block_count(shape.n_blocks)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_vocab_size(shape.vocabulary)
    _add_tokenizer(writer, shape.vocabulary)
    random = np.random.default_rng(0)
    norm = np.ones(shape.hidden, dtype=np.float32)
    type_ = TYPES[kind]
    for name, dimensions in shape.matrices():
        data = type_.noise(random, *dimensions)
        writer.add_tensor(name, data, raw_dtype=type_.ggml)
    for idx in range(shape.n_blocks):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{idx}.{name}.weight", norm)
    writer.add_tensor("output_norm.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: GGUFWriter, vocabulary: int) -> None:
    """As many tokens as the shape has; all but the specials are words of their own number."""
    n_words = vocabulary - len(SPECIALS) - len(MERGED)
    words = [*MERGED, *(f"w{i}" for i in range(n_words))]
    normal, special = int(TokenType.NORMAL), int(TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*SPECIALS, *words])
    writer.add_token_types([special] * len(SPECIALS) + [normal] * len(words))
    writer.add_token_merges([" ".join(MERGED)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


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


def _q4_0(random: np.random.Generator, rows: int, columns: int) -> Bytes:
    """[rows, blocks of 32 x 18 B]: an fp16 scale, nibbles around 8 with a spread of 4.6."""
    blocks = _noise(random, rows, columns // 32, 18)
    blocks[:, :, :2] = np.array([STANDARD_DEVIATION / 4.6], dtype="<f2").view(np.uint8)
    return blocks.reshape(rows, -1)


def _bf16(random: np.random.Generator, rows: int, columns: int) -> Bytes:
    """[rows, columns x 2 B]: the upper halves of normal float32."""
    values = random.standard_normal((rows, columns), dtype=np.float32)
    values *= STANDARD_DEVIATION
    upper = values.view("<u2").reshape(rows, columns, 2)[:, :, 1]
    return np.ascontiguousarray(upper).view(np.uint8)


def _noise(random: np.random.Generator, rows: int, n_blocks: int, block_bytes: int) -> Bytes:
    return np.frombuffer(bytearray(random.bytes(rows * n_blocks * block_bytes)), np.uint8).reshape(
        rows, n_blocks, block_bytes
    )


@dataclass(frozen=True, slots=True)
class MatrixType:
    """How GGUF calls a type, and noise of that type."""

    ggml: GGMLQuantizationType
    noise: Callable[[np.random.Generator, int, int], Bytes]  # rows, columns


TYPES: Mapping[str, MatrixType] = MappingProxyType(
    {
        "Q4_K": MatrixType(GGMLQuantizationType.Q4_K, _q4_k),
        "Q8_0": MatrixType(GGMLQuantizationType.Q8_0, _q8_0),
        "Q4_0": MatrixType(GGMLQuantizationType.Q4_0, _q4_0),
        "BF16": MatrixType(GGMLQuantizationType.BF16, _bf16),
    }
)
