"""How a member that was away gets the secret of now, by the one it had.

An earlier epoch's secret opens a link on which exactly one request is heard: "give me my sealed
secret". Whoever tries to open an ordinary link with it is told to ask. What is answered, and to
whom, is the node's to say; the asker's identity was proven by then.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from .errors import (
    ErrorCode,
    LinkClosed,
    LinkTimeout,
    MalformedFrame,
    PeerUnreachable,
    RefusedByPeer,
    TransportError,
)
from .frame import Frame
from .handshake import Credentials, accept, dial
from .identity import Identity
from .link import Link, LinkKind
from .membership import Keyring, Swarm
from .messages import Admitted, Failure, SecretAnswer, SecretRequest
from .paths import direct_ways, open_path
from .tls import build_contexts

ANSWER_S = 10.0
DIAL_S = 10.0

#: What to say to the peer that asks.
Answerer = Callable[[str], SecretAnswer | Failure]


async def renew(
    identity: Identity, swarm: Swarm, peer_id: str, addresses: Sequence[str]
) -> SecretAnswer:
    """Ask a member for the secret of now, by that of an earlier epoch.

    Raises:
        RefusedByPeer: it knows us for no member.
        PeerUnreachable: it cannot be reached, or does not honour that epoch.
        LinkTimeout, LinkBroken, MalformedFrame: it was reached, and then lost.
    """
    credentials = _renewal_credentials(swarm, identity)

    async def secure(connection: socket.socket, kind: LinkKind) -> Link:
        link, _ = await dial(
            connection, credentials, peer_id=peer_id, is_allowed=lambda _: True, kind=kind
        )
        return link

    try:
        link = await open_path(peer_id, direct_ways(addresses), (), secure, deadline_s=DIAL_S)
    except LinkClosed as error:
        raise PeerUnreachable(peer_id, "it closed the link") from error
    try:
        async with asyncio.timeout(ANSWER_S):
            await link.send(Frame(message=SecretRequest(), request=1))
            answer = (await link.receive()).message
    except TimeoutError as error:
        raise LinkTimeout("the request for the secret", ANSWER_S) from error
    finally:
        await link.aclose()
    match answer:
        case SecretAnswer():
            return answer
        case Failure(code=code):
            raise RefusedByPeer(code)
        case _:
            raise MalformedFrame("the answer to the request for the secret makes no sense")


@dataclass(frozen=True, slots=True)
class _OldKey:
    """One key of an earlier epoch."""

    swarm: Swarm
    key: bytes
    until: float  # unix time
    is_renewal: bool


class RenewalDoor:
    """Lets those that hold an earlier epoch's secret ask for the one of now; a `Door`."""

    def __init__(
        self,
        identity: Identity,
        keyring: Keyring,
        answer: Answerer,
        *,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self._identity = identity
        self._answer = answer
        self._unix_time = unix_time
        self._keys: dict[bytes, _OldKey] = {}
        self.use(keyring)

    def use(self, keyring: Keyring) -> None:
        """Honour the earlier epochs of `keyring`, and no others."""
        self._keys = {}
        for old in keyring.old:
            swarm, until = old.swarm, old.until
            self._keys[swarm.key_id] = _OldKey(swarm, swarm.preamble_key, until, False)
            self._keys[swarm.renewal_key_id] = _OldKey(swarm, swarm.renewal_key, until, True)

    def key_of(self, key_id: bytes) -> bytes | None:
        """See `Door.key_of`."""
        old = self._keys.get(key_id)
        return old.key if old is not None and self._unix_time() < old.until else None

    async def enter(
        self, connection: socket.socket, key_id: bytes, source: tuple[str, int]
    ) -> bool:
        """See `Door.enter`; True if the peer got the secret."""
        old = self._keys.get(key_id)
        if old is None:
            connection.close()
            return False
        contexts = build_contexts(old.swarm.authority_seed, self._identity)
        credentials = Credentials(key_id, old.key, contexts)
        link = await accept(connection, credentials, is_allowed=lambda _: True)
        if not old.is_renewal:
            await _send_away(link)
            return False
        return await _serve_renewal(link, self._answer)


async def _send_away(link: Link) -> None:
    """Say that the epoch is over to a member that does not know it yet."""
    with suppress(TransportError):
        link.post(Frame(message=Failure(code=ErrorCode.EPOCH_OVER)))
    await link.aclose()


async def _serve_renewal(link: Link, answer: Answerer) -> bool:
    """Hear one request, answer it, and close; whether the peer was given the secret."""
    try:
        link.post(Frame(message=Admitted()))
        async with asyncio.timeout(ANSWER_S):
            frame = await link.receive()
        said: SecretAnswer | Failure = Failure(code=ErrorCode.UNKNOWN_MESSAGE)
        if isinstance(frame.message, SecretRequest):
            said = answer(link.peer_id)
        link.post(Frame(message=said, reply_to=frame.request))
        # The asker hangs up when it has the answer; closing first could cut the answer off.
        with suppress(TransportError):
            async with asyncio.timeout(ANSWER_S):
                await link.receive()
    except TimeoutError:
        return False
    finally:
        await link.aclose()
    return isinstance(said, SecretAnswer) and said.copy is not None


def _renewal_credentials(swarm: Swarm, identity: Identity) -> Credentials:
    contexts = build_contexts(swarm.authority_seed, identity)
    return Credentials(swarm.renewal_key_id, swarm.renewal_key, contexts)
