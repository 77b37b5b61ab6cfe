"""Partial sums as bytes: exact, as halves, or as bytes with a scale for each 32 values.

They are added in fp32 whatever they travel as. What a codec cannot hold (fp16 ends at 65,504; not
a number) travels exactly: `encode` says which codec it took.

Layouts, little-endian: `exact` fp32 each; `fp16` fp16 each; `int8` a scale in fp16 for each group
of 32, then a byte for each value, the last group filled up with zeros.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from covey.node.kernels.halves import LARGEST, Narrowed, Total
from covey.transport.frame import Buffer

SumCodec = Literal["exact", "fp16", "int8"]
Floats = npt.NDArray[np.float32]

GROUP = 32
_INT8_MAX = 127
_SCALE_BYTES = 2


def encoded_bytes(codec: SumCodec, n_values: int) -> int:
    """How long so many values are."""
    match codec:
        case "exact":
            return 4 * n_values
        case "fp16":
            return 2 * n_values
        case "int8":
            n_groups = -(-n_values // GROUP)
            return n_groups * (_SCALE_BYTES + GROUP)


class Coder:
    """One codec and the memory it works in; what it returns is valid until its next `encode`."""

    def __init__(self, codec: SumCodec) -> None:
        self.codec: SumCodec = codec
        self._halves = Narrowed(0)
        self._bytes = np.empty(0, np.uint8)

    def encode(self, values: Floats) -> tuple[SumCodec, memoryview]:
        """Bytes of flat `values`, and the codec they are in. The exact ones are `values` itself."""
        body: memoryview | None = None
        if not values.size:
            return "exact", memoryview(b"")
        if self.codec == "fp16":
            if self._halves.size < values.size:
                self._halves = Narrowed(values.size)
            body = self._halves.fill(values)
        elif self.codec == "int8":
            # Comparisons with a NaN are false.
            limit = LARGEST * _INT8_MAX
            if values.max() <= limit and values.min() >= -limit:
                body = self._int8(values)
        if body is None:
            return "exact", values.data.cast("B")
        return self.codec, body

    def _int8(self, values: Floats) -> memoryview:
        n_groups = -(-values.size // GROUP)
        nbytes = encoded_bytes("int8", values.size)
        if self._bytes.size < nbytes:
            self._bytes = np.empty(nbytes, np.uint8)
        grouped = np.zeros((n_groups, GROUP), np.float32)
        grouped.reshape(-1)[: values.size] = values
        scales = (np.abs(grouped).max(axis=1) / _INT8_MAX).astype("<f2")
        wide = scales.astype(np.float32)[:, None]
        # Where the scale is too small for a half, so are the values.
        steps = np.divide(grouped, wide, out=np.zeros_like(grouped), where=wide > 0)
        np.clip(np.rint(steps, out=steps), -_INT8_MAX, _INT8_MAX, out=steps)
        split = _SCALE_BYTES * n_groups
        self._bytes[:split] = scales.view(np.uint8)
        self._bytes[split:nbytes].view(np.int8)[:] = steps.reshape(-1)
        return self._bytes[:nbytes].data


class Sum:
    """A vector that is being added up in fp32, in memory that is kept from one to the next."""

    def __init__(self) -> None:
        self._memory = Total(0)
        self.values: Floats = self._memory.values

    def start(self, n_values: int) -> None:
        """Begin another; what its `values` are is not said yet."""
        if self._memory.values.size < n_values:
            self._memory = Total(n_values)
        if self.values.size != n_values or self.values.base is not self._memory.values:
            self.values = self._memory.values[:n_values]

    def put(self, codec: SumCodec, body: memoryview, at: int = 0) -> None:
        """What `body` holds becomes the values from `at` on; it must be as long as it says."""
        if codec == "fp16":
            self._memory.put(body, at)
        else:
            part = _decoded(codec, body, self.values.size - at)
            self.values[at : at + part.size] = part

    def add(self, codec: SumCodec, body: memoryview, at: int = 0) -> None:
        """What `body` holds is added to the values from `at` on."""
        if codec == "fp16":
            self._memory.add(body, at)
        else:
            part = _decoded(codec, body, self.values.size - at)
            self.values[at : at + part.size] += part


def _decoded(codec: SumCodec, body: Buffer, at_most: int) -> Floats:
    """The values of a body that holds whole floats, or bytes and their scales."""
    if codec == "exact":
        return np.frombuffer(body, "<f4")
    n_groups = len(body) // (_SCALE_BYTES + GROUP)
    split = _SCALE_BYTES * n_groups
    scales = np.frombuffer(body, "<f2", count=n_groups).astype(np.float32)
    steps = np.frombuffer(body, np.int8, offset=split).reshape(n_groups, GROUP)
    values: Floats = steps * scales[:, None]
    return values.reshape(-1)[:at_most]
