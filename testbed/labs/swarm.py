"""Fifty whole nodes on this machine: joining, finding each other, idling, dying, coming back.

Each has sockets, TLS and libp2p of its own, and no model; they run ten to a process, since to
import everything takes a second and 60 MB each time.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from benchmarks.rows import Row

from testbed.namespaces import LabBroken
from testbed.swarm import NodesProcess, NodeSwarm, loopback_bytes, running_processes

N_PROCESSES = 5
N_JOINING = 3  # at once; two cores have no use for more
KNOWN_S = 60.0
FORGOTTEN_S = 120.0
BACK_S = 60.0
LOOK_S = 0.5
N_ANNOUNCING = 4  # at once
# Of `node/discovery.py`: what a node does so seldom that no idle minute of the lab would show it.
ANNOUNCE_S, SEARCH_S = 1500.0, 3600.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """How many, how long."""
    parser.add_argument("--nodes", type=int, default=50)
    parser.add_argument("--settle", type=float, default=60.0, help="seconds before the idle ones")
    parser.add_argument("--idle", type=float, default=120.0, help="seconds of idling")
    parser.add_argument("--lookups", type=int, default=200)


def measure(folder: Path, options: argparse.Namespace) -> Sequence[Row]:
    """One swarm, from its founder to its last survivor."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    return asyncio.run(_measure(folder, options))


