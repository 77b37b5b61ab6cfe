"""From two descriptions to an open data channel: ICE, DTLS, SCTP, by aiortc's transports.

Unlike a browser's peer connection nothing is offered and answered: both ends send a description
and read one. The dialer controls ICE and is the server in DTLS. What the other end describes is
the only place packets go to, checks of `description` passed: to each candidate at most seven STUN
requests of about a hundred bytes from each address of ours, over at most `deadline_s`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Protocol

import aioice
from aioice.ice import server_reflexive_candidate
from aiortc import (
    InvalidStateError,
    RTCCertificate,
    RTCDataChannel,
    RTCDataChannelParameters,
    RTCDtlsFingerprint,
    RTCDtlsParameters,
    RTCDtlsTransport,
    RTCIceCandidate,
    RTCIceGatherer,
    RTCIceParameters,
    RTCIceTransport,
    RTCSctpCapabilities,
    RTCSctpTransport,
)

from covey.transport.errors import LinkTimeout, PeerUnreachable

from .description import MAX_CANDIDATES, SCTP_PORT, Candidate, Description
from .link import CHANNEL_LOW_BYTES, RtcLink

MAX_LOCAL_HOSTS = 8
MAX_STUN_SERVERS = 2
GATHER_S = 2.0  # for the first answer of a STUN server: the request and two repetitions
GRACE_S = 0.1  # for the others'; some interfaces lead to none
CLOSE_S = 1.0
_MAX_MESSAGE_BYTES = 64 << 10
_FINGERPRINT = "sha-256"

for _name, _level in (("aioice", logging.WARNING), ("aiortc", logging.ERROR)):
    logging.getLogger(_name).setLevel(_level)  # they tell of every check and every hiccup


class Signal(Protocol):
    """Two short texts, one each way, over an authenticated link."""

    async def send(self, text: str) -> None:
        """To the other end."""

    async def receive(self) -> str:
        """From the other end."""


async def open_rtc_link(
    signal: Signal,
    *,
    is_dialer: bool,
    peer_id: str,
    hosts: Collection[str] = (),
    stun_servers: Sequence[tuple[str, int]] = (),
    deadline_s: float,
) -> RtcLink:
    """A link to the peer at the other end of `signal`, which has proved who that is.

    Args:
        signal: carries the descriptions.
        is_dialer: exactly one of the two ends is.
        peer_id: whom the link leads to.
        hosts: IP addresses where others have seen the peer; packets go to these and to private
            networks only.
        stun_servers: members that tell us our UDP address; two of them, over IPv4, are asked.
        deadline_s: for all of it.

    Raises:
        PeerUnreachable: no packets get through.
        LinkBroken: the other end went away.
        LinkTimeout: not in time.
        ProtocolViolation: the peer's description is wrong.
        TransportError: whatever `signal` raises.
    """
    ends = _Ends(is_dialer=is_dialer, stun_servers=stun_servers)
    is_open = False
    try:
        async with asyncio.timeout(deadline_s):
            await ends.gather()
            await signal.send(ends.describe().to_text())
            theirs = Description.parse(await signal.receive()).restricted_to(hosts)
            reason = await ends.connect(theirs)
            if reason:
                raise PeerUnreachable(peer_id, reason)
            link = RtcLink(ends, peer_id=peer_id, is_dialer=is_dialer)
            await ends.open(link)
            is_open = True
    except TimeoutError as error:
        raise LinkTimeout("opening a WebRTC channel", deadline_s) from error
    finally:
        if not is_open:
            await ends.aclose()
    return link


class _Connection(aioice.Connection):
    """ICE that asks several STUN servers, and goes on as soon as it may."""

    def __init__(self, *, is_controlling: bool, stun_servers: Sequence[tuple[str, int]]) -> None:
        super().__init__(ice_controlling=is_controlling)
        self._stun_servers = stun_servers

    async def get_component_candidates(
        self,
        component: int,
        addresses: list[str],
        timeout: int = 5,  # noqa: ASYNC109 - its signature, not ours
    ) -> list[aioice.Candidate]:
        """See aioice, which calls it with the addresses of every interface."""
        found = await super().get_component_candidates(
            component, addresses[:MAX_LOCAL_HOSTS], timeout=timeout
        )
        asking = [
            asyncio.create_task(
                server_reflexive_candidate(protocol, server), name="ask for address"
            )
            for protocol in self._protocols
            if ":" not in protocol.local_candidate.host
            for server in self._stun_servers
        ]
        try:
            return found + await _first_answers(asking)
        finally:
            for task in asking:
                task.cancel()


async def _first_answers(
    asking: Sequence[asyncio.Task[tuple[aioice.Candidate, None]]],
) -> list[aioice.Candidate]:
    """What those tasks find that are hardly slower than the fastest one."""
    found: dict[tuple[str, int], aioice.Candidate] = {}
    pending = set(asking)
    deadline = asyncio.get_running_loop().time() + GATHER_S
    while pending and (left := deadline - asyncio.get_running_loop().time()) > 0:
        done, pending = await asyncio.wait(
            pending, timeout=left, return_when=asyncio.FIRST_COMPLETED
        )
        for task in done:
            if task.exception() is None:  # else it had no answer, or no way there
                candidate, _ = task.result()
                found[candidate.host, candidate.port] = candidate
                deadline = min(deadline, asyncio.get_running_loop().time() + GRACE_S)
    return list(found.values())


class _Gatherer(RTCIceGatherer):
    """Our own addresses; never by a public STUN server."""

    def __init__(self, connection: aioice.Connection) -> None:
        super().__init__(iceServers=[])
        self._connection = connection


class _Ends:
    """This end's transports, one on top of the other; the link's `Channel`."""

    def __init__(self, *, is_dialer: bool, stun_servers: Sequence[tuple[str, int]]) -> None:
        usable = [server for server in stun_servers if ":" not in server[0]][:MAX_STUN_SERVERS]
        self._gatherer = _Gatherer(_Connection(is_controlling=is_dialer, stun_servers=usable))
        self._ice = RTCIceTransport(self._gatherer)
        self._certificate = RTCCertificate.generateCertificate()
        self._dtls = RTCDtlsTransport(self._ice, [self._certificate])
        self._sctp = RTCSctpTransport(self._dtls, SCTP_PORT)
        # Both ends make it, so nothing has to be agreed on when it opens.
        parameters = RTCDataChannelParameters(label="covey", negotiated=True, id=0)
        self._channel = RTCDataChannel(self._sctp, parameters)
        self._channel.bufferedAmountLowThreshold = CHANNEL_LOW_BYTES

    @property
    def buffered_bytes(self) -> int:
        """See `Channel`."""
        return self._channel.bufferedAmount

    def send(self, message: bytes) -> None:
        """See `Channel`."""
        with suppress(InvalidStateError):  # closed: the link hears of it presently
            self._channel.send(message)

    async def gather(self) -> None:
        """Find our own addresses."""
        gathering = asyncio.create_task(self._gatherer.gather(), name="gather addresses")
        try:
            await asyncio.shield(gathering)
        finally:
            # Given up half way, it would leave sockets behind.
            await asyncio.wait({gathering})

    def describe(self) -> Description:
        """What the other end must know."""
        ours = self._gatherer.getLocalParameters()
        fingerprint = next(
            found.value
            for found in self._certificate.getFingerprints()
            if found.algorithm == _FINGERPRINT
        )
        candidates = [
            Candidate(found.foundation, found.priority, found.ip, found.port, found.type)
            for found in self._gatherer.getLocalCandidates()
        ]
        return Description(
            ufrag=ours.usernameFragment or "",
            password=ours.password or "",
            fingerprint=fingerprint,
            candidates=tuple(candidates[:MAX_CANDIDATES]),
        )

    async def connect(self, theirs: Description) -> str:
        """Get through and make sure who is there; why it failed, or nothing."""
        for found in theirs.candidates:
            await self._ice.addRemoteCandidate(
                RTCIceCandidate(
                    component=1,
                    foundation=found.foundation,
                    ip=found.host,
                    port=found.port,
                    priority=found.priority,
                    protocol="udp",
                    type=found.kind,
                )
            )
        await self._ice.addRemoteCandidate(None)
        await self._ice.start(
            RTCIceParameters(usernameFragment=theirs.ufrag, password=theirs.password)
        )
        if self._ice.state != "completed":
            return "no UDP packets get through"
        fingerprint = RTCDtlsFingerprint(algorithm=_FINGERPRINT, value=theirs.fingerprint)
        await self._dtls.start(RTCDtlsParameters(fingerprints=[fingerprint]))
        return "" if self._dtls.state == "connected" else "the DTLS handshake failed"

    async def open(self, link: RtcLink) -> None:
        """Open the channel, and let `link` hear of what happens to it. Raises LinkBroken."""
        settled = asyncio.Event()
        for event in ("open", "close"):
            self._channel.on(event, settled.set)
        self._channel.on("message", link.message_received)
        self._channel.on("bufferedamountlow", link.buffer_low)
        self._channel.on("close", link.channel_lost)

        def look(transport: RTCIceTransport | RTCDtlsTransport) -> None:
            if transport.state in ("closed", "failed"):
                settled.set()
                link.channel_lost()

        self._ice.on("statechange", lambda: look(self._ice))
        self._dtls.on("statechange", lambda: look(self._dtls))
        await self._sctp.start(RTCSctpCapabilities(maxMessageSize=_MAX_MESSAGE_BYTES), SCTP_PORT)
        await settled.wait()
        link.raise_if_ended()

    async def aclose(self) -> None:
        """See `Channel`."""
        for layer in (self._sctp, self._dtls, self._ice):
            with suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(CLOSE_S):
                    await layer.stop()
