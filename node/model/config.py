"""`ModelConfig`: the numbers that fix what a Llama-type decoder computes.

Knows no file format; `layouts.py` derives one from GGUF metadata or from config.json.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from .errors import ModelError, UnsupportedModel

SUPPORTED_ARCHITECTURES = ("llama",)

# Upper limits, far above any model known today, so that no header makes us ask for absurd memory.
MAX_BLOCKS = 1024
MAX_WIDTH = 2**18  # hidden, intermediate
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_VOCAB = 2**22
MAX_CONTEXT = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and constants of one decoder.

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
    intermediate_size: int
    vocab_size: int  # V
    context_length: int
    rope_theta: float
    rope_dim: int  # leading dimensions of a head that are rotated
    rope_interleaved: bool  # pairs (0,1),(2,3).. as llama.cpp stores them; else (0,E/2),(1,E/2+1)..
    rms_norm_eps: float
    tied_embeddings: bool
    rope_factors: tuple[float, ...] = ()  # rope_dim/2 divisors of the frequencies; () is all ones

    def __post_init__(self) -> None:
        """Check every field against its limit."""
        if self.architecture not in SUPPORTED_ARCHITECTURES:
            raise UnsupportedModel(f"architecture {self.architecture!r}", SUPPORTED_ARCHITECTURES)
        self._check_int("n_blocks", self.n_blocks, MAX_BLOCKS)
        self._check_int("hidden_size", self.hidden_size, MAX_WIDTH)
        self._check_int("n_heads", self.n_heads, MAX_HEADS)
        self._check_int("n_kv_heads", self.n_kv_heads, self.n_heads)
        self._check_int("head_dim", self.head_dim, MAX_HEAD_DIM)
        self._check_int("intermediate_size", self.intermediate_size, MAX_WIDTH)
        self._check_int("vocab_size", self.vocab_size, MAX_VOCAB)
        self._check_int("context_length", self.context_length, MAX_CONTEXT)
        self._check_int("rope_dim", self.rope_dim, self.head_dim)
        if self.n_heads % self.n_kv_heads:
            raise _out_of_limit("n_kv_heads", self.n_kv_heads, f"a divisor of {self.n_heads}")
        if self.rope_dim % 2:
            raise _out_of_limit("rope_dim", self.rope_dim, "even")
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 0):
            raise _out_of_limit("rope_theta", self.rope_theta, "finite and above 0")
        if not 0 < self.rms_norm_eps < 1:
            raise _out_of_limit("rms_norm_eps", self.rms_norm_eps, "between 0 and 1")
        self._check_factors()

    def kv_bytes_per_token(self, n_blocks: int, itemsize: int) -> int:
        """Bytes of keys and values that one position takes in `n_blocks` blocks."""
        return 2 * n_blocks * self.n_kv_heads * self.head_dim * itemsize

    def canonical(self) -> dict[str, object]:
        """The fields as JSON values, the part of a model's identity that is not weights."""
        return asdict(self)

    def _check_factors(self) -> None:
        if self.rope_factors and len(self.rope_factors) != self.rope_dim // 2:
            n_factors = len(self.rope_factors)
            raise _out_of_limit("len(rope_factors)", n_factors, f"0 or {self.rope_dim // 2}")
        for factor in self.rope_factors:
            if not (math.isfinite(factor) and factor > 0):
                raise _out_of_limit("rope_factors", factor, "finite and above 0")

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


def _out_of_limit(field: str, value: object, limit: str) -> ModelError:
    return ModelError(f"model config: {field} = {value!r}: must be {limit}")
