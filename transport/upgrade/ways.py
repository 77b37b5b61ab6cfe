"""What each end does in one attempt to move a link to a better way.

The leader is the dialer of whatever comes of it, except where it asks the other end to dial. What
leaves here towards an address that has not answered is bounded by `punch/` and `rtc/`; addresses
are those of an authenticated member, and the follower begins at most `MAX_TRIES` in `WINDOW_S`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Literal

from covey.transport.addresses import parse_address
from covey.transport.errors import (
    ErrorCode,
    LinkTimeout,
    MalformedFrame,
    PeerUnreachable,
    TransportError,
)
from covey.transport.frame import Frame
from covey.transport.handshake import introduce
from covey.transport.link import Link, LinkKind
from covey.transport.mesh import Mesh
from covey.transport.messages import (
    Failure,
    Hello,
    HostAnswer,
    HostRequest,
    PathReady,
    PathText,
    PathTry,
    Receipt,
)
from covey.transport.nat.facts import NatFacts
from covey.transport.nat.service import NatService
from covey.transport.paths import direct_ways, open_path
from covey.transport.peer import Peer
from covey.transport.punch import (
    Attempt,
    AttemptKind,
    Connections,
    PunchSocket,
    acceptor_end,
    birthday_easy,
    birthday_hard,
    dialer_end,
)
from covey.transport.rtc import open_rtc_link
from covey.transport.tasks import Tasks

logger = logging.getLogger(__name__)

READY_S = 4.0  # for the other end to open a port and have it looked at
DIAL_S = 2.0
PUNCH_S = 2.5
WEBRTC_S = 6.0
REVERSE_S = 3.0
MAX_TRIES = 16  # that one peer may have us begin
WINDOW_S = 60.0

_MAX_PEERS = 256

_Request = Literal["dial", "punch", "birthday_easy", "birthday_hard", "webrtc"]


class _Texts:
    """Descriptions from one peer, for `rtc.Signal`."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self.came: asyncio.Queue[str] = asyncio.Queue(maxsize=2)

    async def send(self, text: str) -> None:
        await self._peer.send(PathText(text=text))

    async def receive(self) -> str:
        return await self.came.get()


class _End:
    """What leader and follower share."""

    def __init__(self, mesh: Mesh, nat: NatService) -> None:
        self._mesh = mesh
        self._nat = nat
        self._texts: dict[str, _Texts] = {}

    def take_text(self, peer_id: str, text: str) -> None:
        """A description came; without an attempt that waits for it, it is dropped."""
        texts = self._texts.get(peer_id)
        if texts is not None and not texts.came.full():
            texts.came.put_nowait(text)

    async def _open_rtc(
        self, peer: Peer, texts: _Texts, *, is_dialer: bool, hosts: list[str]
    ) -> Link:
        return await open_rtc_link(
            texts,
            is_dialer=is_dialer,
            peer_id=peer.peer_id,
            hosts=hosts,
            stun_servers=self._nat.stun_servers,
            deadline_s=WEBRTC_S,
        )

    @contextmanager
    def _listening_for_texts(self, peer: Peer) -> Iterator[_Texts]:
        texts = self._texts[peer.peer_id] = _Texts(peer)
        try:
            yield texts
        finally:
            if self._texts.get(peer.peer_id) is texts:
                del self._texts[peer.peer_id]


