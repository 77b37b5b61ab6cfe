"""The interfaces of an engine: `Stage` runs a span of blocks, `Head` both ends of a model.

Nothing here imports torch. A stage is used by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .tensors import EngineDtype, HiddenStates


class Stage(Protocol):
    """A span of blocks with its weights and one KV cache per session."""

    @property
    def span(self) -> tuple[int, int]:
        """Blocks [start, end), half-open."""
        ...

    @property
    def dtype(self) -> EngineDtype:
        """Dtype of hidden states in and out."""
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
        """Memory that one position of one session takes."""
        ...

    def open_session(self, session: str, n_tokens: int) -> None:
        """Make room for `n_tokens` positions, in place of what `session` held before.

        Raises:
            CacheOverflow: more than the model's context.
        """
        ...

    def forward(self, session: str, position: int, hidden: HiddenStates) -> HiddenStates:
        """Run the blocks on the next rows of a session.

        Args:
            session: one that is open.
            position: index of the first row in the sequence. Usually the session's length; if it
                is less, the session is first cut back to it (rewind).
            hidden: [n_tokens, hidden_size] in the stage's dtype; not modified.

        Returns:
            The same shape; a new array. After an error the session is as long as before, or as
            long as `position` if that was less; the same call may be made again.

        Raises:
            UnknownSession, PositionGap, CacheOverflow, InvalidHiddenStates, NonFiniteValues.
        """
        ...

    def close_session(self, session: str) -> None:
        """Free the session's KV cache; nothing happens if there is none."""
        ...


class Head(Protocol):
    """What the asking machine keeps to itself: embedding, final norm and output matrix."""

    @property
    def dtype(self) -> EngineDtype:
        """Dtype of hidden states in and out."""
        ...

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Memory that the weights take."""
        ...

    def embed(self, ids: Sequence[int]) -> HiddenStates:
        """Hidden states [len(ids), hidden_size] of token ids; UnknownToken if one is not."""
        ...

    def logits(self, hidden: HiddenStates) -> npt.NDArray[np.float32]:
        """Logits [n_tokens, V] of hidden states [n_tokens, D]; raises InvalidHiddenStates."""
        ...
