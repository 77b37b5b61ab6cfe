"""Hidden states as numpy arrays, the form in which they leave an engine.

fp32 is float32. numpy has no bfloat16, so bf16 is uint16 holding the bits: exact, and half the
bytes. Both are [n_tokens, hidden_size], C-contiguous.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from .errors import InvalidHiddenStates

EngineDtype = Literal["fp32", "bf16"]
#: What float matrices can be made into at load.
Quantization = Literal["q8_0", "q4_0", "q4_k"]
#: What computes: the C++ library on the file's own weights or on float weights that were quantised
#: at load, or torch in one of its dtypes. Members of one plan have the same.
EngineKind = Literal["native", "native-q8_0", "native-q4_0", "native-q4_k", "fp32", "bf16"]
HiddenStates: TypeAlias = npt.NDArray[Any]  # of the dtype in NUMPY_DTYPES; checked, not typed

NUMPY_DTYPES: Mapping[EngineDtype, np.dtype[Any]] = MappingProxyType(
    {"fp32": np.dtype(np.float32), "bf16": np.dtype(np.uint16)}
)


HIDDEN_DTYPES: Mapping[EngineKind, EngineDtype] = MappingProxyType(
    {kind: "bf16" if kind == "bf16" else "fp32" for kind in get_args(EngineKind)}
)

#: The native engines, by what they quantise float matrices to.
NATIVE_KINDS: Mapping[Quantization | None, EngineKind] = MappingProxyType(
    {None: "native", "q8_0": "native-q8_0", "q4_0": "native-q4_0", "q4_k": "native-q4_k"}
)
_QUANTIZATIONS = {kind: quantization for quantization, kind in NATIVE_KINDS.items()}


def is_native(kind: EngineKind) -> bool:
    """Whether the C++ library computes, and not torch."""
    return kind in _QUANTIZATIONS


def quantized_as(kind: EngineKind) -> Quantization | None:
    """What an engine makes float matrices into; None if it leaves them."""
    return _QUANTIZATIONS.get(kind)


def options_for(kind: EngineKind) -> str:
    """The options that start a node on this engine, for messages to people."""
    quantization = quantized_as(kind)
    if quantization is not None:
        return f"with --quantize {quantization}"
    return f"with --engine {kind}" + " and without --quantize" * is_native(kind)


def itemsize(dtype: EngineDtype) -> int:
    """Bytes per element of hidden states, weights and KV cache."""
    return NUMPY_DTYPES[dtype].itemsize


def check_hidden(hidden: HiddenStates, dtype: EngineDtype, hidden_size: int) -> None:
    """Refuse what is not [n_tokens >= 1, hidden_size] of the engine's dtype.

    Raises:
        InvalidHiddenStates: naming what came and what was expected.
    """
    expected = NUMPY_DTYPES[dtype]
    good_shape = hidden.ndim == 2 and hidden.shape[0] >= 1 and hidden.shape[1] == hidden_size
    if hidden.dtype != expected or not good_shape:
        raise InvalidHiddenStates(
            f"hidden states are {hidden.dtype} {list(hidden.shape)}, "
            f"expected {expected} [n_tokens, {hidden_size}] ({dtype})"
        )


def finite_rows(hidden: HiddenStates, dtype: EngineDtype) -> npt.NDArray[np.bool_]:
    """Of each row [n_rows], whether it has neither NaN nor infinity."""
    finite = np.isfinite(hidden) if dtype == "fp32" else (hidden & 0x7F80) != 0x7F80
    rows: npt.NDArray[np.bool_] = np.logical_and.reduce(finite, axis=1)
    return rows
