"""A relay in a process of its own, to be killed: `python relay_process.py SEED SWARM`.

SEED is the identity in hex, SWARM the state of the swarm in JSON. Prints its address and waits.
"""

from __future__ import annotations

import asyncio
import json
import sys

from covey.transport.identity import Identity
from covey.transport.membership import Swarm
from covey.transport.mesh import Mesh
from covey.transport.messages import RelayDeclined, RelayOpen
from covey.transport.relay.server import RelayServer


async def main(seed: str, state: str) -> None:
    identity, swarm = Identity(bytes.fromhex(seed)), Swarm.from_dict(json.loads(state))
    async with Mesh(identity, swarm, handler=lambda peer, frame: None) as mesh:
        server = RelayServer(identity.peer_id, lambda: mesh.peers)
        mesh.serve(RelayOpen, server.on_open)
        mesh.serve(RelayDeclined, server.on_declined)
        mesh.add_door(server)
        print(mesh.addresses[0], flush=True)  # noqa: T201 - how its parent learns the port
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
