"""What the HTTP API says when something goes wrong, in OpenAI's form.

Every refusal is `{"error": {"message", "type", "code", "param"}}` with a status by what the
client does next: 400 change the request, 401 and 403 the credentials, 404 the model or path,
429 and 503 ask again in `Retry-After`, 502 and 504 the generation was lost. 500 is a bug.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from covey.errors import CoveyError
from covey.node.errors import (
    Busy,
    InvalidRequest,
    MemberUnreachable,
    NodeError,
    NotAllowed,
    NotReady,
    PromptTooLong,
    SessionFailed,
    UnknownModel,
)
from covey.node.model.errors import InvalidParams

INVALID = "invalid_request_error"
SERVER = "server_error"


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorReply:
    """One refusal, ready for the wire."""

    status: int
    message: str
    type: str = INVALID
    code: str | None = None
    param: str | None = None  # the field of the request to change
    retry_after_s: float | None = None

    def body(self) -> dict[str, Any]:
        """The JSON object, as a whole answer or as the last event of a stream."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "code": self.code,
                "param": self.param,
            }
        }

    def headers(self) -> dict[str, str]:
        """Headers that belong to the status."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.retry_after_s is None:
            return {}
        # Retry-After has whole seconds only; OpenAI's clients know the finer header as well.
        return {
            "Retry-After": str(max(1, math.ceil(self.retry_after_s))),
            "Retry-After-Ms": str(max(0, round(self.retry_after_s * 1000))),
        }


class ApiAddressInUse(NodeError):
    """Another program listens on the API's address."""

    def __init__(self, address: str) -> None:
        super().__init__(
            f"{address} is in use: stop the other program or choose another --api-port"
        )
        self.address = address


class Refused(NodeError):
    """HTTP itself is the reason: key, host, size or form; `.reply` says it."""

    def __init__(self, reply: ErrorReply) -> None:
        super().__init__(reply.message)
        self.reply = reply


def reply_to(error: CoveyError, *, prompt_field: str = "messages") -> ErrorReply:
    """The refusal that tells a client about `error`; 500 for one that `Service` does not promise.

    Args:
        prompt_field: what this route calls the prompt.
    """
    text = str(error)
    match error:
        case Refused():
            return error.reply
        case UnknownModel():
            return ErrorReply(status=404, message=text, code="model_not_found", param="model")
        case NotAllowed():
            return ErrorReply(status=403, message=text, code="not_allowed")
        case NotReady():
            return ErrorReply(
                status=503,
                message=text,
                type=SERVER,
                code="not_ready",
                retry_after_s=error.retry_after_s,
            )
        case Busy():
            return ErrorReply(
                status=429,
                message=text,
                type="rate_limit_error",
                code="busy",
                retry_after_s=error.retry_after_s,
            )
        case PromptTooLong():
            code = "context_length_exceeded"
            text = text.replace("messages", prompt_field, 1)
            return ErrorReply(status=400, message=text, code=code, param=prompt_field)
        case InvalidRequest() | InvalidParams():
            param = prompt_field if error.field == "messages" else error.field
            return ErrorReply(status=400, message=text, code="invalid_value", param=param)
        case MemberUnreachable():
            return ErrorReply(status=502, message=text, type=SERVER, code="member_unreachable")
        case SessionFailed():
            status = 504 if error.code == "deadline_exceeded" else 502
            return ErrorReply(status=status, message=text, type=SERVER, code=error.code)
        case _:
            return ErrorReply(status=500, message=text, type=SERVER, code="internal")
