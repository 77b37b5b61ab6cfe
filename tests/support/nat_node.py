"""A member in a process of its own, for labs: `python nat_node.py SPEC`, a JSON object.

With `peers` it links to them, finds out its NAT facts and prints them, a JSON line for each round;
otherwise it prints its peer id. Then it waits until stdin closes, and prints what changes.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from typing import Any

import msgspec

from covey.transport.errors import LinkTimeout, TransportError
from covey.transport.identity import Identity
from covey.transport.membership import Swarm
from covey.transport.mesh import Mesh
from covey.transport.nat.facts import NatFacts
from covey.transport.nat.service import NatService


async def main(spec: dict[str, Any]) -> None:
    identity, swarm = Identity(bytes.fromhex(spec["seed"])), Swarm.from_dict(spec["swarm"])
    listen = [(host, spec["port"]) for host in spec["listen"]]
    async with Mesh(identity, swarm, handler=lambda peer, frame: None, listen=listen) as mesh:
        service = NatService(mesh, swarm, maps_ports=spec.get("maps_ports", False))

        def tell(facts: NatFacts) -> None:
            card = msgspec.to_builtins(facts.to_card(now=facts.measured_at))
            steps = [[step.test, step.observer, step.outcome] for step in service.steps]
            said = {
                "id": identity.peer_id,
                "facts": card,
                "steps": steps,
                "mapping": service.mapping_reason,
            }
            print(json.dumps(said), flush=True)  # noqa: T201 - how its parent learns it

        async with service:
            for peer_id, address in spec.get("peers", []):
                mesh.learn(peer_id, [address])
                await mesh.peer(peer_id)
            if spec.get("peers"):
                tell(await service.refresh())
            else:
                print(json.dumps({"id": identity.peer_id}), flush=True)  # noqa: T201
            service._on_change = tell
            relinking = asyncio.create_task(relink(mesh, spec.get("peers", [])))
            await asyncio.to_thread(sys.stdin.read)
            relinking.cancel()


async def relink(mesh: Mesh, peers: list[tuple[str, str]]) -> None:
    """Keep the links up, as a node would: one that does not answer is made anew."""
    while True:
        await asyncio.sleep(0.5)
        for peer_id, _ in peers:
            with suppress(TransportError):
                peer = await mesh.peer(peer_id)
                try:
                    await peer.ping(timeout_s=2)
                except LinkTimeout as error:
                    peer.abort(error)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
