"""A process that holds several whole nodes, for the lab of many; told what to do line by line.

The nodes are those of `covey up` and `covey join` without a model: real sockets, TLS and libp2p.
They share a process because importing everything takes a second and 60 MB each time.
A line in is {"id", "do", ...}, a line out {"id", ...} or {"id", "error"}.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import sys
import time
from contextlib import AsyncExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import uvloop

from covey.errors import CoveyError
from covey.node.config import NodeConfig
from covey.node.runtime import Node, running_node

FOUNDER = "node-0"
UP_S = 60.0  # a node that is not up by then has failed to join


class Nodes:
    """The nodes of this process, by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._nodes: dict[str, Node] = {}
        self._stacks: dict[str, AsyncExitStack] = {}

    async def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command."""
        match command:
            case {"do": "start", "name": str(name), "invite": invite}:
                return await self._start(name, invite)
            case {"do": "stop", "name": str(name)}:
                return await self._stop(name)
            case {"do": "invite", "name": str(name), "uses": int(uses)}:
                return {"invite": self._nodes[name].desk.invite(ttl_s=3600.0, uses=uses)}
            case {"do": "lookup", "name": str(name), "peer": str(peer)}:
                return await self._lookup(name, peer)
            case {"do": "announce", "name": str(name)}:
                await self._nodes[name].discovery.announce()
                return {}
            case {"do": "search", "name": str(name)}:
                await self._nodes[name].discovery.search()
                return {}
            case {"do": "status"}:
                return self._status()
        raise ValueError(f"no such command: {command}")

    async def aclose(self) -> None:
        """Stop all nodes, at once."""
        await asyncio.gather(*(self._stop(name) for name in list(self._nodes)))

    async def _start(self, name: str, invite: str | None) -> dict[str, Any]:
        """A node from nothing to a member that others can find."""
        started_at = time.perf_counter()
        config = NodeConfig(
            home=self._folder / name, name=name, host="127.0.0.1", mdns=False, grace_s=0.0
        )
        stack = self._stacks[name] = AsyncExitStack()
        async with asyncio.timeout(UP_S):
            context = running_node(config, invite=invite, may_found=name == FOUNDER)
            node = self._nodes[name] = await stack.enter_async_context(context)
            await node.discovery.announced.wait()
        return {"peer": node.peer_id, "took_s": time.perf_counter() - started_at}

    async def _stop(self, name: str) -> dict[str, Any]:
        del self._nodes[name]
        await self._stacks.pop(name).aclose()
        return {}

    async def _lookup(self, name: str, peer: str) -> dict[str, Any]:
        started_at = time.perf_counter()
        record = await self._nodes[name].control.plane.lookup(peer)
        took_s = time.perf_counter() - started_at
        return {"found": record is not None and record.peer_id == peer, "took_s": took_s}

    def _status(self) -> dict[str, Any]:
        return {
            "cpu_s": time.process_time(),
            "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "n_files": len(list(Path("/proc/self/fd").iterdir())),
            "nodes": {
                name: {
                    "peer": node.peer_id,
                    "live": sorted(node.live_peers()),
                    "links": len(node.mesh.peers),
                    "cards": len(node.views.members()),
                }
                for name, node in self._nodes.items()
            },
        }


async def serve(folder: Path) -> None:
    """Carry out the commands on stdin until it ends."""
    import_module("covey.transport.control_node")  # as the first node would
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    nodes = Nodes(folder)

    async def answer(line: bytes) -> None:
        command = json.loads(line)
        try:
            result = await nodes.do(command)
        except (CoveyError, TimeoutError) as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"id": command["id"], **result}), flush=True)

    print(json.dumps({"id": 0, "cpu_s": time.process_time()}), flush=True)
    try:
        async with asyncio.TaskGroup() as group:
            while line := await reader.readline():
                group.create_task(answer(line))
    finally:
        await nodes.aclose()


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s")
    uvloop.run(serve(Path(sys.argv[1])))
