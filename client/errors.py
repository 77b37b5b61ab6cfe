"""What can go wrong when asking a node, by what the caller does next.

ClientError
├── BadRequest          change `.param`
├── Unauthorized        another key
├── ModelNotFound       another model
├── ServerBusy          the same again after `.retry_after_s`
├── NotReady            the same again after `.retry_after_s`
├── GenerationFailed    ask again; part of the text may have come
├── ConnectionLost      look whether the node runs
└── NoLocalNode         start one
"""

from __future__ import annotations

from covey.errors import CoveyError


class ClientError(CoveyError):
    """Base; raised itself for answers that fit nothing below."""


class BadRequest(ClientError):
    """The node refused the request as it is; `.param` names the field, if it is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Unauthorized(ClientError):
    """No key, a wrong one, or one that does not open this."""


class ModelNotFound(ClientError):
    """No member of the swarm offers the model; the text lists what there is."""


class ServerBusy(ClientError):
    """Every place for a generation is taken."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReady(ClientError):
    """The node runs but cannot serve the model yet."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class GenerationFailed(ClientError):
    """The node gave up on a generation that it had begun; `.code` says why in one word."""

    def __init__(self, message: str, code: str | None) -> None:
        super().__init__(message)
        self.code = code


class ConnectionLost(ClientError):
    """The node cannot be reached, fell silent, or went away in the middle."""


class NoLocalNode(ClientError):
    """No node runs on this machine for this home, and none could be started."""
