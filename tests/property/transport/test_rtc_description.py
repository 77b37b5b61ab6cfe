"""What a peer says of its WebRTC transport: read strictly, and never taken for a third party's."""

from __future__ import annotations

import ipaddress
import random
from contextlib import suppress

import pytest
from aiortc.sdp import SessionDescription
from hypothesis import example, given
from hypothesis import strategies as st

from covey.transport.errors import FrameTooLarge, MalformedFrame, ProtocolViolation
from covey.transport.rtc.description import (
    MAX_CANDIDATES,
    MAX_HOSTS,
    MAX_TEXT_BYTES,
    Candidate,
    Description,
)

FINGERPRINT = ":".join(["AB"] * 32)
ICE_CHARS = "abcXYZ019+/"


def is_one_machine(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    is_mapped = isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None
    is_broadcast = str(address) == "255.255.255.255"
    return not (address.is_multicast or address.is_unspecified or is_broadcast or is_mapped)


hosts = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
).filter(lambda host: is_one_machine(ipaddress.ip_address(host)))
candidates = st.builds(
    Candidate,
    st.text(ICE_CHARS, min_size=1, max_size=32),
    st.integers(1, 2**31 - 1),
    hosts,
    st.integers(1, 65535),
    st.sampled_from(["host", "srflx"]),
)
descriptions = st.builds(
    Description,
    st.text(ICE_CHARS, min_size=4, max_size=32),
    st.text(ICE_CHARS, min_size=22, max_size=32),
    st.binary(min_size=32, max_size=32).map(lambda digest: digest.hex(":").upper()),
    st.lists(candidates, max_size=MAX_CANDIDATES).map(tuple),
)


def description(*found: str, extra: str = "", fingerprint: str = FINGERPRINT) -> str:
    """The text of one with those candidates."""
    lines = [
        "v=0",
        "m=application 9 UDP/DTLS/SCTP webrtc-datachannel",
        "a=ice-ufrag:abcd",
        "a=ice-pwd:" + "p" * 22,
        f"a=fingerprint:sha-256 {fingerprint}",
        *(f"a=candidate:{candidate}" for candidate in found),
        extra,
    ]
    return "\r\n".join(lines)


def at(host: str, port: int = 4000) -> str:
    return f"f 1 udp 2130706431 {host} {port} typ host"


@given(descriptions)
def test_a_description_survives_its_text(sent: Description) -> None:
    text = sent.to_text()
    assert Description.parse(text) == sent
    assert len(text) <= MAX_TEXT_BYTES
    assert Description.parse(text.replace("\r\n", "\n")) == sent


@given(descriptions)
def test_the_text_is_sdp_that_others_read(sent: Description) -> None:
    media = SessionDescription.parse(sent.to_text()).media[0]
    assert media.ice is not None
    assert media.ice.usernameFragment == sent.ufrag
    assert media.dtls is None or media.dtls.fingerprints[0].value == sent.fingerprint
    assert [(c.ip, c.port) for c in media.ice_candidates] == [
        (c.host, c.port) for c in sent.candidates
    ]


@given(st.one_of(st.text(), st.text("a=:cndieupwfgrhs-256 ABF0123.typ\r\n")))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(ProtocolViolation):
        Description.parse(text)


@given(descriptions, st.integers(0, 2**32), st.integers(1, 20))
def test_a_damaged_description_is_read_or_refused(
    sent: Description, seed: int, n_changes: int
) -> None:
    rng = random.Random(seed)
    text = list(sent.to_text())
    for _ in range(n_changes):
        at_ = rng.randrange(len(text))
        match rng.randrange(3):
            case 0:
                text[at_] = rng.choice("\n\r :=a0\x00é\u0661.")
            case 1:
                del text[at_ : at_ + rng.randrange(1, 40)]
                text.append("x")
            case _:
                text[at_:at_] = text[at_ : at_ + rng.randrange(1, 200)]
    with suppress(ProtocolViolation):
        for candidate in Description.parse("".join(text)).candidates:
            address = ipaddress.ip_address(candidate.host)
            assert not address.is_multicast
            assert not address.is_unspecified
            assert 0 < candidate.port < 65536


