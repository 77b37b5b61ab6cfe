"""NAT-PMP against the examples of RFC 6886, section 3."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from covey.transport.nat.mapping import default_gateway
from covey.transport.nat.natpmp import (
    Granted,
    Operation,
    Refused,
    address_request,
    map_request,
    read_address,
    read_mapping,
)

ADDRESS = bytes.fromhex("0080000000000010") + bytes([11, 0, 9, 9])
MAPPING = struct.pack("!BBHIHHI", 0, 130, 0, 16, 4000, 4001, 3600)


def test_requests_have_the_layout_of_the_rfc() -> None:
    assert address_request() == bytes(2)
    assert map_request(Operation.MAP_TCP, 4000, 4001, 3600).hex() == "000200000fa00fa100000e10"


def test_answers_are_read() -> None:
    assert read_address(ADDRESS) == "11.0.9.9"
    assert read_mapping(MAPPING, Operation.MAP_TCP) == Granted(4000, 4001, 3600)


def test_an_answer_to_something_else_is_none() -> None:
    assert read_address(MAPPING) is None
    assert read_mapping(MAPPING, Operation.MAP_UDP) is None
    assert read_mapping(MAPPING[:-1], Operation.MAP_TCP) is None
    assert read_mapping(ADDRESS, Operation.MAP_TCP) is None
    assert read_address(b"\1" + ADDRESS[1:]) is None


@pytest.mark.parametrize(("code", "words"), [(2, "settings"), (4, "no more ports"), (99, "99")])
def test_a_refusal_says_why(code: int, words: str) -> None:
    with pytest.raises(Refused, match=words):
        read_mapping(b"\0\x82" + code.to_bytes(2, "big") + bytes(12), Operation.MAP_TCP)


def test_the_gateway_is_the_one_of_the_default_route(tmp_path: Path) -> None:
    table = tmp_path / "route"
    head = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
    number = f"{struct.unpack('=I', bytes([192, 168, 1, 1]))[0]:08X}"
    local = f"{struct.unpack('=I', bytes([192, 168, 1, 0]))[0]:08X}"
    table.write_text(
        head
        + f"eth0 {local} 00000000 0001 0 0 0 00FFFFFF 0 0 0\n"
        + f"eth0 00000000 {number} 0003 0 0 0 00000000 0 0 0\n"
    )
    assert default_gateway(table) == "192.168.1.1"
    table.write_text(head)
    assert default_gateway(table) is None
    assert default_gateway(tmp_path / "none") is None
