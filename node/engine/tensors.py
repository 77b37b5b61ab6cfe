"""Hidden states as numpy arrays, the form in which they leave an engine.

fp32 is float32. numpy has no bfloat16, so bf16 is uint16 holding the bits: exact, and half the
bytes. Both are [n_tokens, hidden_size], C-contiguous.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import InvalidHiddenStates

EngineDtype = Literal["fp32", "bf16"]
#: What computes: the C++ library on quantised weights, or torch in one of its dtypes.
EngineKind = Literal["native", "fp32", "bf16"]
HiddenStates: TypeAlias = npt.NDArray[Any]  # of the dtype in NUMPY_DTYPES; checked, not typed

NUMPY_DTYPES: Mapping[EngineDtype, np.dtype[Any]] = MappingProxyType(
    {"fp32": np.dtype(np.float32), "bf16": np.dtype(np.uint16)}
)


HIDDEN_DTYPES: Mapping[EngineKind, EngineDtype] = MappingProxyType(
    {"native": "fp32", "fp32": "fp32", "bf16": "bf16"}
)


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
