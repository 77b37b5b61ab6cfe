"""`ModelConfig`: the numbers that fix what a decoder computes.

One record for every architecture: what sets one apart from plain Llama is a field here, and its
default means plain Llama. An engine reads these facts and never asks for a name. Knows no file
format; `gguf_config.py` and `hugging_face_config.py` derive one from a file's metadata.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Literal, TypeAlias

from .errors import ModelError, UnsupportedModel

# As a GGUF file names them, but for Mistral, which calls itself "llama" there.
SUPPORTED_ARCHITECTURES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3moe",
    "phi3",
    "gemma3",
    "smollm3",
)

RopeKind: TypeAlias = Literal["main", "local", "none"]
ROPE_KINDS: tuple[RopeKind, ...] = ("main", "local", "none")
Activation: TypeAlias = Literal["silu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")

# Upper limits, far above any model known today, so that no header makes us ask for absurd memory.
MAX_BLOCKS = 1024
MAX_WIDTH = 2**18  # hidden, intermediate
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_VOCAB = 2**22
MAX_CONTEXT = 2**24
MAX_EXPERTS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and constants of one decoder.

    A field per block is a tuple with an entry for each block of the model, or () if all blocks
    have the default.

    Raises:
        ModelError: a field is out of its limits; the text names field, value and limit.
        UnsupportedModel: an architecture that the engine does not compute.
    """

    architecture: str
    n_blocks: int
    hidden_size: int  # D
    n_heads: int  # H
    n_kv_heads: int  # K, divides H (grouped-query attention, arXiv:2305.13245)
    head_dim: int  # E
    intermediate_size: int  # rows of a gate matrix; with experts, of one expert's
    vocab_size: int  # V
    context_length: int
    rope_theta: float
    rope_dim: int  # leading dimensions of a head that are rotated
    rope_interleaved: bool  # pairs (0,1),(2,3).. as llama.cpp stores them; else (0,E/2),(1,E/2+1)..
    rms_norm_eps: float
    tied_embeddings: bool
    rope_factors: tuple[float, ...] = ()  # rope_dim/2 divisors of the frequencies; () is all ones

    # What other architectures add. Per block:
    windows: tuple[int, ...] = ()  # position i sees the keys of (i - window, i]; 0 sees all
    rope_kinds: tuple[RopeKind, ...] = ()  # "main", "local" (its own theta, plain), "none"
    # Of the whole model:
    rope_local_theta: float = 10000.0  # of blocks whose rope is "local"
    rope_long_factors: tuple[float, ...] = ()  # in place of rope_factors, see `is_long`
    rope_original_context: int = 0  # sessions above it take the long factors
    rope_scale: float = 1.0  # of the main rope's cosines and sines
    attention_scale: float | None = None  # of q.k before the softmax; None is 1/sqrt(E)
    embedding_scale: float = 1.0
    activation: Activation = "silu"  # of the gate
    has_qkv_bias: bool = False
    has_qk_norm: bool = False  # an RMSNorm over each head of q and of k, before the rotation
    has_post_norms: bool = False  # an RMSNorm of what attention and MLP add to the residual
    n_experts: int = 0  # 0 is a dense MLP
    n_experts_used: int = 0  # for each position
    normalizes_experts: bool = True  # the chosen experts' weights add up to 1

    def __post_init__(self) -> None:
        """Check every field against its limit."""
        if self.architecture not in SUPPORTED_ARCHITECTURES:
            raise UnsupportedModel(f"architecture {self.architecture!r}", SUPPORTED_ARCHITECTURES)
        self._check_shape()
        self._check_rope()
        self._check_per_block()
        self._check_experts()
        if not 0 < self.rms_norm_eps < 1:
            raise _out_of_limit("rms_norm_eps", self.rms_norm_eps, "between 0 and 1")
        _check_positive("embedding_scale", self.embedding_scale)
        if self.attention_scale is not None:
            _check_positive("attention_scale", self.attention_scale)
        if self.activation not in ACTIVATIONS:
            raise UnsupportedModel(f"activation {self.activation!r}", ACTIVATIONS)

    def window(self, block_idx: int) -> int:
        """How many positions, its own included, a position of this block sees; 0 is all."""
        return self.windows[block_idx] if self.windows else 0

    def rope_kind(self, block_idx: int) -> RopeKind:
        """How this block rotates its queries and keys."""
        return self.rope_kinds[block_idx] if self.rope_kinds else "main"

    def is_long(self, capacity_tokens: int) -> bool:
        """Whether a session with room for so many positions takes `rope_long_factors`.

        It is decided when a session opens, and for all its positions: keys that were rotated by
        one set of factors mean nothing to queries rotated by the other.
        """
        return bool(self.rope_long_factors) and capacity_tokens > self.rope_original_context

    @property
    def score_scale(self) -> float:
        """What q.k is multiplied with before the softmax."""
        default = 1.0 / math.sqrt(self.head_dim)
        return default if self.attention_scale is None else self.attention_scale

    def kv_bytes_per_token(self, n_blocks: int, itemsize: int) -> int:
        """Bytes of keys and values that one position takes in `n_blocks` blocks."""
        return 2 * n_blocks * self.n_kv_heads * self.head_dim * itemsize

    @property
    def attention_weights(self) -> int:
        """How many numbers one block's attention holds: matrices, norms and biases."""
        hidden, q_rows = self.hidden_size, self.n_heads * self.head_dim
        kv_rows = self.n_kv_heads * self.head_dim
        attention = 2 * hidden * (q_rows + kv_rows)
        attention += (q_rows + 2 * kv_rows) * self.has_qkv_bias
        attention += 2 * self.head_dim * self.has_qk_norm
        return attention + hidden * (1 + self.has_post_norms)

    @property
    def block_weights(self) -> int:
        """How many numbers one block holds: its attention's, its MLP's, and every expert."""
        hidden = self.hidden_size
        mlp = 3 * self.intermediate_size * hidden * max(self.n_experts, 1)
        mlp += self.n_experts * hidden + hidden * (1 + self.has_post_norms)
        return self.attention_weights + mlp

    def canonical(self) -> dict[str, object]:
        """The fields as JSON values, the part of a model's identity that is not weights.

        A field at its default is left out, so that a new one changes no identity.
        """
        values = asdict(self)
        return {f.name: values[f.name] for f in fields(self) if values[f.name] != f.default}

    def _check_shape(self) -> None:
        self._check_int("n_blocks", self.n_blocks, MAX_BLOCKS)
        self._check_int("hidden_size", self.hidden_size, MAX_WIDTH)
        self._check_int("n_heads", self.n_heads, MAX_HEADS)
        self._check_int("n_kv_heads", self.n_kv_heads, self.n_heads)
        self._check_int("head_dim", self.head_dim, MAX_HEAD_DIM)
        self._check_int("intermediate_size", self.intermediate_size, MAX_WIDTH)
        self._check_int("vocab_size", self.vocab_size, MAX_VOCAB)
        self._check_int("context_length", self.context_length, MAX_CONTEXT)
        if self.n_heads % self.n_kv_heads:
            raise _out_of_limit("n_kv_heads", self.n_kv_heads, f"a divisor of {self.n_heads}")

    def _check_rope(self) -> None:
        self._check_int("rope_dim", self.rope_dim, self.head_dim)
        if self.rope_dim % 2:
            raise _out_of_limit("rope_dim", self.rope_dim, "even")
        for field in ("rope_theta", "rope_local_theta", "rope_scale"):
            _check_positive(field, getattr(self, field))
        for field in ("rope_factors", "rope_long_factors"):
            factors = getattr(self, field)
            if factors and len(factors) != self.rope_dim // 2:
                raise _out_of_limit(f"len({field})", len(factors), f"0 or {self.rope_dim // 2}")
            for factor in factors:
                _check_positive(field, factor)
        if self.rope_long_factors:
            self._check_int("rope_original_context", self.rope_original_context, MAX_CONTEXT)

    def _check_per_block(self) -> None:
        for field in ("windows", "rope_kinds"):
            n_entries = len(getattr(self, field))
            if n_entries not in (0, self.n_blocks):
                raise _out_of_limit(f"len({field})", n_entries, f"0 or {self.n_blocks}")
        for window in self.windows:
            if type(window) is not int or not 0 <= window <= MAX_CONTEXT:
                raise _out_of_limit("windows", window, f"whole numbers from 0 to {MAX_CONTEXT}")
        for kind in self.rope_kinds:
            if kind not in ROPE_KINDS:
                raise _out_of_limit("rope_kinds", kind, f"one of {ROPE_KINDS}")

    def _check_experts(self) -> None:
        if self.n_experts:
            self._check_int("n_experts", self.n_experts, MAX_EXPERTS)
            self._check_int("n_experts_used", self.n_experts_used, self.n_experts)
        elif self.n_experts_used:
            raise _out_of_limit("n_experts_used", self.n_experts_used, "0 without experts")

    @staticmethod
    def _check_int(field: str, value: int, limit: int) -> None:
        if type(value) is not int or not 1 <= value <= limit:
            raise _out_of_limit(field, value, f"a whole number from 1 to {limit}")


def llama3_rope_factors(
    *, theta: float, rope_dim: int, factor: float, low: float, high: float, original_context: int
) -> tuple[float, ...]:
    """Frequency divisors of Llama 3.1's RoPE scaling, as `rope_freqs.weight` of a GGUF holds them.

    Long wavelengths are divided by `factor`, short ones stay, those between are blended: the
    "llama3" rule of transformers' `modeling_rope_utils.py`.
    """
    factors = []
    for pair in range(rope_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / rope_dim)
        if wavelength < original_context / high:
            factors.append(1.0)
        elif wavelength > original_context / low:
            factors.append(factor)
        else:
            smooth = (original_context / wavelength - low) / (high - low)
            factors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return tuple(factors)


def _check_positive(field: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise _out_of_limit(field, value, "finite and above 0")


def _out_of_limit(field: str, value: object, limit: str) -> ModelError:
    return ModelError(f"model config: {field} = {value!r}: must be {limit}")