class Leader(_End):
    """The end that chooses, and dials."""

    def __init__(self, mesh: Mesh, nat: NatService) -> None:
        super().__init__(mesh, nat)
        self._moved: dict[str, asyncio.Event] = {}  # links that wait to be dialled
        mesh.on_path(self._on_path)

    def _on_path(self, peer: Peer) -> None:
        waiting = self._moved.get(peer.peer_id)
        if waiting is not None:
            waiting.set()

    async def make(self, peer: Peer, attempt: Attempt, theirs: NatFacts) -> None:
        """Carry out one attempt; when this returns the link has moved.

        Raises:
            TransportError: it did not work.
        """
        if attempt.kind is AttemptKind.REVERSE:
            await self._reverse(peer, attempt)
            return

        async def carrier(hello: Hello) -> tuple[Link, Receipt]:
            match attempt.kind:
                case AttemptKind.DIAL:
                    return await _dial(self._mesh, peer, attempt.addresses, hello)
                case AttemptKind.WEBRTC:
                    return await self._rtc(peer, hello, theirs)
                case _:
                    return await self._punch(peer, attempt.kind, hello, theirs)

        try:
            await self._mesh.move(peer, carrier)
        except ValueError as error:  # an address that no single machine has
            raise MalformedFrame("the peer named an address that is none") from error

    async def _reverse(self, peer: Peer, attempt: Attempt) -> None:
        """Ask the peer to dial us, and wait for what comes of it."""
        moved = self._moved[peer.peer_id] = asyncio.Event()
        try:
            await _ask(peer, "dial", attempt.addresses)
            async with asyncio.timeout(REVERSE_S):
                await moved.wait()
        except TimeoutError as error:
            raise LinkTimeout("being dialled", REVERSE_S) from error
        finally:
            del self._moved[peer.peer_id]

    async def _punch(
        self, peer: Peer, kind: AttemptKind, hello: Hello, theirs: NatFacts
    ) -> tuple[Link, Receipt]:
        if kind is AttemptKind.BIRTHDAY_HARD:
            connections = birthday_hard(await _ask(peer, "birthday_easy"))
            return await self._dial_punched(peer, connections, hello)
        with PunchSocket() as punch:
            keeper, ours = await self._nat.observe_from(punch.port)
            with keeper:
                if kind is AttemptKind.BIRTHDAY_EASY:
                    host = await confirmed_host(self._mesh, peer, theirs)
                    await _ask(peer, "birthday_hard", (ours,))
                    connections = birthday_easy(punch, host)
                else:
                    seen = await _ask(peer, "punch", (ours,))
                    until = asyncio.get_running_loop().time() + PUNCH_S
                    connections = punch.connections(seen, until=until)
                return await self._dial_punched(peer, connections, hello)

    async def _dial_punched(
        self, peer: Peer, connections: Connections, hello: Hello
    ) -> tuple[Link, Receipt]:
        mesh = self._mesh
        connection = await dialer_end(connections, mesh.credentials, peer_id=peer.peer_id)
        return await mesh.dialler.secure(
            connection, peer.peer_id, hello, LinkKind.PUNCHED, is_announced=True
        )

    async def _rtc(self, peer: Peer, hello: Hello, theirs: NatFacts) -> tuple[Link, Receipt]:
        with self._listening_for_texts(peer) as texts:
            await _ask(peer, "webrtc")
            hosts = list(theirs.public_hosts)
            carrier = await self._open_rtc(peer, texts, is_dialer=True, hosts=hosts)
        return carrier, await introduce(carrier, hello)


