"""Rotary position embedding (arXiv:2104.09864): the tables of cosines and sines.

The angles are rounded to fp32 as transformers rounds them; a table does not depend on how far
it was asked to reach, so a row is the same bits whatever the chunking. A model has one table per
kind of rope among its blocks; blocks without rope get the table that turns nothing, so that an
engine treats all blocks alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from covey.node.model.config import ModelConfig, RopeKind

Table: TypeAlias = npt.NDArray[np.float32]

_STEP = 1024  # rows are made so many at a time; arbitrary


class RopeTable:
    """Cosines and sines [n_positions, rope_dim/2] of one kind, grown on demand.

    Args:
        config: of the model.
        kind: one of `config.rope_kinds`.
        is_long: take the factors for long sessions, see `ModelConfig.is_long`.
    """

    def __init__(
        self, config: ModelConfig, kind: RopeKind = "main", *, is_long: bool = False
    ) -> None:
        self._frequencies = _frequencies(config, kind, is_long)
        self._scale = config.rope_scale if kind == "main" else 1.0
        self._limit = config.context_length
        self._cos, self._sin = self._rows(0, min(_STEP, self._limit))

    def upto(self, n_positions: int) -> tuple[Table, Table]:
        """(cos, sin) for at least the positions [0, n_positions), within the model's context."""
        reach = min(-(-n_positions // _STEP) * _STEP, self._limit)
        if reach > len(self._cos):
            cos, sin = self._rows(len(self._cos), reach)
            self._cos = np.concatenate([self._cos, cos])
            self._sin = np.concatenate([self._sin, sin])
        return self._cos, self._sin

    def _rows(self, start: int, end: int) -> tuple[Table, Table]:
        positions = np.arange(start, end, dtype=np.float32)
        angles = (positions[:, None] * self._frequencies).astype(np.float64)
        cos, sin = np.cos(angles) * self._scale, np.sin(angles) * self._scale
        return cos.astype(np.float32), sin.astype(np.float32)


class RopeTables:
    """The tables that some blocks of a model need, made when they are first asked for."""

    def __init__(self, config: ModelConfig, blocks: Iterable[int]) -> None:
        self._config = config
        self.kinds: tuple[RopeKind, ...] = tuple(dict.fromkeys(map(config.rope_kind, blocks)))
        self._tables: dict[tuple[RopeKind, bool], RopeTable] = {}

    def upto(self, n_positions: int, *, is_long: bool) -> dict[RopeKind, tuple[Table, Table]]:
        """Each kind's (cos, sin) for at least the positions [0, n_positions)."""
        return {kind: self._table(kind, is_long).upto(n_positions) for kind in self.kinds}

    def _table(self, kind: RopeKind, is_long: bool) -> RopeTable:
        key = (kind, is_long)
        if key not in self._tables:
            self._tables[key] = RopeTable(self._config, kind, is_long=is_long)
        return self._tables[key]


def _frequencies(config: ModelConfig, kind: RopeKind, is_long: bool) -> Table:
    exponents = np.arange(0, config.rope_dim, 2, dtype=np.float64) / config.rope_dim
    if kind == "none":
        return np.zeros(len(exponents), np.float32)  # every angle is 0
    if kind == "local":
        return (config.rope_local_theta**-exponents).astype(np.float32)
    frequencies = config.rope_theta**-exponents
    factors = config.rope_long_factors if is_long else config.rope_factors
    if factors:
        frequencies /= np.asarray(factors)
    return frequencies.astype(np.float32)
