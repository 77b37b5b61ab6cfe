"""From a connected socket to an authenticated link: preamble, TLS, admission.

The same two functions serve sockets that were dialled, accepted, punched or relayed, and both
kinds of keys: those of a swarm's epoch, and those of an invite's token.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from .errors import LinkBroken, LinkTimeout, MalformedFrame, RefusedByPeer
from .frame import Frame
from .identity import Identity
from .invite import Token
from .link import Link, LinkKind
from .membership import Swarm
from .messages import Admitted, Failure, Hello, Receipt
from .preamble import NONCE_BYTES, build_preamble
from .stream_link import StreamLink, open_stream_link
from .tls import TlsContexts, authenticate, build_contexts

HANDSHAKE_S = 5.0  # preamble and TLS: two round trips, and a Raspberry Pi's arithmetic
ADMISSION_S = 5.0  # the other side may first have to find out whether an older link still lives


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one identity needs to pass, and to guard, the door of a swarm or of an invite."""

    key_id: bytes
    preamble_key: bytes
    contexts: TlsContexts

    @classmethod
    def of_swarm(cls, swarm: Swarm, identity: Identity) -> Self:
        """For links between members."""
        contexts = build_contexts(swarm.authority_seed, identity)
        return cls(swarm.key_id, swarm.preamble_key, contexts)

    @classmethod
    def of_token(cls, token: Token, identity: Identity) -> Self:
        """For the one link that an invite opens."""
        contexts = build_contexts(token.authority_seed, identity)
        return cls(token.id, token.preamble_key, contexts)


def announce(connection: socket.socket, credentials: Credentials, *, peer_id: str) -> bytes:
    """Send a preamble for `peer_id` on a fresh socket; returns it.

    Raises:
        LinkBroken: the listener hung up.
    """
    preamble = build_preamble(
        key_id=credentials.key_id,
        key=credentials.preamble_key,
        expected_peer_id=peer_id,
        nonce=os.urandom(NONCE_BYTES),
        unix_time=time.time(),
    )
    try:
        connection.send(preamble)  # a fresh socket has room for 77 bytes
    except OSError as error:
        raise LinkBroken("the listener hung up") from error
    return preamble


async def dial(
    connection: socket.socket,
    credentials: Credentials,
    *,
    peer_id: str,
    is_allowed: Callable[[str], bool],
    hello: Hello | None = None,
    kind: LinkKind = LinkKind.DIRECT,
    is_announced: bool = False,
) -> tuple[StreamLink, Receipt]:
    """The dialer's side, up to the other's admission; owns the socket from here.

    Args:
        connection: connected; nothing was sent on it yet, or only the preamble.
        credentials: of the swarm, or of an invite.
        peer_id: whom to expect.
        is_allowed: False for whoever was revoked.
        hello: which link this is to carry; None for an invite's, which no other will.
        kind: what the connection is.
        is_announced: whether the preamble was sent already, by `announce`.

    Returns:
        The carrier, and what the peer has of the link already.

    Raises:
        LinkBroken: the listener hung up, as it does on a wrong secret, or TLS failed.
        NotAMember: another identity answers.
        RefusedByPeer: the listener knows us and will not have us.
        LinkClosed: the listener has another link to us already.
        LinkTimeout: it did not say.
    """
    if not is_announced:
        try:
            announce(connection, credentials, peer_id=peer_id)
        except LinkBroken:
            connection.close()
            raise
    link = await open_stream_link(
        connection,
        context=credentials.contexts.client,
        is_dialer=True,
        authenticate=lambda tls: authenticate(tls, expected=peer_id, is_allowed=is_allowed),
        kind=kind,
        handshake_s=HANDSHAKE_S,
    )
    return link, await introduce(link, hello)


async def introduce(carrier: Link, hello: Hello | None) -> Receipt:
    """The dialer's first word on a carrier, and the answer; a carrier not admitted is aborted.

    Raises:
        RefusedByPeer, LinkClosed, LinkBroken, LinkTimeout: as `dial`.
    """
    admitted: Receipt | None = None
    try:
        if hello is not None:
            carrier.post(Frame(message=hello))
        async with asyncio.timeout(ADMISSION_S):
            first = await carrier.receive()
        match first.message:
            case Admitted(received=received):
                admitted = received
            case Failure(code=code):
                raise RefusedByPeer(code)
            case _:
                raise MalformedFrame("the peer did not say whether it admits us")
    except TimeoutError as error:
        raise LinkTimeout("the handshake", ADMISSION_S) from error
    finally:
        if admitted is None:
            carrier.abort(MalformedFrame("not admitted"))
    return admitted


async def hear_hello(carrier: Link) -> Hello:
    """The first word of a member that dialled us.

    Raises:
        LinkTimeout, MalformedFrame, LinkClosed, LinkBroken: there was none; the carrier is aborted.
    """
    hello: Hello | None = None
    try:
        async with asyncio.timeout(ADMISSION_S):
            first = await carrier.receive()
        if not isinstance(first.message, Hello):
            raise MalformedFrame("the peer did not say which link it wants")
        hello = first.message
    except TimeoutError as error:
        raise LinkTimeout("the handshake", ADMISSION_S) from error
    finally:
        if hello is None:
            carrier.abort(MalformedFrame("no hello"))
    return hello


async def accept(
    connection: socket.socket,
    credentials: Credentials,
    *,
    is_allowed: Callable[[str], bool],
    kind: LinkKind = LinkKind.DIRECT,
) -> StreamLink:
    """The listener's side after a good preamble; the caller says `Admitted`, or closes.

    Raises:
        LinkBroken: TLS failed.
        NotAMember: no proof of identity, or not allowed; the dialer was told.
    """
    return await open_stream_link(
        connection,
        context=credentials.contexts.server,
        is_dialer=False,
        authenticate=lambda tls: authenticate(tls, expected=None, is_allowed=is_allowed),
        kind=kind,
        handshake_s=HANDSHAKE_S,
    )
