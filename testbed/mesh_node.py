"""One member's links in a process of its own: `python -m testbed.mesh_node SEED SWARM PORT`.

A transport and nothing above it, so it starts fast. SEED is the identity in hex, SWARM the state of
the swarm in JSON, PORT what it listens on, on every address; with `maps-ports` after these it asks
its router to open it, which takes eight seconds where the router knows nothing of that. It reads
commands and writes what happens, one JSON object a line; `testbed.members` is the other end. It is
told what a node would learn from its swarm's document. Seconds count from the command to dial.

    {"do": "learn", "peer": ID, "card": {...}}   what a peer announces, as below
    {"do": "settle", "relays": {ID: HOST}}   link to these and find out the NAT; then "settled"
    {"do": "dial", "peer": ID}   then "first-byte" or "failed", and "path" at each change
    {"said": "ready" or "settled", "card": {"addresses": [...], "mapped": [...], "relays": [...]}}
    {"said": "first-byte" or "path", "peer": ID, "kind": ..., "s": ...}
    {"said": "failed", "peer": ID, "why": ..., "s": ...}
    {"said": "down", "peer": ID, "why": ...}

It ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Coroutine
from typing import Any

from covey.transport.errors import TransportError
from covey.transport.identity import Identity
from covey.transport.membership import Swarm
from covey.transport.mesh import Mesh
from covey.transport.peer import Peer
from covey.transport.reach import Reach

ANSWER_S = 20.0
SETTLE_S = 15.0  # to know the NAT and to hold a relay, where one is needed
LOOK_EVERY_S = 0.02


class Node:
    """Carries out what it is told."""

    def __init__(self, mesh: Mesh, reach: Reach) -> None:
        self._mesh = mesh
        self._reach = reach
        self._dialled_at: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        mesh.on_path(self._say_path)

    async def obey(self) -> None:
        """Read commands until the input ends."""
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
        )
        say("ready", card=self.card())
        while line := await reader.readline():
            command: dict[str, Any] = json.loads(line)
            match command["do"]:
                case "learn":
                    card = command["card"]
                    self._mesh.learn(
                        command["peer"],
                        [*card["addresses"], *card["mapped"]],
                        mapped=card["mapped"],
                        relays=card["relays"],
                    )
                case "settle":
                    self._spawn(self._settle(command["relays"]))
                case "dial":
                    self._dialled_at[command["peer"]] = time.perf_counter()
                    self._spawn(self._dial(command["peer"]))
                case unknown:
                    raise ValueError(f"no command is called {unknown!r}")

    def card(self) -> dict[str, object]:
        """What it would announce to its swarm now."""
        reach = self._reach
        return {
            "addresses": self._mesh.addresses,
            "mapped": reach.mapped_addresses,
            "relays": reach.relays,
        }

    async def _settle(self, relays: dict[str, str | None]) -> None:
        try:
            for relay in relays:
                await self._mesh.peer(relay)
            facts = await self._reach.nat.refresh()
        except TransportError as error:
            say("failed", peer="", why=str(error), s=0.0)
            return
        self._reach.see(relays)
        deadline = time.monotonic() + SETTLE_S
        while not (self._reach.is_reachable or self._reach.relays):
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(LOOK_EVERY_S)
        say("settled", card=self.card(), nat=str(facts))

    async def _dial(self, peer_id: str) -> None:
        try:
            peer = await self._mesh.peer(peer_id)
            await peer.ping(timeout_s=ANSWER_S)
        except TransportError as error:
            say("failed", peer=peer_id, why=str(error), s=self._since_dialled(peer_id))
        else:
            say("first-byte", peer=peer_id, kind=peer.kind.value, s=self._since_dialled(peer_id))

    def _say_path(self, peer: Peer) -> None:
        if peer.peer_id in self._dialled_at:
            since = self._since_dialled(peer.peer_id)
            say("path", peer=peer.peer_id, kind=peer.kind.value, s=since)

    def _since_dialled(self, peer_id: str) -> float:
        return time.perf_counter() - self._dialled_at[peer_id]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def say(what: str, **facts: object) -> None:
    """Tell the lab."""
    print(json.dumps({"said": what, **facts}), flush=True)


async def main(seed: str, state: str, port: str, *options: str) -> None:
    """Listen, and do as told."""
    identity, swarm = Identity(bytes.fromhex(seed)), Swarm.from_dict(json.loads(state))
    listen = [("0.0.0.0", int(port))]  # noqa: S104 - the lab's hosts have no other network
    down: list[Reach] = []

    def on_down(peer_id: str, error: TransportError) -> None:
        for reach in down:
            reach.link_down(peer_id)
        say("down", peer=peer_id, why=str(error))

    async with (
        Mesh(
            identity, swarm, handler=lambda peer, frame: None, listen=listen, on_down=on_down
        ) as mesh,
        Reach(mesh, swarm, maps_ports="maps-ports" in options) as reach,
    ):
        down.append(reach)
        await Node(mesh, reach).obey()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
