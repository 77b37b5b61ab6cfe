"""How a machine comes in: an invite opens one link, on which the secret is handed over.

The joiner's side is `redeem`, the inviter's `serve_invite`. On such a link exactly one request is
heard, whatever happens.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from .addresses import MAX_ADDRESSES
from .errors import (
    ErrorCode,
    InviteInvalid,
    LinkClosed,
    LinkTimeout,
    MalformedFrame,
    PeerUnreachable,
    RefusedByPeer,
    TransportError,
)
from .frame import Frame
from .handshake import Credentials, dial
from .identity import Identity
from .invite import Invite, InviteBook
from .link import Link, LinkKind
from .messages import Admitted, Failure, JoinRequest, Welcome
from .paths import direct_ways, open_path

ANSWER_S = 10.0
DIAL_S = 15.0

Welcomer = Callable[[str, JoinRequest], Welcome]


async def redeem(identity: Identity, invite: Invite, *, addresses: Sequence[str] = ()) -> Welcome:
    """Ask the inviter to let us in.

    Args:
        identity: who we will be in the swarm.
        invite: as parsed.
        addresses: where other members may dial us.

    Raises:
        InviteInvalid: the inviter refused: used up, expired, or we were removed before.
        PeerUnreachable: the inviter cannot be reached, or no longer knows the invite.
        LinkTimeout, LinkBroken: it was reached, and then lost; try again, it costs no second use.
    """
    credentials = Credentials.of_token(invite.token, identity)

    async def secure(connection: socket.socket, kind: LinkKind) -> Link:
        link, _ = await dial(
            connection,
            credentials,
            peer_id=invite.inviter,
            is_allowed=lambda _: True,
            kind=kind,
        )
        return link

    ways = direct_ways(invite.addresses)
    try:
        link = await open_path(invite.inviter, ways, (), secure, deadline_s=DIAL_S)
    except RefusedByPeer as error:
        raise InviteInvalid("the inviter does not let this machine in") from error
    except LinkClosed as error:
        raise PeerUnreachable(invite.inviter, "it closed the link") from error
    try:
        async with asyncio.timeout(ANSWER_S):
            await link.send(
                Frame(message=JoinRequest(addresses=list(addresses[:MAX_ADDRESSES])), request=1)
            )
            answer = (await link.receive()).message
    except TimeoutError as error:
        raise LinkTimeout("the invite", ANSWER_S) from error
    finally:
        await link.aclose()
    match answer:
        case Welcome(swarm=swarm) if swarm == invite.swarm:
            return answer
        case Failure(code=ErrorCode.INVITE_INVALID):
            raise InviteInvalid("it is used up or has expired")
        case Failure(code=code):
            raise RefusedByPeer(code)
        case _:
            raise MalformedFrame("the inviter's answer makes no sense")


async def serve_invite(
    link: Link, token_id: bytes, *, invites: InviteBook, welcome: Welcomer
) -> bool:
    """Answer the one request of a joiner on `link`, and close it; whether it was let in.

    `welcome` is called after the use was counted, and may write the book to disk.
    """
    try:
        link.post(Frame(message=Admitted()))
        async with asyncio.timeout(ANSWER_S):
            frame = await link.receive()
        answer = _answer(link.peer_id, frame, token_id, invites, welcome)
        link.post(Frame(message=answer, reply_to=frame.request))
        # The joiner hangs up when it has the answer; closing first could cut the answer off.
        with suppress(TransportError):
            async with asyncio.timeout(ANSWER_S):
                await link.receive()
    except TimeoutError:
        return False
    finally:
        await link.aclose()
    return isinstance(answer, Welcome)


def _answer(
    peer_id: str, frame: Frame, token_id: bytes, invites: InviteBook, welcome: Welcomer
) -> Welcome | Failure:
    if not isinstance(frame.message, JoinRequest):
        return Failure(code=ErrorCode.UNKNOWN_MESSAGE)
    try:
        invites.redeem(token_id, peer_id, unix_time=time.time())
    except InviteInvalid as error:
        return Failure(code=error.code)
    return welcome(peer_id, frame.message)
