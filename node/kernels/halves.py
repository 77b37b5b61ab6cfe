"""Floats as halves and back: by the native library where there is one, else by numpy.

Numpy takes ten times as long, which for partial sums of a few KB is a quarter of a whole all-reduce
within one machine. The bits are the same: conversions are exact, or round to the nearest. Memory is
kept from call to call, since asking numpy for an address takes longer than the conversion.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import KernelsUnavailable
from .library import load_library

Floats = npt.NDArray[np.float32]

LARGEST = 65504.0
HALF_BYTES, FLOAT_BYTES = 2, 4

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "covey_halves_narrow": (c_int32, [c_void_p, c_int64, c_void_p]),
    "covey_halves_widen": (None, [c_void_p, c_int64, c_void_p]),
    "covey_halves_add": (None, [c_void_p, c_int64, c_void_p]),
}


class Narrowed:
    """Memory for up to `size` values as halves."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._native = _native()
        self._halves = np.empty(size, "<f2")
        self._address = self._halves.ctypes.data
        self._bytes = self._halves.view(np.uint8).data

    def fill(self, values: Floats) -> memoryview | None:
        """The bytes of flat `values`; None if one is beyond halves, or no number.

        They are valid until the next call.
        """
        n = values.size
        if values.shape != (n,) or values.dtype != np.float32 or n > self.size:
            raise ValueError("not flat floats, or too many")
        if self._native is not None and values.flags.c_contiguous:
            if self._native.covey_halves_narrow(values.ctypes.data, n, self._address):
                return None
        else:
            # Comparisons with a NaN are false.
            if n and not (values.max() <= LARGEST and values.min() >= -LARGEST):
                return None
            np.copyto(self._halves[:n], values, casting="same_kind")
        return self._bytes[: HALF_BYTES * n]


class Total:
    """Memory for `size` values, float32, that halves are put into or added to."""

    def __init__(self, size: int) -> None:
        self.values: Floats = np.empty(size, np.float32)
        self._native = _native()
        self._address = self.values.ctypes.data
        self._halves = np.empty(size, "<f2")
        self._halves_address = self._halves.ctypes.data
        self._bytes = self._halves.view(np.uint8).data

    def put(self, body: memoryview, at: int = 0) -> None:
        """The halves in `body` become the values from `at` on."""
        n = self._take(body, at)
        if self._native is None:
            self.values[at : at + n] = self._halves[:n]
        else:
            to = self._address + FLOAT_BYTES * at
            self._native.covey_halves_widen(self._halves_address, n, to)

    def add(self, body: memoryview, at: int = 0) -> None:
        """The halves in `body` are added to the values from `at` on."""
        n = self._take(body, at)
        if self._native is None:
            self.values[at : at + n] += self._halves[:n]
        else:
            to = self._address + FLOAT_BYTES * at
            self._native.covey_halves_add(self._halves_address, n, to)

    def _take(self, body: memoryview, at: int) -> int:
        nbytes = len(body)
        n = nbytes // HALF_BYTES
        if nbytes % HALF_BYTES or at < 0 or at + n > self.values.size:
            raise ValueError("halves that do not fit")
        self._bytes[:nbytes] = body  # to where the address is known
        return n


@cache
def _native() -> Any:
    """The library's functions; None if there is no library, or one from before they were there."""
    try:
        library = ctypes.CDLL(str(load_library().path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (KernelsUnavailable, OSError, AttributeError):
        return None
    return library
