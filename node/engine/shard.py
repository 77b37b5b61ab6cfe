"""A shard: what one member of a tensor-parallel group computes of a span's blocks.

It holds some of the KV heads, with their query heads, and some of the MLP's columns. What it
makes of half a block is a partial sum: added up over the members, and then to the hidden states,
it is what the whole block would have made. Who adds is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .errors import EngineError
from .stage import Step
from .tensors import EngineDtype, HiddenStates


@dataclass(frozen=True, slots=True)
class Slice:
    """Which part of every block: KV heads and MLP columns [start, end); either may be empty."""

    kv_heads: tuple[int, int]
    mlp_columns: tuple[int, int]


class Shard(Protocol):
    """A part of a span of blocks, with its part of the KV cache; used by one thread at a time.

    A step of the group is `begin`, then for each block both halves in order, then `end`. The
    hidden states that go in are the same, bit for bit, at every member.
    """

    @property
    def span(self) -> tuple[int, int]:
        """Blocks [start, end)."""
        ...

    @property
    def slice(self) -> Slice:
        """The part of each that is held here."""
        ...

    @property
    def dtype(self) -> EngineDtype:
        """Dtype of hidden states and partial sums."""
        ...

    @property
    def hidden_size(self) -> int:
        """Columns of the hidden states."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Memory that the weights take."""
        ...

    @property
    def kv_bytes_per_token(self) -> int:
        """Memory that one position of one session takes; 0 without heads."""
        ...

    def open_session(self, session: str, n_tokens: int, prefix: Sequence[bytes] = ()) -> int:
        """See `Stage.open_session`; without heads, everything is held already: 64 per key."""
        ...

    def close_session(self, session: str) -> None:
        """See `Stage.close_session`."""
        ...

    def begin(self, steps: Sequence[Step]) -> list[EngineError | None]:
        """Make the next rows of several sessions ready, each of another session.

        Only the shapes and positions of the steps count; rows of those that fail take part in
        nothing. All members of a group come to the same answers.

        Returns:
            For each step, in order, None or why it cannot be run.
        """
        ...

    def attention(self, block_idx: int, hidden: HiddenStates) -> HiddenStates | None:
        """This shard's part of a block's attention, residual left out.

        Args:
            block_idx: of the model, within `span`.
            hidden: [n_rows, hidden_size], the rows of the steps that `begin` accepted, in order;
                not modified.

        Returns:
            The same shape, a new array or one that the next call overwrites; None without heads.
        """
        ...

    def mlp(self, block_idx: int, hidden: HiddenStates) -> HiddenStates | None:
        """The same for its MLP; None without columns."""
        ...

    def end(self, *, is_done: bool) -> None:
        """The step is over: sessions are longer now, or, if not done, as long as before.

        Those whose rows were not finite behind the last attention of the span are as long as
        before too.
        """
        ...
