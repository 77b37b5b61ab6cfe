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
