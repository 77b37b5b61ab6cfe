"""Who gets an answer from the STUN responder, how large, and how often."""

from __future__ import annotations

import os

import pytest
from aioice import stun

from covey.transport.nat.responder import EACH_HOST, MAX_GROWTH_BYTES, Responder
from covey.transport.nat.stun import (
    STALE_AFTER_S,
    build_probe,
    build_request,
    parse,
    read_answer,
    read_probe,
)

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
TRANSACTION = b"transaction!"
NOW = 1_800_000_000.0
HERE, PEER = ("11.0.0.7", 5000), ("11.0.0.8", 6000)


def responder() -> Responder:
    return Responder(KEY, is_peer=lambda host: host == PEER[0])


def ask(packet: bytes, source: tuple[str, int] = HERE, *, unix_time: float = NOW) -> bytes | None:
    return responder().respond(packet, source, now=0.0, unix_time=unix_time)


def request(key: bytes = KEY) -> bytes:
    return build_request(key, TRANSACTION, unix_time=NOW)


@pytest.mark.parametrize("source", [HERE, ("2400:c0de::7", 5000)])
def test_a_member_learns_its_address_at_no_gain_in_size(source: tuple[str, int]) -> None:
    answer = ask(request(), source)
    assert answer is not None
    assert len(answer) <= len(request())
    assert read_answer(answer, KEY) == (TRANSACTION, source)
    assert read_answer(answer, OTHER_KEY) is None


def test_a_request_under_another_key_gets_silence() -> None:
    assert ask(request(OTHER_KEY)) is None


def test_a_forged_request_gets_silence_even_from_a_peer() -> None:
    assert ask(request(OTHER_KEY), PEER) is None


def test_an_old_request_sent_again_gets_silence() -> None:
    assert ask(request(), unix_time=NOW + STALE_AFTER_S) is not None
    assert ask(request(), unix_time=NOW + STALE_AFTER_S + 1) is None
    assert ask(request(), unix_time=NOW - STALE_AFTER_S - 1) is None


def test_a_signed_request_without_a_time_gets_silence() -> None:
    message = stun.Message(stun.Method.BINDING, stun.Class.REQUEST, TRANSACTION)
    message.attributes["SOFTWARE"] = "x" * 20
    message.add_message_integrity(KEY)
    assert ask(bytes(message)) is None


def test_a_plain_request_is_answered_only_to_a_peer() -> None:
    plain = bytes(stun.Message(stun.Method.BINDING, stun.Class.REQUEST, TRANSACTION))
    assert ask(plain, HERE) is None
    answer = ask(plain, PEER)
    assert answer is not None
    assert len(answer) <= len(plain) + MAX_GROWTH_BYTES
    assert stun.parse_message(answer).attributes["XOR-MAPPED-ADDRESS"] == PEER


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\0" * 20,
        os.urandom(64),
        request()[:-1],
        request() + b"\0\0\0\0",
        b"GET / HTTP/1.1\r\n\r\n" * 4,
        bytes(stun.Message(stun.Method.BINDING, stun.Class.RESPONSE, TRANSACTION)),
        bytes(stun.Message(stun.Method.BINDING, stun.Class.INDICATION, TRANSACTION)),
        bytes(stun.Message(stun.Method.ALLOCATE, stun.Class.REQUEST, TRANSACTION)),
        # One attribute that is too short, which aioice unpacks all the same.
        b"\0\1\0\4\x21\x12\xa4\x42" + TRANSACTION + b"\0\3\0\0",
        # Oversized: a correct request with kilobytes of padding.
        b"\0\1\x03\xf0\x21\x12\xa4\x42" + TRANSACTION + b"\x80\x22\x03\xec" + b"x" * 1004,
    ],
)
def test_whatever_else_comes_gets_silence(packet: bytes) -> None:
    assert ask(packet, PEER) is None


def test_a_changed_byte_anywhere_under_the_seal_silences_a_request() -> None:
    good = request()
    for i in range(len(good) - 8):  # the last 8 are FINGERPRINT, for those who hold no key
        assert ask(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :]) is None


def test_a_flood_from_one_host_leaves_others_their_answers() -> None:
    flooded = responder()
    answers = [flooded.respond(request(), HERE, now=0.0, unix_time=NOW) for _ in range(1000)]
    assert len([answer for answer in answers if answer]) == EACH_HOST.burst
    assert flooded.respond(request(), ("11.0.0.9", 1), now=0.0, unix_time=NOW) is not None
    assert flooded.respond(request(), HERE, now=1.0, unix_time=NOW) is not None


def test_a_flood_of_forged_requests_uses_up_nobodys_answers() -> None:
    flooded = responder()
    for n in range(5000):
        source = (f"11.1.{n % 250}.{n // 250}", 1)
        assert flooded.respond(request(OTHER_KEY), source, now=0.0, unix_time=NOW) is None
    assert flooded.respond(request(), HERE, now=0.0, unix_time=NOW) is not None


def test_a_probe_is_a_members_or_nothing() -> None:
    probe = build_probe(KEY, TRANSACTION)
    assert read_probe(probe, KEY) == TRANSACTION
    assert read_probe(probe, OTHER_KEY) is None
    assert read_probe(request(), KEY) is None
    assert len(probe) < len(request())
    assert parse(probe) is not None
    assert ask(probe, PEER) is None  # or two responders could be set at each other
