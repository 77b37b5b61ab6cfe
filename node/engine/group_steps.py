"""The steps of a shard: which sessions' rows are on their way, and what becomes of them.

Every member of a group keeps these books in the same way, whatever of the blocks it holds and
whatever computes, so that all come to the same answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from .errors import EngineError, InvalidHiddenStates
from .stage import Step
from .tensors import EngineDtype, HiddenStates, check_hidden, finite_rows

H = TypeVar("H")


class Sessions(Protocol[H]):
    """What a shard knows of its sessions; `H` is what it holds of one."""

    def open(self, session: str, n_tokens: int, prefix: Sequence[bytes] = ()) -> int:
        """See `Stage.open_session`."""
        ...

    def close(self, session: str) -> None:
        """See `Stage.close_session`."""
        ...

    def prepare(self, session: str, position: int, n_rows: int) -> H:
        """Cut the session back to `position` and make room for `n_rows`; raises EngineError."""
        ...

    def advance(self, held: H, end: int) -> None:
        """Positions up to `end` are filled now."""
        ...


@dataclass(frozen=True, slots=True)
class SessionRows(Generic[H]):
    """Positions [start, end) of one session in a step; `first` is their place among all rows."""

    session: str
    start: int
    end: int
    first: int
    held: H

    @property
    def n_rows(self) -> int:
        """How many they are."""
        return self.end - self.start


class GroupSteps(Generic[H]):
    """The sessions of a shard, and the step that is on its way if there is one."""

    def __init__(self, sessions: Sessions[H], dtype: EngineDtype, hidden_size: int) -> None:
        self._sessions = sessions
        self._dtype = dtype
        self._hidden_size = hidden_size
        self._rows: tuple[SessionRows[H], ...] = ()
        self._n_rows = 0
        self._broken: set[str] = set()  # sessions whose rows are not all finite

    def open(self, session: str, n_tokens: int, prefix: Sequence[bytes] = ()) -> int:
        """See `Stage.open_session`."""
        self._leave(session)
        return self._sessions.open(session, n_tokens, prefix)

    def close(self, session: str) -> None:
        """See `Stage.close_session`."""
        self._leave(session)
        self._sessions.close(session)

    def begin(
        self, steps: Sequence[Step]
    ) -> tuple[list[EngineError | None], tuple[SessionRows[H], ...]]:
        """See `Shard.begin`; also the rows of the steps that can be run, in order."""
        if len({step.session for step in steps}) != len(steps):
            raise ValueError("two steps of one session")
        self.end(is_done=False)
        answers: list[EngineError | None] = []
        rows: list[SessionRows[H]] = []
        n_rows = 0
        for step in steps:
            try:
                check_hidden(step.hidden, self._dtype, self._hidden_size)
                held = self._sessions.prepare(step.session, step.position, len(step.hidden))
            except EngineError as error:
                answers.append(error)
                continue
            answers.append(None)
            end = step.position + len(step.hidden)
            rows.append(SessionRows(step.session, step.position, end, n_rows, held))
            n_rows += len(step.hidden)
        self._rows, self._n_rows, self._broken = tuple(rows), n_rows, set()
        return answers, self._rows

    def check(self, hidden: HiddenStates) -> None:
        """Raise InvalidHiddenStates unless these are as many rows as are on their way."""
        check_hidden(hidden, self._dtype, self._hidden_size)
        if len(hidden) != self._n_rows:
            raise InvalidHiddenStates(
                f"{len(hidden)} rows of hidden states, expected {self._n_rows}"
            )

    def note(self, hidden: HiddenStates) -> None:
        """Remember whose rows are not finite, so that they end up in no cache.

        All members see the same hidden states, and so leave out the same sessions. To look once is
        enough, behind the last attention of the span: what is not finite does not become so again.
        """
        finite = finite_rows(hidden, self._dtype)
        if not finite.all():
            for rows in self._rows:
                if not np.all(finite[rows.first : rows.first + rows.n_rows]):
                    self._broken.add(rows.session)

    def end(self, *, is_done: bool) -> None:
        """See `Shard.end`."""
        rows, self._rows, self._n_rows = self._rows, (), 0
        for each in rows if is_done else ():
            if each.session not in self._broken:
                self._sessions.advance(each.held, each.end)

    def _leave(self, session: str) -> None:
        """Give up the step on its way if the session is in it."""
        if any(rows.session == session for rows in self._rows):
            self.end(is_done=False)
