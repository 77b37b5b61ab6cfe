"""What can go wrong between two peers, by what the caller does next.

    TransportError
    ├── PeerUnreachable      try another address, path or replica
    ├── LinkClosed           clean, by us or by them
    │   └── PeerLeft         the peer said goodbye: it is going away, do not dial it again now
    ├── LinkBroken           mid-frame; what was in flight may or may not have arrived
    ├── LinkTimeout          nothing came in time
    ├── AddressInUse         a person must choose another port
    ├── IdentityUnusable     a person must mend the key file
    ├── InviteInvalid        cut short, expired, used up or of another version
    ├── RefusedByPeer        the peer answered a request with a failure code
    └── ProtocolViolation    the peer is wrong: close, remember, do not retry
        ├── MalformedFrame
        ├── FrameTooLarge
        ├── UnsupportedVersion
        └── NotAMember       wrong secret, revoked, or not the identity that was expected

Only the `ErrorCode` of an error ever crosses a link, never its text.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

from covey.errors import CoveyError


class ErrorCode(StrEnum):
    """Why a request or a session failed; stable, part of the wire protocol."""

    MALFORMED_FRAME = "malformed_frame"
    FRAME_TOO_LARGE = "frame_too_large"
    UNSUPPORTED_VERSION = "unsupported_version"
    NOT_A_MEMBER = "not_a_member"
    EPOCH_OVER = "epoch_over"  # the secret was good once: ask for the one of now
    INVITE_INVALID = "invite_invalid"
    UNKNOWN_MESSAGE = "unknown_message"
    UNKNOWN_LINK = "unknown_link"
    UNKNOWN_PLAN = "unknown_plan"
    WRONG_EPOCH = "wrong_epoch"
    UNKNOWN_SESSION = "unknown_session"
    WRONG_TENSOR = "wrong_tensor"
    WRONG_POSITION = "wrong_position"
    CACHE_FULL = "cache_full"
    TOO_MANY_SESSIONS = "too_many_sessions"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    PEER_LOST = "peer_lost"
    RELAY_REFUSED = "relay_refused"
    RELAY_FULL = "relay_full"
    RELAY_NO_LINK = "relay_no_link"
    NOT_READY = "not_ready"
    SHUTTING_DOWN = "shutting_down"
    INTERNAL = "internal"


class TransportError(CoveyError):
    """Base of everything that goes wrong between two peers."""


class PeerUnreachable(TransportError):
    """No path to the peer worked; try another replica, or this one later.

    `refused` are the addresses where a machine answered that nobody listens.
    """

    def __init__(self, peer_id: str, reason: str, *, refused: Collection[str] = ()) -> None:
        super().__init__(f"cannot reach peer {peer_id[-8:]}: {reason}")
        self.peer_id = peer_id
        self.reason = reason
        self.refused = frozenset(refused)


class LinkClosed(TransportError):
    """The link ended cleanly."""

    def __init__(self, *, by_peer: bool) -> None:
        super().__init__("the peer closed the link" if by_peer else "the link is closed")
        self.by_peer = by_peer


class PeerLeft(LinkClosed):
    """The peer said goodbye: it leaves the swarm for now, on purpose."""


class LinkBroken(TransportError):
    """The link ended in the middle of something; frames in flight may be lost."""


class LinkTimeout(TransportError):
    """A peer did not answer in time."""

    def __init__(self, operation: str, after_s: float) -> None:
        super().__init__(f"no answer to {operation} within {after_s:g} s")
        self.operation = operation
        self.after_s = after_s


class AddressInUse(TransportError):
    """Another program listens on the address."""

    def __init__(self, address: str) -> None:
        super().__init__(f"{address} is in use: stop the other program or choose another --port")
        self.address = address


class IdentityUnusable(TransportError):
    """The identity file cannot be read, written or trusted."""


class InviteInvalid(TransportError):
    """An invite that opens nothing; `.reason` is a short phrase."""

    code = ErrorCode.INVITE_INVALID

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"this invite cannot be used: {reason}; ask for a new one with `covey invite`"
        )
        self.reason = reason


class RefusedByPeer(TransportError):
    """The peer understood a request and said no."""

    def __init__(self, code: ErrorCode) -> None:
        super().__init__(f"the peer refused: {code.value.replace('_', ' ')}")
        self.code = code


class ProtocolViolation(TransportError):
    """The peer broke the protocol; its link is closed with `.code`."""

    code: ErrorCode


class MalformedFrame(ProtocolViolation):
    """A frame or message that does not parse, or whose parts contradict each other."""

    code = ErrorCode.MALFORMED_FRAME


class FrameTooLarge(ProtocolViolation):
    """A length beyond its limit, refused before memory was taken."""

    code = ErrorCode.FRAME_TOO_LARGE


class UnsupportedVersion(ProtocolViolation):
    """The peer speaks another version of the protocol."""

    code = ErrorCode.UNSUPPORTED_VERSION


class NotAMember(ProtocolViolation):
    """The peer does not hold the secret, is revoked, or is not who it should be."""

    code = ErrorCode.NOT_A_MEMBER
