"""What can go wrong between Python and the native library."""

from __future__ import annotations

from covey.node.engine.errors import EngineError


class KernelsUnavailable(EngineError):
    """The native engine cannot run here: use the torch one, and show the reason."""


class KernelFailed(EngineError):
    """The library refused its arguments or had no memory; `status` is its return value."""

    def __init__(self, function: str, status: int) -> None:
        cause = {1: "refused its arguments", 2: "had no memory"}.get(status, f"returned {status}")
        super().__init__(f"{function} {cause}")
        self.function = function
        self.status = status


class CannotStream(EngineError):
    """Packed weights cannot be kept on disk to be read from there: make room, or plan without."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"weights cannot be streamed from disk: {reason}")


class WeightsUnreadable(EngineError):
    """The disk did not give a block that is streamed; the same step may be tried again."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"weights cannot be read from disk: {reason}")