@pytest.mark.parametrize(
    "candidate",
    [
        "",
        "f 1 udp 1",
        "f 1 tcp 2130706431 10.0.0.1 4000 typ host tcptype active",
        "f 2 udp 2130706431 10.0.0.1 4000 typ host",  # no such component
        "f 1 udp 2130706431 10.0.0.1 4000 typ prflx",
        "f 1 udp 2130706431 10.0.0.1 4000 typ relay raddr 10.0.0.1 rport 9",
        "f 1 udp 99999999999 10.0.0.1 4000 typ host",
        "f 1 udp 4294967295 10.0.0.1 4000 typ host",
        at("10.0.0.1", 0),
        at("10.0.0.1", 65536),
        at("printer.local"),
        at("3e1f5c3e-1a2b-4c5d-8e9f-0a1b2c3d4e5f.local"),
        at("example.org"),
        at("224.0.0.251"),
        at("ff02::fb"),
        at("0.0.0.0"),  # noqa: S104
        at("::"),
        at("255.255.255.255"),
        at("::ffff:192.0.2.1"),
        at("fe80::1%eth0"),
        at("10.0.0.01"),
        at("10.0.0.1\u0661"),
        at("10.0.0.1") + " generation",
    ],
)
def test_a_candidate_that_is_no_address_of_one_machine_is_refused(candidate: str) -> None:
    with pytest.raises(MalformedFrame):
        Description.parse(description(at("10.0.0.1"), candidate))


@pytest.mark.parametrize(
    "text",
    [
        description(at("10.0.0.1")).replace("a=fingerprint", "b=fingerprint"),
        description(at("10.0.0.1"), fingerprint=FINGERPRINT[:-3]),
        description(at("10.0.0.1"), fingerprint=FINGERPRINT.lower().replace("a", "g")),
        description(at("10.0.0.1")).replace("sha-256", "sha-1"),
        description(at("10.0.0.1"), extra=f"a=fingerprint:sha-256 {FINGERPRINT}"),
        description(at("10.0.0.1"), extra="a=ice-pwd:" + "q" * 22),
        description(at("10.0.0.1")).replace("abcd", "abc"),
        description(at("10.0.0.1")).replace("p" * 22, "p" * 21),
        description(*[at("10.0.0.1")] * (MAX_CANDIDATES + 1)),
    ],
)
def test_what_is_missing_doubled_or_too_many_is_refused(text: str) -> None:
    with pytest.raises(MalformedFrame):
        Description.parse(text)


def test_a_long_text_is_not_read() -> None:
    with pytest.raises(FrameTooLarge):
        Description.parse(description(at("10.0.0.1")) + " " * MAX_TEXT_BYTES)


def test_a_third_partys_address_is_left_out() -> None:
    text = description(
        *map(at, ("192.0.2.1", "203.0.113.7", "192.168.1.9", "2001:db8::1", "127.0.0.1"))
    )
    kept = Description.parse(text).restricted_to(["203.0.113.7"]).candidates
    assert [candidate.host for candidate in kept] == ["203.0.113.7", "192.168.1.9"]
    with pytest.raises(MalformedFrame):
        Description.parse(description(at("192.0.2.1"))).restricted_to(["203.0.113.7"])


def test_another_spelling_of_a_known_host_is_known() -> None:
    text = description(at("2001:DB8:0::1"))
    assert (
        Description.parse(text).restricted_to(["2001:db8::1"]).candidates[0].host == "2001:db8::1"
    )


@given(st.lists(hosts, min_size=1, max_size=MAX_CANDIDATES))
@example([f"10.0.0.{n}" for n in range(1, 33)])
def test_few_hosts_get_packets_whatever_is_described(named: list[str]) -> None:
    parsed = Description.parse(description(*map(at, named)))
    kept = parsed.restricted_to(named).candidates
    assert 0 < len({candidate.host for candidate in kept}) <= MAX_HOSTS
