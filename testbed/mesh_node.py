"""One member's links in a process of its own: `python -m testbed.mesh_node SEED SWARM PORT`.

A transport and nothing above it, so it starts fast. SEED is the identity in hex, SWARM the state of
the swarm in JSON, PORT what it listens on, on every address. It reads commands and writes what
happens, one JSON object a line; `testbed.members` is the other end. Seconds count from the command.

    {"do": "learn", "peer": ID, "addresses": [...], "relays": [ID, ...]}   where a peer may be found
    {"do": "see", "relays": {ID: HOST, ...}}   members that relay and can be dialled
    {"do": "dial", "peer": ID}   answered by "first-byte" or "failed", then "path" at each change
    {"said": "ready", "peer": ID, "addresses": [...]}
    {"said": "reach", "peer": ID, "udp": KIND, "tcp": KIND, "is_reachable": ..., "relays": [ID]}
    {"said": "up", "peer": ID, "kind": ...}, {"said": "down", "peer": ID, "why": ...}
    {"said": "first-byte", "peer": ID, "kind": ..., "s": ...}
    {"said": "path", "peer": ID, "kind": ..., "s": ...}   and the next two while the link is watched
    {"said": "failed", "peer": ID, "why": ..., "s": ...}

It ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from covey.transport.errors import TransportError
from covey.transport.identity import Identity
from covey.transport.membership import Swarm
from covey.transport.mesh import Mesh
from covey.transport.peer import Peer
from covey.transport.reach import Reach

ANSWER_S = 20.0
WATCH_EVERY_S = 0.005


class Node:
    """Carries out what it is told."""

    def __init__(self, mesh: Mesh, reach: Reach) -> None:
        self._mesh = mesh
        self._reach = reach
        self._tasks: set[asyncio.Task[None]] = set()

    async def obey(self) -> None:
        """Read commands until the input ends."""
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
        )
        while line := await reader.readline():
            command: dict[str, Any] = json.loads(line)
            match command["do"]:
                case "learn":
                    peer_id, addresses = command["peer"], command["addresses"]
                    self._mesh.learn(peer_id, addresses, relays=command["relays"])
                case "see":
                    self._reach.see(command["relays"])
                case "dial":
                    task = asyncio.create_task(self._dial(command["peer"], time.perf_counter()))
                    self._tasks.add(task)
                case unknown:
                    raise ValueError(f"no command is called {unknown!r}")

    async def _dial(self, peer_id: str, began_at: float) -> None:
        try:
            peer = await self._mesh.peer(peer_id)
            await peer.ping(timeout_s=ANSWER_S)
        except TransportError as error:
            say("failed", peer_id, why=str(error), s=time.perf_counter() - began_at)
            return
        kind = peer.kind
        say("first-byte", peer_id, kind=kind.value, s=time.perf_counter() - began_at)
        while peer.error is None:
            await asyncio.sleep(WATCH_EVERY_S)
            if peer.kind is not kind:
                kind = peer.kind
                say("path", peer_id, kind=kind.value, s=time.perf_counter() - began_at)


def say(what: str, peer_id: str, **facts: object) -> None:
    """Tell the lab."""
    print(json.dumps({"said": what, "peer": peer_id, **facts}), flush=True)


def _say_up(peer: Peer) -> None:
    say("up", peer.peer_id, kind=peer.kind.value)


def _say_reach(reach: Reach) -> None:
    facts = reach.facts
    if facts.n_observers:
        say(
            "reach",
            reach.peer_id,
            udp=facts.udp.value,
            tcp=facts.tcp.value,
            is_reachable=reach.is_reachable,
            relays=reach.relays,
        )


def _say_down(peer_id: str, error: TransportError) -> None:
    say("down", peer_id, why=str(error))


async def main(seed: str, state: str, port: str) -> None:
    """Listen, and do as told."""
    identity, swarm = Identity(bytes.fromhex(seed)), Swarm.from_dict(json.loads(state))
    async with Mesh(
        identity,
        swarm,
        handler=lambda peer, frame: None,
        listen=[("0.0.0.0", int(port))],  # noqa: S104 - the lab's hosts have no other network
        on_up=_say_up,
        on_down=_say_down,
    ) as mesh:
        reach = Reach(mesh, swarm, on_change=lambda: _say_reach(reach))
        async with reach:
            say("ready", mesh.peer_id, addresses=mesh.addresses)
            await Node(mesh, reach).obey()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
