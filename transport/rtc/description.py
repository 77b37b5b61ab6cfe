"""What one end tells the other about its WebRTC transport: the few lines of SDP that matter. Pure.

The libraries never see a peer's text. It is read here, line by line, into checked values
(RFC 8839, 8841, 8122), and whatever else it says is of no consequence. It must come over an
authenticated link: the fingerprint in it is what proves the other end in the DTLS handshake.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from covey.transport.errors import FrameTooLarge, MalformedFrame

MAX_TEXT_BYTES = 16 << 10
MAX_CANDIDATES = 32
MAX_HOSTS = 8  # of one peer that packets are sent to
SCTP_PORT = 5000

_UFRAG = re.compile(r"[A-Za-z0-9+/]{4,256}")
_PASSWORD = re.compile(r"[A-Za-z0-9+/]{22,256}")
_FINGERPRINT = re.compile(r"sha-256 ((?:[0-9A-F]{2}:){31}[0-9A-F]{2})")
_CANDIDATE = re.compile(
    r"([A-Za-z0-9+/]{1,32}) 1 [Uu][Dd][Pp] ([0-9]{1,10}) (\S{1,253}) ([0-9]{1,5})"
    r" typ (host|srflx)(?: \S+ \S+)*"
)
_MAX_PRIORITY = (1 << 31) - 1
# Where a peer in the same house or the same provider's network can be.
_LOCAL = tuple(
    ipaddress.ip_network(network)
    for network in (
        "10.0.0.0/8",
        "100.64.0.0/10",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "fc00::/7",
        "fe80::/10",
    )
)
_BROADCAST = ipaddress.ip_address("255.255.255.255")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One UDP address where an end may be reached."""

    foundation: str
    priority: int
    host: str  # an IP address in its usual form
    port: int
    kind: str  # "host" or "srflx"

    def __str__(self) -> str:
        base = f"{self.foundation} 1 udp {self.priority} {self.host} {self.port} typ {self.kind}"
        return base if self.kind == "host" else f"{base} raddr 0.0.0.0 rport 9"


@dataclass(frozen=True, slots=True)
class Description:
    """One end's ICE credentials, certificate and addresses."""

    ufrag: str
    password: str
    fingerprint: str  # SHA-256 of its certificate: "AB:CD:..."
    candidates: tuple[Candidate, ...]

    def to_text(self) -> str:
        """As SDP; `parse` reads it."""
        lines = (
            "v=0",
            "o=- 0 0 IN IP4 0.0.0.0",
            "s=-",
            "t=0 0",
            "m=application 9 UDP/DTLS/SCTP webrtc-datachannel",
            "c=IN IP4 0.0.0.0",
            f"a=ice-ufrag:{self.ufrag}",
            f"a=ice-pwd:{self.password}",
            f"a=fingerprint:sha-256 {self.fingerprint}",
            f"a=sctp-port:{SCTP_PORT}",
            *(f"a=candidate:{candidate}" for candidate in self.candidates),
            "a=end-of-candidates",
        )
        return "\r\n".join(lines) + "\r\n"

    @classmethod
    def parse(cls, text: str) -> Description:
        """Read what a peer sent.

        Raises:
            FrameTooLarge: beyond `MAX_TEXT_BYTES`.
            MalformedFrame: something is missing, there twice, or not what it should be.
        """
        if len(text) > MAX_TEXT_BYTES:
            raise FrameTooLarge("a WebRTC description beyond its limit")
        lines = text.split("\n")
        candidates = tuple(map(_candidate, _values(lines, "candidate")))
        if len(candidates) > MAX_CANDIDATES:
            raise MalformedFrame("too many WebRTC candidates")
        return cls(
            ufrag=_only(lines, "ice-ufrag", _UFRAG)[0],
            password=_only(lines, "ice-pwd", _PASSWORD)[0],
            fingerprint=_only(lines, "fingerprint", _FINGERPRINT)[1],
            candidates=candidates,
        )

    def restricted_to(self, hosts: Collection[str]) -> Description:
        """The same without candidates that might be a third party's.

        What stays is at one of `hosts`, where somebody else than the peer has seen it, or in a
        private network; `MAX_HOSTS` of them at most.

        Raises:
            MalformedFrame: none is left.
        """
        known = {str(ipaddress.ip_address(host)) for host in hosts}
        kept: list[Candidate] = []
        for candidate in self.candidates:
            used = {other.host for other in kept}
            is_allowed = candidate.host in known or _is_local(candidate.host)
            if is_allowed and (candidate.host in used or len(used) < MAX_HOSTS):
                kept.append(candidate)
        if not kept:
            raise MalformedFrame("no WebRTC candidate at an address that the peer is known by")
        return replace(self, candidates=tuple(kept))


def _values(lines: list[str], name: str) -> Iterator[str]:
    start = f"a={name}:"
    return (line[len(start) :].rstrip("\r") for line in lines if line.startswith(start))


def _only(lines: list[str], name: str, pattern: re.Pattern[str]) -> re.Match[str]:
    found = list(_values(lines, name))
    match = pattern.fullmatch(found[0]) if len(found) == 1 else None
    if match is None:
        raise MalformedFrame(f"a WebRTC description needs one good {name}")
    return match


def _candidate(text: str) -> Candidate:
    match = _CANDIDATE.fullmatch(text)
    if match is None or not match[0].isascii():
        raise MalformedFrame("not a WebRTC candidate over UDP")
    foundation, priority, host, port, kind = match.groups()
    try:
        address = ipaddress.ip_address(host)
    except ValueError as error:
        raise MalformedFrame("a WebRTC candidate without an IP address") from error
    is_one_machine = not (
        address.is_multicast
        or address.is_unspecified
        or address == _BROADCAST
        # Written so, it would be a way around the checks of IPv4 addresses.
        or (address.version == 6 and (address.ipv4_mapped is not None or address.scope_id))
    )
    if not (is_one_machine and 0 < int(port) < 65536 and 0 < int(priority) <= _MAX_PRIORITY):
        raise MalformedFrame("a WebRTC candidate that leads nowhere")
    return Candidate(foundation, int(priority), str(address), int(port), kind)


def _is_local(host: str) -> bool:
    address = ipaddress.ip_address(host)
    return any(address in network for network in _LOCAL)
