"""What can go wrong while a stage or the head computes."""

from __future__ import annotations

from covey.errors import CoveyError


class EngineError(CoveyError):
    """Base of everything that `node/engine/` raises on purpose."""


class UnknownSession(EngineError):
    """The stage holds no KV cache of that session: open it and prefill again."""

    def __init__(self, session: str) -> None:
        super().__init__(f"no session {session!r} on this stage; open it and prefill again")
        self.session = session


class PositionGap(EngineError):
    """A row would leave positions before it empty: send the missing ones first."""

    def __init__(self, *, session: str, position: int, length: int) -> None:
        super().__init__(
            f"session {session!r} has {length} positions, the next rows begin at {position}"
        )
        self.session = session
        self.position = position
        self.length = length


class CacheOverflow(EngineError):
    """More positions than the session or the model has room for."""

    def __init__(self, *, session: str, needed_tokens: int, capacity_tokens: int) -> None:
        super().__init__(
            f"session {session!r} needs {needed_tokens} positions, has room for {capacity_tokens}"
        )
        self.session = session
        self.needed_tokens = needed_tokens
        self.capacity_tokens = capacity_tokens


class InvalidHiddenStates(EngineError):
    """Hidden states of a shape or dtype that this stage does not take: the sender is wrong."""


class UnknownToken(EngineError):
    """A token id that the model does not have."""

    def __init__(self, token: int, vocab_size: int) -> None:
        super().__init__(f"token {token}: the model has tokens 0 to {vocab_size - 1}")
        self.token = token
        self.vocab_size = vocab_size


class NonFiniteValues(EngineError):
    """NaN or infinity: replace whoever made it, its sender if `is_received`, else this stage."""

    def __init__(self, *, session: str, position: int, is_received: bool) -> None:
        origin = "received" if is_received else "computed"
        super().__init__(f"session {session!r}, position {position}: {origin} NaN or infinity")
        self.session = session
        self.position = position
        self.is_received = is_received


class CacheFull(EngineError):
    """No room for a session's KV cache on this stage; another replica may have some."""

    def __init__(self, *, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(f"KV cache needs {needed_bytes} bytes, {free_bytes} are free")
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class LeaseExpired(EngineError):
    """The session's KV cache is gone; its head must prefill again."""

    def __init__(self, session: str) -> None:
        super().__init__(f"the lease of session {session!r} has ended; prefill again")
        self.session = session
