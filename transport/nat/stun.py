"""The STUN that members speak with each other (RFC 8489), on aioice's message codec. Pure.

A request carries MESSAGE-INTEGRITY under the swarm's STUN key and, in USERNAME, the time, so that
an old one cannot be sent again under another source address. USERNAME also pads a request to the
size of its answer: nothing here makes more of a packet than it was.
"""

from __future__ import annotations

import struct

from aioice import stun

from .facts import Endpoint

TRANSACTION_BYTES = 12
PROBE_BYTES = 52
MAX_PACKET_BYTES = 256  # ours have 64 to 76, aioice's 20
STALE_AFTER_S = 60
_HEADER_BYTES = 20
_TIME_CHARS = 20


def parse(packet: bytes) -> stun.Message | None:
    """The message; None for anything else, at little cost."""
    if not _HEADER_BYTES <= len(packet) <= MAX_PACKET_BYTES or packet[0] > 3 or len(packet) % 4:
        return None
    if int.from_bytes(packet[4:8], "big") != stun.COOKIE:
        return None
    try:
        return stun.parse_message(packet)
    except (ValueError, struct.error):  # aioice unpacks short attributes unasked
        return None


def build_request(key: bytes, transaction: bytes, *, unix_time: float) -> bytes:
    """A member's Binding request, 76 bytes."""
    message = stun.Message(stun.Method.BINDING, stun.Class.REQUEST, transaction)
    message.attributes["USERNAME"] = f"{int(unix_time):0{_TIME_CHARS}d}"
    message.add_message_integrity(key)
    return bytes(message)


def is_signed_request(message: stun.Message, key: bytes, *, unix_time: float) -> bool:
    """Whether a request is a member's, and made just now."""
    username = message.attributes.get("USERNAME", "")
    return (
        message.check_message_integrity(key)
        and len(username) == _TIME_CHARS
        and username.isascii()
        and username.isdigit()
        and abs(unix_time - int(username)) <= STALE_AFTER_S
    )


def build_answer(request: stun.Message, source: Endpoint, key: bytes | None) -> bytes:
    """The answer to a request from `source`; sealed if `key` is given. 32 to 76 bytes."""
    message = stun.Message(stun.Method.BINDING, stun.Class.RESPONSE, request.transaction_id)
    message.attributes["XOR-MAPPED-ADDRESS"] = source
    if key is not None:
        message.add_message_integrity(key)
    return bytes(message)


def read_answer(packet: bytes, key: bytes) -> tuple[bytes, Endpoint] | None:
    """Transaction and mapped address of a member's answer; None if it is none."""
    message = parse(packet)
    if (
        message is None
        or message.message_method is not stun.Method.BINDING
        or message.message_class is not stun.Class.RESPONSE
        or not message.check_message_integrity(key)
    ):
        return None
    mapped = message.attributes.get("XOR-MAPPED-ADDRESS")
    if mapped is None:
        return None
    return message.transaction_id, (str(mapped[0]), int(mapped[1]))


def build_probe(key: bytes, nonce: bytes) -> bytes:
    """The packet that shows that we can be heard: a sealed Binding indication, `PROBE_BYTES`."""
    message = stun.Message(stun.Method.BINDING, stun.Class.INDICATION, nonce)
    message.add_message_integrity(key)
    return bytes(message)


def read_probe(packet: bytes, key: bytes) -> bytes | None:
    """The nonce of a member's probe; None if it is none."""
    message = parse(packet)
    if (
        message is None
        or message.message_class is not stun.Class.INDICATION
        or not message.check_message_integrity(key)
    ):
        return None
    return message.transaction_id
