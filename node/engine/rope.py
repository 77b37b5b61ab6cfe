"""Rotary position embedding (arXiv:2104.09864): the tables of cosines and sines.

The angles are rounded to fp32 as transformers rounds them; a table does not depend on how far
it was asked to reach, so a row is the same bits whatever the chunking.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from covey.node.model.config import ModelConfig

_STEP = 1024  # rows are made so many at a time; arbitrary


class RopeTable:
    """Cosines and sines [n_positions, rope_dim/2], grown on demand."""

    def __init__(self, config: ModelConfig) -> None:
        exponents = np.arange(0, config.rope_dim, 2, dtype=np.float64) / config.rope_dim
        frequencies = config.rope_theta**-exponents
        if config.rope_factors:
            frequencies /= np.asarray(config.rope_factors)
        self._frequencies = frequencies.astype(np.float32)
        self._limit = config.context_length
        self._cos, self._sin = self._rows(0, min(_STEP, self._limit))

    def upto(self, n_positions: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """(cos, sin) for at least the positions [0, n_positions), within the model's context."""
        reach = min(-(-n_positions // _STEP) * _STEP, self._limit)
        if reach > len(self._cos):
            cos, sin = self._rows(len(self._cos), reach)
            self._cos = np.concatenate([self._cos, cos])
            self._sin = np.concatenate([self._sin, sin])
        return self._cos, self._sin

    def _rows(
        self, start: int, end: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        positions = np.arange(start, end, dtype=np.float32)
        angles = (positions[:, None] * self._frequencies).astype(np.float64)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
