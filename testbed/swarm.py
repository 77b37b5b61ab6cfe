"""Many whole nodes on this machine, a few to a process, from the side of whoever drives them.

`swarm_nodes.py` is the other end. The nodes live in the network namespace of the lab, whose
loopback carries nothing else, so that its counters are exactly what the swarm says, TCP/IP headers
and acknowledgements included.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .namespaces import LabBroken

COMMAND_S = 120.0
STOP_S = 30.0


@dataclass(eq=False)
class NodesProcess:
    """One process of nodes, at the other end of a pipe."""

    process: asyncio.subprocess.Process
    import_s: float = 0.0  # CPU before its first node
    names: list[str] = field(default_factory=list)  # of its nodes
    _waiting: dict[int, asyncio.Future[dict[str, Any]]] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _reading: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, homes: Path, log: Path) -> NodesProcess:
        """Start it and wait until it has imported what it needs.

        Args:
            homes: the folder of its nodes' homes, by name.
            log: where it may complain.
        """
        homes.mkdir(exist_ok=True)  # noqa: ASYNC240 - a folder in memory
        with log.open("a") as file:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "testbed.swarm_nodes", str(homes)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=file,
                limit=1 << 20,
            )
        nodes = cls(process)
        ready = nodes._waiting[0] = asyncio.get_running_loop().create_future()
        nodes._reading = asyncio.create_task(nodes._read())
        nodes.import_s = (await asyncio.wait_for(ready, COMMAND_S))["cpu_s"]
        return nodes

    async def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Have a command carried out; the answer holds an "error" if it failed.

        Raises:
            LabBroken: the process has ended, or does not answer.
        """
        if self.process.stdin is None or self.process.returncode is not None:
            raise LabBroken("a process of nodes has ended")
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        line = json.dumps({"id": number, "do": what, **arguments})
        self.process.stdin.write(line.encode() + b"\n")
        result: dict[str, Any]
        try:
            async with asyncio.timeout(COMMAND_S):
                result = await answer
                return result
        except TimeoutError as error:
            raise LabBroken(f"a process of nodes does not answer {what!r}") from error

    async def do(self, what: str, **arguments: Any) -> dict[str, Any]:
        """As `ask`, for what must not fail."""
        answer = await self.ask(what, **arguments)
        if "error" in answer:
            raise LabBroken(f"{what!r} failed: {answer['error']}")
        return answer

    async def stop(self) -> None:
        """End its nodes in good order, or at once if that takes long."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            async with asyncio.timeout(STOP_S):
                await self.process.wait()
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
                waiting.set_exception(LabBroken("a process of nodes has ended"))


class NodeSwarm:
    """The processes, and which node lives where."""

    def __init__(self, processes: Sequence[NodesProcess]) -> None:
        self.processes = list(processes)
        self.peers: dict[str, str] = {}  # name -> peer id
        self.where: dict[str, NodesProcess] = {}

    async def start_node(self, name: str, where: NodesProcess, invite: str | None) -> float | str:
        """Start a node; the seconds until it was announced, or why it did not come up."""
        answer = await where.ask("start", name=name, invite=invite)
        if "error" in answer:
            return str(answer["error"])
        self.peers[name], self.where[name] = answer["peer"], where
        where.names.append(name)
        return float(answer["took_s"])

    async def kill(self, process: NodesProcess) -> list[str]:
        """Kill a process; the names of the nodes that died with it."""
        await process.kill()
        self.processes.remove(process)
        for name in process.names:
            del self.where[name]
        return process.names

    async def statuses(self) -> list[dict[str, Any]]:
        """What every process says of itself."""
        return await asyncio.gather(*(process.do("status") for process in self.processes))

    async def views(self) -> dict[str, dict[str, Any]]:
        """What every node says of itself, by name."""
        return {
            name: node for status in await self.statuses() for name, node in status["nodes"].items()
        }

    async def cpu_s(self) -> float:
        """CPU seconds that all processes have used."""
        return float(sum(status["cpu_s"] for status in await self.statuses()))


@asynccontextmanager
async def running_processes(folder: Path, n_processes: int) -> AsyncIterator[NodeSwarm]:
    """A swarm without nodes yet; all its processes are gone afterwards."""
    processes = [
        await NodesProcess.start(folder / f"homes-{number}", folder / f"log-{number}")
        for number in range(n_processes)
    ]
    swarm = NodeSwarm(processes)
    try:
        yield swarm
    finally:
        await asyncio.gather(*(process.stop() for process in swarm.processes))


def loopback_bytes() -> int:
    """Bytes that were sent over this namespace's loopback, each counted once."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise LabBroken("this namespace has no loopback")
