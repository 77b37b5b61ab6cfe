"""One member of a group in a process of its own, and the other end of its pipes.

    python -m benchmarks.group_nodes SEED SWARM HOST

A mesh that listens on HOST, lanes agreed over its links, and a compute thread that adds up. SEED is
the identity in hex, SWARM the swarm's state in JSON. It reads commands and answers each, one JSON
object a line:

    {"peers": {ID: ADDRESS}}                     where others are
    {"rank": 0, "members": [ID, ...], "kinds": ["tls"], "spin_s": ..., "forms_ring": false}
                                                 be this one; answered when its lanes are open
    {"values": 2048, "calls": 500}               add up so often; answered with seconds of each

It ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Self

import numpy as np

from covey.node.group.all_reduce import AllReduce
from covey.node.group.choosing import GroupLink
from covey.transport.identity import Identity
from covey.transport.lane.lane import Lane, LaneKind
from covey.transport.lane.opening import Lanes
from covey.transport.lane.waiting import SPIN_S
from covey.transport.membership import Swarm
from covey.transport.mesh import Mesh

HUB_IDX = 0
PURPOSE = b"benchmark"
LANES_S = 30.0
#: Latency free and bytes dear: what a hub must believe so that it always wants a ring.
FOR_A_RING = GroupLink(latency_s=1e-9, bytes_per_s=1.0)


class NodeFailed(RuntimeError):
    """A process of a group ended before its time."""


# --- the process that asks ------------------------------------------------------------------------


class Node:
    """A running member; `end` ends it."""

    def __init__(self, swarm: Swarm, host: str, *, prefix: Sequence[str] = ()) -> None:
        """Start it; does not wait.

        Args:
            swarm: whose member it is.
            host: the address it listens on.
            prefix: what to put before its command.
        """
        self._identity = Identity.generate()
        facts = [self._identity.seed.hex(), json.dumps(swarm.to_dict()), host]
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "benchmarks.group_nodes", *facts],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            start_new_session=True,  # Ctrl-C is for us; it ends with its input
        )

    @property
    def peer_id(self) -> str:
        """Who it is."""
        return self._identity.peer_id

    def tell(self, **command: object) -> None:
        """Give it a command, which it answers."""
        if self._process.stdin is None:
            raise ValueError("a node without pipes")
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise NodeFailed("a member of the group has ended; see above") from error

    def answer(self) -> Any:
        """What it says next. Raises NodeFailed."""
        if self._process.stdout is None:
            raise ValueError("a node without pipes")
        line = self._process.stdout.readline()
        if not line:
            raise NodeFailed("a member of the group has ended; see above")
        return json.loads(line)

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.communicate()


@dataclass(frozen=True, slots=True)
class Place:
    """Where one member runs: the address it listens on, and what goes before its command."""

    host: str = "127.0.0.1"
    prefix: Sequence[str] = ()


class Group:
    """A group of processes, the first of them the hub; `with` starts and ends them."""

    def __init__(
        self,
        places: Sequence[Place],
        *,
        kinds: Sequence[LaneKind],
        spin_s: float = SPIN_S,
        forms_ring: bool = False,
    ) -> None:
        """Does nothing yet.

        Args:
            places: of each member.
            kinds: of lanes that may be used.
            spin_s: how long a member looks before it sleeps.
            forms_ring: whether they always add up in a ring.
        """
        self._places = places
        self._facts = {"kinds": list(kinds), "spin_s": spin_s, "forms_ring": forms_ring}
        self._nodes: list[Node] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Start the processes and open their lanes. Raises NodeFailed."""
        with ExitStack() as stack:
            swarm = Swarm.create(Identity.generate().peer_id)
            for place in self._places:
                node = Node(swarm, place.host, prefix=place.prefix)
                stack.callback(node.end)
                self._nodes.append(node)
            addresses = [node.answer() for node in self._nodes]
            ids = [node.peer_id for node in self._nodes]
            self._ask_all([{"peers": dict(zip(ids, addresses, strict=True))}] * len(ids))
            roles = [{"rank": rank, "members": ids, **self._facts} for rank in range(len(ids))]
            self._ask_all(roles)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes."""
        self._stack.close()

    def seconds(self, n_values: int, n_calls: int) -> float:
        """The median call, at the member where that is longest. Raises NodeFailed."""
        command = {"values": n_values, "calls": n_calls}
        answers: list[list[float]] = self._ask_all([command] * len(self._nodes))
        return max(median(answer) for answer in answers)

    def _ask_all(self, commands: Sequence[Mapping[str, object]]) -> list[Any]:
        for node, command in zip(self._nodes, commands, strict=True):
            node.tell(**command)
        return [node.answer() for node in self._nodes]


# --- the process of a member ----------------------------------------------------------------------


class Member:
    """Carries out what it is told."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._all_reduce: AllReduce | None = None
        self._epoch = 0

    async def obey(self) -> None:
        """Read commands until the input ends."""
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            command: dict[str, Any] = json.loads(line)
            if "peers" in command:
                for peer_id, address in command["peers"].items():
                    self._mesh.learn(peer_id, [address])
                _say(None)
            elif "members" in command:
                await self._join(command)
                _say(None)
            else:
                # Not on the loop's thread, as in a node.
                n_values, n_calls = command["values"], command["calls"]
                _say(await loop.run_in_executor(None, self._add_up, n_values, n_calls))

    async def _join(self, role: dict[str, Any]) -> None:
        rank, members = role["rank"], role["members"]
        lanes = Lanes(self._mesh, kinds=role["kinds"], spin_s=role["spin_s"])
        neighbours = _neighbours(rank, len(members), forms_ring=role["forms_ring"])

        async def lane_to(other: int) -> Lane:
            if rank < other:
                return await lanes.open(members[other], PURPOSE, timeout_s=LANES_S)
            return await lanes.accept(members[other], PURPOSE, timeout_s=LANES_S)

        opened = await asyncio.gather(*(lane_to(other) for other in neighbours))
        self._all_reduce = AllReduce(
            rank,
            HUB_IDX,
            dict(zip(neighbours, opened, strict=True)),
            "fp16",
            n_members=len(members),
            link=FOR_A_RING if role["forms_ring"] else None,
            spin_s=role["spin_s"],
        )

    def _add_up(self, n_values: int, n_calls: int) -> list[float]:
        if self._all_reduce is None:
            raise ValueError("this member has no role yet")
        self._epoch += 1
        partial = np.full((1, n_values), 0.5, np.float32)
        taken: list[float] = []
        is_right = True
        for _ in range(n_calls):
            began_at = time.perf_counter()
            total = self._all_reduce.sum(partial, partial.shape, epoch=self._epoch)
            taken.append(time.perf_counter() - began_at)
            is_right &= total[0, -1] == 0.5 * self._all_reduce.n_members
        if not is_right:
            raise ValueError("a sum is wrong")
        return taken


def _neighbours(rank: int, n_members: int, *, forms_ring: bool) -> list[int]:
    """The ranks that this one has lanes to."""
    found = set(range(n_members)) if rank == HUB_IDX else {HUB_IDX}
    if forms_ring:
        found |= {(rank - 1) % n_members, (rank + 1) % n_members}
    return sorted(found - {rank})


def _say(what: object) -> None:
    print(json.dumps(what), flush=True)


async def _main(seed: str, state: str, host: str) -> None:
    identity, swarm = Identity(bytes.fromhex(seed)), Swarm.from_dict(json.loads(state))
    async with Mesh(identity, swarm, handler=lambda *_: None, listen=[(host, 0)]) as mesh:
        _say(mesh.addresses[0])
        await Member(mesh).obey()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