class Follower(_End):
    """The end that is asked; one attempt at a time for each peer."""

    def __init__(self, mesh: Mesh, nat: NatService) -> None:
        super().__init__(mesh, nat)
        self.facts: dict[str, NatFacts] = {}  # what leaders said of themselves
        self._tasks = Tasks()
        self._busy: set[str] = set()
        self._begun: dict[str, deque[float]] = {}

    async def aclose(self) -> None:
        """Give up what is under way."""
        await self._tasks.aclose()

    def on_try(self, peer: Peer, frame: Frame) -> None:
        """Begin what the peer asks for, unless it asks too much."""
        if not isinstance(frame.message, PathTry) or frame.request is None:
            return
        if peer.peer_id in self._busy or not self._may_begin(peer.peer_id):
            peer.reply(frame, Failure(code=ErrorCode.NOT_READY))
            return
        self._busy.add(peer.peer_id)
        self._tasks.spawn(self._follow(peer, frame, frame.message), "follow an attempt")

    def _may_begin(self, peer_id: str) -> bool:
        now = time.monotonic()
        if len(self._begun) > _MAX_PEERS:
            self._begun = {p: d for p, d in self._begun.items() if d[-1] > now - WINDOW_S}
        begun = self._begun.setdefault(peer_id, deque(maxlen=MAX_TRIES))
        if len(begun) == MAX_TRIES and begun[0] > now - WINDOW_S:
            return False
        begun.append(now)
        return True

    async def _follow(self, peer: Peer, frame: Frame, wanted: PathTry) -> None:
        is_answered = False

        def ready(address: str | None = None) -> None:
            nonlocal is_answered
            is_answered = True
            peer.reply(frame, PathReady(address=address))

        try:
            await self._do(peer, wanted, ready)
        except TransportError as error:
            extra = {"peer": peer.peer_id[-8:], "way": wanted.attempt, "reason": str(error)}
            logger.info("an attempt failed", extra=extra)
        except ValueError as error:  # an address that is none
            logger.info("an attempt made no sense: %s", error, extra={"peer": peer.peer_id[-8:]})
        finally:
            self._busy.discard(peer.peer_id)
            if not is_answered:
                peer.reply(frame, Failure(code=ErrorCode.NOT_READY))

    async def _do(self, peer: Peer, wanted: PathTry, ready: Callable[..., None]) -> None:
        mesh, addresses = self._mesh, wanted.addresses
        match wanted.attempt:
            case "dial":
                ready()
                await mesh.move(peer, lambda hello: _dial(mesh, peer, addresses, hello))
            case "webrtc":
                with self._listening_for_texts(peer) as texts:
                    ready()
                    hosts = list(self._facts_of(peer).public_hosts)
                    carrier = await self._open_rtc(peer, texts, is_dialer=False, hosts=hosts)
                await mesh.reception.admit(carrier)
            case "birthday_hard":
                connections = birthday_hard(_first(addresses))
                ready()
                await self._accept_punched(peer, connections)
            case "birthday_easy" | "punch":
                with PunchSocket() as punch:
                    keeper, ours = await self._nat.observe_from(punch.port)
                    with keeper:
                        await self._accept_at(peer, punch, ours, wanted, ready)

    async def _accept_at(
        self,
        peer: Peer,
        punch: PunchSocket,
        ours: str,
        wanted: PathTry,
        ready: Callable[..., None],
    ) -> None:
        if wanted.attempt == "birthday_easy":
            host = await confirmed_host(self._mesh, peer, self._facts_of(peer))
            connections = birthday_easy(punch, host)
        else:
            until = asyncio.get_running_loop().time() + PUNCH_S + (peer.rtt_s or 0.0)
            connections = punch.connections(_first(wanted.addresses), until=until)
        ready(ours)
        await self._accept_punched(peer, connections)

    def _facts_of(self, peer: Peer) -> NatFacts:
        facts = self.facts.get(peer.peer_id)
        if facts is None:
            raise MalformedFrame("the peer has not said what it knows of its NAT")
        return facts

    async def _accept_punched(self, peer: Peer, connections: Connections) -> None:
        await asyncio.sleep((peer.rtt_s or 0.0) / 2)  # the other end hears of it then
        mesh = self._mesh
        connection, key_id = await acceptor_end(connections, mesh.reception.gate)
        await mesh.reception.admit_keyed(connection, key_id, LinkKind.PUNCHED)


async def confirmed_host(mesh: Mesh, peer: Peer, facts: NatFacts) -> str:
    """The IPv4 host of a peer as a relay of it sees it, which the peer itself has named too.

    A thousand packets go there: the word of the peer alone would let it aim them at anybody.

    Raises:
        PeerUnreachable: nobody confirms a host that it names.
    """
    for relay_id in mesh.relays_of(peer.peer_id):
        relay = mesh.peers.get(relay_id)
        if relay is None:
            continue
        with suppress(TransportError):
            answer = await relay.request(HostRequest(peer=peer.peer_id), timeout_s=READY_S)
            if isinstance(answer.message, HostAnswer) and answer.message.host is not None:
                host = answer.message.host
                if ":" not in host and host in facts.public_hosts:
                    return host
    raise PeerUnreachable(peer.peer_id, "no relay confirms where it is")


async def _dial(
    mesh: Mesh, peer: Peer, addresses: Sequence[str], hello: Hello
) -> tuple[Link, Receipt]:
    async def secure(connection: socket.socket, kind: LinkKind) -> tuple[Link, Receipt]:
        return await mesh.dialler.secure(connection, peer.peer_id, hello, kind)

    known = mesh.mapped_of(peer.peer_id)
    return await open_path(
        peer.peer_id, direct_ways(addresses, known), (), secure, deadline_s=DIAL_S
    )


async def _ask(peer: Peer, attempt: _Request, addresses: Sequence[str] = ()) -> str:
    """Have the peer begin its part; the address it has opened, empty if it needs none."""
    wanted = PathTry(attempt=attempt, addresses=list(addresses[:8]))
    ready = (await peer.request(wanted, timeout_s=READY_S)).message
    if not isinstance(ready, PathReady):
        raise MalformedFrame("the peer did not say that it begins")
    if attempt not in ("punch", "birthday_easy"):
        return ""
    try:
        parse_address(ready.address or "")
    except ValueError as error:
        raise MalformedFrame("the peer did not say where its port is seen") from error
    return ready.address or ""


def _first(addresses: Sequence[str]) -> str:
    if not addresses:
        raise MalformedFrame("the peer did not say where its port is seen")
    return addresses[0]
