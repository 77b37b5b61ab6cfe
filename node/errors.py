"""What can go wrong inside a node, by what the caller does next."""

from __future__ import annotations

from covey.errors import CoveyError


class NodeError(CoveyError):
    """Base of the node's own errors."""


class ConfigError(NodeError):
    """A person must change something: names the field, the value and the limit."""


class RemovedFromSwarm(NodeError):
    """This node is no member any more; `.by` is whoever removed it."""

    def __init__(self, by: str, home: str) -> None:
        super().__init__(
            f"this node was removed from the swarm by {by}: it takes no further part; to come back "
            f"as a new member, move {home} away and join with a new invite"
        )
        self.by = by


class NotAllowed(NodeError):
    """Somebody else would have to do it; the text says who."""


class UnknownModel(NodeError):
    """No member of the swarm offers the model."""

    def __init__(self, model: str, known: tuple[str, ...]) -> None:
        names = ", ".join(known) or "none yet"
        super().__init__(f"unknown model {model!r}; this swarm has: {names}")
        self.model = model
        self.known = known


class NotReady(NodeError):
    """The model is known but no plan for it is active now; ask again in `retry_after_s`."""

    def __init__(self, model: str, reason: str, retry_after_s: float = 2.0) -> None:
        super().__init__(f"{model} is not ready: {reason}")
        self.model = model
        self.reason = reason
        self.retry_after_s = retry_after_s


class Busy(NodeError):
    """Every session or all KV cache is taken; ask again in `retry_after_s`."""

    def __init__(self, reason: str, retry_after_s: float = 1.0) -> None:
        super().__init__(f"busy: {reason}")
        self.retry_after_s = retry_after_s


class MemberUnreachable(NodeError):
    """There is no link to a member and none can be made now; the text says what was tried."""


class InvalidRequest(NodeError):
    """A parameter of a generation is wrong; `.field` names it as the HTTP API does."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class PromptTooLong(InvalidRequest):
    """Prompt and answer do not fit into the context."""

    def __init__(self, n_tokens: int, limit: int) -> None:
        super().__init__(
            "messages", f"the prompt has {n_tokens} tokens, the context is {limit}: shorten it"
        )
        self.n_tokens = n_tokens
        self.limit = limit


class SessionFailed(NodeError):
    """A generation ended before its time; `.code` is the wire's error code."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"the generation failed ({code.replace('_', ' ')}): {detail}")
        self.code = code
        self.detail = detail
