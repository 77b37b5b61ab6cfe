"""A swarm of many whole nodes on this machine: joining, finding each other, idling, dying.

Every node has sockets, TLS and libp2p of its own and no model. They run several to a process,
inside a network namespace whose loopback carries nothing else, so that its counters are exactly
what the swarm says, TCP/IP headers and acknowledgements included.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

N_NODES = 50
N_PROCESSES = 5
N_JOINING = 4  # at once: two cores have no use for more
SETTLE_S = 90.0
IDLE_S = 120.0
N_LOOKUPS = 200
COMMAND_S = 120.0
FORGET_S = 240.0


class SwarmFailed(RuntimeError):
    """A process of nodes ended or does not answer."""


@dataclass(eq=False)
class NodesProcess:
    """One process of nodes, at the other end of a pipe."""

    process: asyncio.subprocess.Process
    names: list[str] = field(default_factory=list)
    import_s: float = 0.0  # CPU before its first node
    _waiting: dict[int, asyncio.Future[dict[str, Any]]] = field(default_factory=dict)
    _numbers: Any = field(default_factory=lambda: itertools.count(1))
    _reading: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, folder: Path, number: int) -> NodesProcess:
        """Start it and wait until it has imported what it needs."""
        home = folder / f"process-{number}"
        home.mkdir()
        with (home / "log").open("w") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "testbed.swarm_nodes", str(home)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=1 << 20,
            )
        nodes = cls(process)
        ready = nodes._waiting[0] = asyncio.get_running_loop().create_future()
        nodes._reading = asyncio.create_task(nodes._read())
        nodes.import_s = (await asyncio.wait_for(ready, COMMAND_S))["cpu_s"]
        return nodes

    async def do(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Have a command carried out; the answer may hold an "error"."""
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        line = json.dumps({"id": number, "do": what, **arguments})
        if self.process.stdin is None or self.process.returncode is not None:
            raise SwarmFailed("a process of nodes has ended")
        self.process.stdin.write(line.encode() + b"\n")
        return await asyncio.wait_for(answer, COMMAND_S)

    async def stop(self) -> None:
        """End its nodes in good order, or at once if that takes long."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), 30.0)
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """End it as a power cut would."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    async def _read(self) -> None:
        while self.process.stdout is not None and (line := await self.process.stdout.readline()):
            answer = json.loads(line)
            waiting = self._waiting.pop(answer["id"], None)
            if waiting is not None and not waiting.done():
                waiting.set_result(answer)
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(SwarmFailed("a process of nodes has ended"))