async def _measure(folder: Path, options: argparse.Namespace) -> list[Row]:
    async with running_processes(folder, N_PROCESSES) as swarm:
        rows = await _join(swarm, options.nodes)
        rows += await _idle(swarm, options.settle, options.idle)
        rows += await _look_up(swarm, options.lookups, "")
        founders = swarm.processes[0]
        rows += await _kill(swarm, founders)
        rows += await _look_up(swarm, options.lookups // 4, ", a fifth of the swarm killed", None)
        rows += await _come_back(folder, swarm, founders.names[-1])
    return rows


async def _join(swarm: NodeSwarm, n_nodes: int) -> list[Row]:
    founder = swarm.processes[0]
    await swarm.start_node("node-0", founder, None)
    invite = (await founder.do("invite", name="node-0", uses=n_nodes))["invite"]
    limit = asyncio.Semaphore(N_JOINING)

    async def join(number: int) -> float | str:
        async with limit:
            where = swarm.processes[number % len(swarm.processes)]
            return await swarm.start_node(f"node-{number}", where, invite)

    cpu_s, nbytes, began_at = await swarm.cpu_s(), loopback_bytes(), time.monotonic()
    joins = await asyncio.gather(*(join(number) for number in range(1, n_nodes)))
    took_s = time.monotonic() - began_at
    joined = [result for result in joins if not isinstance(result, str)]
    for why in {result for result in joins if isinstance(result, str)}:
        print(f"a join failed: {why}")
    known_s = await _until(lambda: _everybody_knows(swarm), KNOWN_S)
    cpu_s, nbytes = await swarm.cpu_s() - cpu_s, loopback_bytes() - nbytes
    processes = swarm.processes
    return [
        Row(f"{n_nodes} nodes: joins a second", len(joined) / took_s, 1.0, "at least"),
        Row(f"{n_nodes} nodes: joins that failed", len(joins) - len(joined), 0),
        Row("CPU seconds per join, of the whole swarm", cpu_s / max(1, len(joined))),
        Row("CPU seconds to import, per process", statistics.mean(p.import_s for p in processes)),
        Row("seconds from invite to announced, p95", _p95(joined)),
        Row("seconds until everybody knows everybody, after the last join", known_s),
        Row("KB sent per join, by the whole swarm", nbytes / max(1, len(joined)) / 1e3),
    ]


async def _idle(swarm: NodeSwarm, settle_s: float, idle_s: float) -> list[Row]:
    await asyncio.sleep(settle_s)
    n_nodes = len(swarm.peers)
    cpu_s, nbytes, began_at = await swarm.cpu_s(), loopback_bytes(), time.monotonic()
    n_missing = 0
    while time.monotonic() - began_at < idle_s:
        await asyncio.sleep(min(idle_s, 10.0))
        views = await swarm.views()
        n_missing = max(n_missing, *(n_nodes - len(node["live"]) for node in views.values()))
    took_s = time.monotonic() - began_at
    cpu_s, quiet = await swarm.cpu_s() - cpu_s, (loopback_bytes() - nbytes) / n_nodes / took_s
    announce = await _bytes_each(swarm, "announce") / ANNOUNCE_S
    search = await _bytes_each(swarm, "search") / SEARCH_S
    sent = quiet + announce + search
    statuses = await swarm.statuses()
    return [
        # What one sends another receives, so that on average they are equal.
        Row("an idle node: bytes sent a second, headers and all", sent, 1000),
        Row("an idle node: bytes sent and received a second", 2 * sent, 1000),
        Row("of the bytes sent: links, beats, store, between announcements", quiet),
        Row(f"of the bytes sent: DHT announcement every {ANNOUNCE_S:g} s", announce),
        Row(f"of the bytes sent: DHT search every {SEARCH_S:g} s", search),
        Row("an idle node: percent of a core", 100 * cpu_s / took_s / n_nodes),
        Row("an idle node: MB", sum(s["rss_bytes"] for s in statuses) / n_nodes / 1e6),
        Row("an idle node: open files", sum(s["n_files"] for s in statuses) / n_nodes),
        Row("members wrongly taken for dead while idle", n_missing, 0),
    ]


async def _bytes_each(swarm: NodeSwarm, what: str) -> float:
    """Bytes that the swarm sends when a node does something, mean over all nodes."""
    limit = asyncio.Semaphore(N_ANNOUNCING)

    async def do(name: str, where: NodesProcess) -> None:
        async with limit:
            await where.do(what, name=name)

    nbytes = loopback_bytes()
    await asyncio.gather(*(do(name, where) for name, where in swarm.where.items()))
    return (loopback_bytes() - nbytes) / len(swarm.where)


async def _look_up(
    swarm: NodeSwarm, n_lookups: int, when: str, target_s: float | None = 1.0
) -> list[Row]:
    rng = random.Random(n_lookups)  # noqa: S311 - the same pairs each time
    took_s: list[float] = []
    n_missed = 0
    for _ in range(n_lookups):
        asking, wanted = rng.sample(sorted(swarm.where), 2)
        answer = await swarm.where[asking].do("lookup", name=asking, peer=swarm.peers[wanted])
        took_s.append(answer["took_s"])
        n_missed += not answer["found"]
    return [
        Row(f"lookup of a member{when}: seconds, p50", statistics.median(took_s)),
        Row(f"lookup of a member{when}: seconds, p95", _p95(took_s), target_s),
        Row(f"lookups of a member{when} that found nothing", n_missed, 0),
    ]


async def _kill(swarm: NodeSwarm, process: NodesProcess) -> list[Row]:
    gone = {swarm.peers[name] for name in await swarm.kill(process)}

    async def is_forgotten() -> bool:
        views = await swarm.views()
        return not any(gone & set(node["live"]) for node in views.values())

    name = f"seconds until nobody believes {len(gone)} killed members alive"
    return [Row(name, await _until(is_forgotten, FORGOTTEN_S))]


async def _come_back(folder: Path, swarm: NodeSwarm, name: str) -> list[Row]:
    """A member that was killed starts again, while the one that invited it is gone."""
    process = await NodesProcess.start(folder / "homes-0", folder / "log-0")
    swarm.processes.append(process)
    began_at = time.monotonic()
    result = await swarm.start_node(name, process, None)
    if isinstance(result, str):
        raise LabBroken(f"a member did not come back: {result}")
    alive = {swarm.peers[other] for other in swarm.where}

    async def is_back() -> bool:
        views = await swarm.views()
        return alive <= set(views[name]["live"]) and bool(views[name]["links"])

    await _until(is_back, BACK_S)
    figure = "seconds until a member is back in the swarm, who invited it gone"
    return [Row(figure, time.monotonic() - began_at)]


async def _everybody_knows(swarm: NodeSwarm) -> bool:
    everybody = set(swarm.peers.values())
    views = await swarm.views()
    return all(
        set(node["live"]) == everybody and node["cards"] == len(everybody)
        for node in views.values()
    )


async def _until(is_so: Callable[[], Awaitable[bool]], deadline_s: float) -> float:
    """Seconds until something is so; the deadline if it does not become so."""
    began_at = time.monotonic()
    while not await is_so():
        if time.monotonic() - began_at > deadline_s:
            return deadline_s
        await asyncio.sleep(LOOK_S)
    return time.monotonic() - began_at


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1))] if values else float("nan")
