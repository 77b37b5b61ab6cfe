"""One end of a punch in the lab: a program that is told what to do in JSON lines, and says JSON.

`{"do": "observe", "at": ADDRESS}` reserves a port and says how the lab's observer sees it; the
other orders are one end each of what `covey.transport.punch` and `covey.transport.rtc` do.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import suppress
from typing import Any

import uvloop

from covey.transport.addresses import format_address, parse_address
from covey.transport.errors import TransportError
from covey.transport.frame import Frame
from covey.transport.handshake import Credentials
from covey.transport.identity import Identity
from covey.transport.link import Link, LinkKind
from covey.transport.membership import Swarm
from covey.transport.messages import Beat
from covey.transport.preamble import PreambleGate
from covey.transport.punch import (
    Connections,
    PunchSocket,
    acceptor_end,
    birthday_easy,
    birthday_hard,
    dialer_end,
)
from covey.transport.rtc import open_rtc_link
from covey.transport.stream_link import open_stream_link
from covey.transport.tls import authenticate

PUNCH_S = 4.0
ECHO_S = 3.0
IDENTITIES = {True: Identity(bytes(32)), False: Identity(bytes([1] * 32))}  # dialer, acceptor
STARTED_AT = time.time()
SWARM = Swarm.create(IDENTITIES[True].peer_id, entropy=lambda n: bytes([7]) * n)


class Node:
    """The dialer's end or the acceptor's."""

    def __init__(self, *, is_dialer: bool) -> None:
        self.is_dialer = is_dialer
        self.peer_id = IDENTITIES[not is_dialer].peer_id
        self.credentials = Credentials.of_swarm(SWARM, IDENTITIES[is_dialer])
        self.punch = PunchSocket()

    async def observe(self, at: str) -> dict[str, Any]:
        """Reserve a new port and ask what it looks like from outside."""
        self.punch.close()
        self.punch = PunchSocket()
        loop = asyncio.get_running_loop()
        with self.punch.bind_another() as asking:
            await loop.sock_connect(asking, parse_address(at))
            host, port = (await loop.sock_recv(asking, 64)).decode().split()
        return {"address": format_address(host, int(port))}

    async def meet(self, how: str, remote: str) -> dict[str, Any]:
        """Punch or birthday."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        match how:
            case "punch":
                connections = self.punch.connections(remote, until=loop.time() + PUNCH_S)
            case "birthday_easy":
                connections = birthday_easy(self.punch, parse_address(remote)[0])
            case _:
                connections = birthday_hard(remote)
        link = await self._secure(connections)
        return {"took_s": round(loop.time() - began, 2), **await self._echo(link)}

    async def webrtc(self, hosts: list[str], stun: str, deadline_s: float) -> dict[str, Any]:
        """A data channel; descriptions go the way the orders come."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        link = await open_rtc_link(
            self,
            is_dialer=self.is_dialer,
            peer_id=self.peer_id,
            hosts=hosts,
            stun_servers=[parse_address(stun)],
            deadline_s=deadline_s,
        )
        return {"took_s": round(loop.time() - began, 2), **await self._echo(link)}

    async def send(self, text: str) -> None:
        """See `Signal`."""
        say({"signal": text})

    async def receive(self) -> str:
        """See `Signal`."""
        return str((await hear())["signal"])

    async def _secure(self, connections: Connections) -> Link:
        if self.is_dialer:
            connection = await dialer_end(connections, self.credentials, peer_id=self.peer_id)
            context = self.credentials.contexts.client
        else:
            keys = {SWARM.key_id: SWARM.preamble_key}
            gate = PreambleGate(IDENTITIES[False].peer_id, keys.get, opened_at=STARTED_AT)
            connection, _ = await acceptor_end(connections, gate)
            context = self.credentials.contexts.server
        return await open_stream_link(
            connection,
            context=context,
            is_dialer=self.is_dialer,
            authenticate=lambda tls: authenticate(
                tls, expected=self.peer_id, is_allowed=lambda _: True
            ),
            kind=LinkKind.PUNCHED,
            handshake_s=ECHO_S,
        )

    async def _echo(self, link: Link) -> dict[str, Any]:
        async with asyncio.timeout(ECHO_S):
            await link.send(Frame(message=Beat(body=b"from here")))
            frame = await link.receive()
        # Neither may go before both have heard.
        await link.aclose()
        return {"kind": link.kind.value, "has_echo": isinstance(frame.message, Beat)}


def say(what: dict[str, Any]) -> None:
    """One line to whoever gives the orders."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def hear() -> dict[str, Any]:
    """One line from them; none is the end."""
    line = await asyncio.to_thread(sys.stdin.readline)
    if not line:
        raise EOFError
    heard: dict[str, Any] = json.loads(line)
    return heard


async def obey(node: Node) -> None:
    """Do what is ordered until nobody gives orders any more."""
    while True:
        order = await hear()
        do = order.pop("do")
        try:
            match do:
                case "observe":
                    say(await node.observe(**order))
                case "webrtc":
                    say(await node.webrtc(**order))
                case _:
                    say(await node.meet(do, **order))
        except (TransportError, OSError) as error:
            say({"failed": repr(error)})


if __name__ == "__main__":
    with suppress(EOFError):
        uvloop.run(obey(Node(is_dialer=sys.argv[1] == "dialer")))
