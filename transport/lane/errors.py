"""How a lane fails, by what the caller does next: open another, or go on waiting."""

from __future__ import annotations

from covey.transport.errors import TransportError


class LaneBroken(TransportError):
    """The lane has ended; what was on its way may be lost. Open another, or do without the peer."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"a lane broke: {reason}")
        self.reason = reason


class LaneTimeout(TransportError):
    """No message came in time; the lane stays usable."""

    def __init__(self, after_s: float) -> None:
        super().__init__(f"no message on a lane within {after_s:g} s")
        self.after_s = after_s
