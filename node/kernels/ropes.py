"""The tables of angles that the kernels rotate a span's queries and keys by."""

from __future__ import annotations

from covey.node.engine.rope import RopeTables
from covey.node.model.config import ModelConfig

from .library import Floats
from .structures import NO_ROPE


class SpanRopes:
    """The tables of blocks [start, end), by the indices that `Block.rope` has."""

    def __init__(self, config: ModelConfig, span: tuple[int, int]) -> None:
        self._config = config
        self._ropes = RopeTables(config, range(*span))
        # A block without rope looks at none, but there must be one.
        kinds = self._ropes.kinds
        self._kinds = tuple(kind for kind in kinds if kind != "none") or kinds[:1]

    def index_of(self, block_idx: int) -> int:
        """Which table a block takes, or NO_ROPE."""
        kind = self._config.rope_kind(block_idx)
        return NO_ROPE if kind == "none" else self._kinds.index(kind)

    def upto(self, n_positions: int, *, is_long: bool) -> list[tuple[Floats, Floats]]:
        """Each table's cosines and sines for at least the positions [0, n_positions)."""
        tables = self._ropes.upto(n_positions, is_long=is_long)
        return [tables[kind] for kind in self._kinds]
