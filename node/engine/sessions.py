"""How long each session is, and what of its next rows may be run; no keys and values.

A shard without KV heads needs no more, and every member of a group has to answer alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from covey.node.model.config import ModelConfig

from .errors import CacheOverflow, PositionGap, UnknownSession
from .stage import PAGE_TOKENS


@dataclass(slots=True)
class SessionLength:
    """A session of which the first `length` of `capacity` positions are filled."""

    capacity: int
    length: int
    is_long: bool  # see `ModelConfig.is_long`


class SessionLengths:
    """Sessions by name, as `Stage` and `Shard` have them."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._sessions: dict[str, SessionLength] = {}

    def open(self, session: str, n_tokens: int, prefix: Sequence[bytes] = ()) -> int:
        """See `Stage.open_session`; every page of the prefix counts as filled already."""
        check_capacity(self._config, session, n_tokens)
        n_filled = PAGE_TOKENS * min(len(prefix), n_tokens // PAGE_TOKENS)
        is_long = self._config.is_long(n_tokens)
        self._sessions[session] = SessionLength(n_tokens, n_filled, is_long)
        return n_filled

    def close(self, session: str) -> None:
        """Forget it; nothing happens if there is none."""
        self._sessions.pop(session, None)

    def prepare(self, session: str, position: int, n_rows: int) -> SessionLength:
        """Cut the session back to `position`, from where `n_rows` are to come.

        Raises:
            UnknownSession, PositionGap, CacheOverflow: see `Stage.forward`.
        """
        held = self._sessions.get(session)
        if held is None:
            raise UnknownSession(session)
        check_position(session, position, held.length)
        held.length = position
        check_room(session, position + n_rows, held.capacity)
        return held

    def advance(self, held: SessionLength, end: int) -> None:
        """Positions up to `end` are filled now."""
        held.length = end


def check_capacity(config: ModelConfig, session: str, n_tokens: int) -> None:
    """Raise CacheOverflow if the model has no such context."""
    if n_tokens < 1:
        raise ValueError(f"n_tokens = {n_tokens}")
    check_room(session, n_tokens, config.context_length)


def check_position(session: str, position: int, length: int) -> None:
    """Raise PositionGap if rows from `position` on would leave a hole behind `length`."""
    if not 0 <= position <= length:
        raise PositionGap(session=session, position=position, length=length)


def check_room(session: str, end: int, capacity: int) -> None:
    """Raise CacheOverflow if positions up to `end` are more than there is room for."""
    if end > capacity:
        raise CacheOverflow(session=session, needed_tokens=end, capacity_tokens=capacity)
