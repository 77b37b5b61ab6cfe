"""The few bytes of NAT-PMP (RFC 6886): ask the router for its address, and for a port. Pure.

A codec of our own because the libraries for it are unmaintained and block. Requests have 2 and 12
bytes, answers 12 and 16, all of fixed layout.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from enum import IntEnum

PORT = 5351
MAX_LEASE_S = 7 * 86_400  # a router that promises more is not believed

_ANSWER = 128
_ADDRESS = struct.Struct("!BBHI4s")
_MAP_REQUEST = struct.Struct("!BBHHHI")
_MAP_ANSWER = struct.Struct("!BBHIHHI")


class Operation(IntEnum):
    """What is asked for."""

    ADDRESS = 0
    MAP_UDP = 1
    MAP_TCP = 2


@dataclass(frozen=True, slots=True)
class Granted:
    """A port of the router's that leads to ours."""

    inner_port: int
    outer_port: int  # 0 after a removal
    lease_s: int


class Refused(Exception):
    """The router understood and said no; the text is what its result code means."""


_MEANINGS = {
    1: "it speaks another version",
    2: "it does not allow mappings: they can be switched on in its settings",
    3: "it has no public address itself",
    4: "it has no more ports to give",
    5: "it cannot do this",
}


def address_request() -> bytes:
    """Asks for the router's outer address."""
    return bytes((0, Operation.ADDRESS))


def map_request(operation: Operation, inner_port: int, outer_port: int, lease_s: int) -> bytes:
    """Asks for a port, `outer_port` if possible; a lease of 0 gives it back."""
    return _MAP_REQUEST.pack(0, operation, 0, inner_port, outer_port, lease_s)


def read_address(packet: bytes) -> str | None:
    """The router's outer IPv4 address; None if the packet is no such answer. Raises Refused."""
    if not _is_answer(packet, Operation.ADDRESS, _ADDRESS.size):
        return None
    return str(ipaddress.IPv4Address(_ADDRESS.unpack(packet)[4]))


def read_mapping(packet: bytes, operation: Operation) -> Granted | None:
    """What was granted; None if the packet is no such answer. Raises Refused."""
    if not _is_answer(packet, operation, _MAP_ANSWER.size):
        return None
    *_, inner_port, outer_port, lease_s = _MAP_ANSWER.unpack(packet)
    return Granted(inner_port, outer_port, min(lease_s, MAX_LEASE_S))


def _is_answer(packet: bytes, operation: Operation, size: int) -> bool:
    # A refusal may be cut short after its result code.
    if len(packet) < 8 or packet[0] != 0 or packet[1] != _ANSWER + operation:
        return False
    result = int.from_bytes(packet[2:4], "big")
    if result:
        raise Refused(_MEANINGS.get(result, f"result code {result}"))
    return len(packet) == size
