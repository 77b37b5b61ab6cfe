"""The interfaces of an engine: `Stage` runs a span of blocks, `Head` both ends of a model.

Nothing here imports torch. A stage is used by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import EngineError
from .tensors import EngineDtype, HiddenStates

PAGE_TOKENS = 64  # positions that a key of a prefix stands for, and a page of KV cache holds


@dataclass(frozen=True, slots=True)
class Step:
    """The next rows of one session; the fields are the arguments of `Stage.forward`."""

    session: str
    position: int
    hidden: HiddenStates


StepResult: TypeAlias = HiddenStates | EngineError


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

    def open_session(self, session: str, n_tokens: int, prefix: Sequence[bytes] = ()) -> int:
        """Make room for `n_tokens` positions, in place of what `session` held before.

        Args:
            session: any name.
            n_tokens: positions that the session may have, at least 1.
            prefix: one key for each full page of 64 positions that the prompt begins with, a hash
                of all its tokens up to there. The session promises to fill those positions with
                those tokens. A peer that must not vouch for another's pages gets other hashes.

        Returns:
            How many leading positions are filled already, from sessions with the same keys: a
            multiple of 64. The next rows begin there, or before.

        Raises:
            CacheOverflow: more than the model's context.
            CacheFull: more than this stage has memory for; what `session` held is gone.
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

    def forward_batch(self, steps: Sequence[Step]) -> list[StepResult]:
        """Run the blocks on the next rows of several sessions; fast engines read weights once.

        Returns:
            For each step, in order, what `forward` would have returned or raised: a step that
            fails spoils no other. Two steps of one session are taken one after the other.
        """
        ...

    def close_session(self, session: str) -> None:
        """Free the session's KV cache; nothing happens if there is none."""
        ...


def forward_each(stage: Stage, steps: Sequence[Step]) -> list[StepResult]:
    """`Stage.forward_batch` for an engine that gains nothing from batches."""
    results: list[StepResult] = []
    for step in steps:
        try:
            results.append(stage.forward(step.session, step.position, step.hidden))
        except EngineError as error:
            results.append(error)
    return results


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

    def logits_of_each(self, rows: Sequence[HiddenStates]) -> Sequence[npt.NDArray[np.float32]]:
        """Logits [V] of several sessions' rows [1, D], each as it would be alone."""
        ...
