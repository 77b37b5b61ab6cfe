"""Any bytes at all into everything here that reads bytes: a known answer, or nothing."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.transport.errors import MalformedFrame
from covey.transport.nat import natpmp, stun
from covey.transport.nat.address_watch import tells_of_a_move
from covey.transport.nat.observation import build_answer, read_answer
from covey.transport.nat.responder import Responder

KEY, NONCE = b"k" * 32, b"n" * 16
STUN_HEADER = b"\0\1\0\0\x21\x12\xa4\x42" + b"t" * 12

hosts = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)
ports = st.integers(1, 65535)


def with_length(header: bytes, body: bytes) -> bytes:
    return header[:2] + len(body).to_bytes(2, "big") + header[4:] + body


stun_like = st.one_of(
    st.binary(max_size=400),
    st.binary(max_size=200).map(lambda body: with_length(STUN_HEADER, body)),
    # Well-formed attributes of every kind with any content.
    st.lists(st.tuples(st.integers(0, 0x30) | st.integers(0x8020, 0x8030), st.binary(max_size=24)))
    .map(
        lambda attributes: b"".join(
            kind.to_bytes(2, "big") + len(value).to_bytes(2, "big") + value + bytes(-len(value) % 4)
            for kind, value in attributes
        )
    )
    .map(lambda body: with_length(STUN_HEADER, body[: 4 * 58])),
)


@given(stun_like)
def test_no_packet_of_a_stranger_is_answered(packet: bytes) -> None:
    responder = Responder(KEY, is_peer=lambda host: False)
    assert responder.respond(packet, ("11.0.0.1", 1), now=0.0, unix_time=0.0) is None


@given(stun_like, hosts)
def test_no_packet_grows_much_on_its_way_back_to_a_peer(packet: bytes, host: str) -> None:
    responder = Responder(KEY, is_peer=lambda host: True)
    answer = responder.respond(packet, (host, 1), now=0.0, unix_time=0.0)
    assert answer is None or len(answer) <= len(packet) + 24


@given(stun_like)
def test_no_packet_of_a_stranger_is_taken_for_an_answer(packet: bytes) -> None:
    assert stun.read_answer(packet, KEY) is None
    assert stun.read_probe(packet, KEY) is None


@given(st.binary(max_size=40), st.sampled_from(natpmp.Operation))
def test_any_router_can_be_read(packet: bytes, operation: natpmp.Operation) -> None:
    with suppress(natpmp.Refused):
        granted = natpmp.read_mapping(packet, operation)
        assert granted is None or 0 <= granted.lease_s <= natpmp.MAX_LEASE_S
        natpmp.read_address(packet)


@given(st.binary(max_size=200))
def test_any_kernel_can_be_read(messages: bytes) -> None:
    assert tells_of_a_move(messages) in (True, False)


@given(hosts, ports)
def test_an_observed_address_survives(host: str, port: int) -> None:
    assert read_answer(KEY, NONCE, build_answer(KEY, NONCE, (host, port))) == (host, port)


@given(hosts, ports, st.integers(0, 8 * 52 - 1))
def test_a_changed_bit_in_an_observed_address_is_noticed(host: str, port: int, bit: int) -> None:
    answer = bytearray(build_answer(KEY, NONCE, (host, port)))
    answer[bit // 8] ^= 1 << bit % 8
    with pytest.raises(MalformedFrame):
        read_answer(KEY, NONCE, bytes(answer))


@given(st.binary(max_size=80))
def test_nothing_else_is_an_observed_address(answer: bytes) -> None:
    with pytest.raises(MalformedFrame):
        read_answer(KEY, NONCE, answer)
