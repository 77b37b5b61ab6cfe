"""The seam between asyncio and trio under fire: real control planes, called, cancelled and killed.

`python -m support.soak --seconds 600` is what `make soak` runs; the tests run it for five seconds.
Episode after episode a control plane starts, several tasks call it at random, cancel themselves at
random and have it raise things, and then it dies, in one of several ways, in the middle of all
this. Afterwards nothing of it may be left: no task, no thread, no future, no descriptor; and no
call may ever have taken longer than its own deadline.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from covey.transport.control import ControlError, ControlPlane, PeerRecord, RecordRejected
from covey.transport.identity import Identity

SWARM = "meadow2026"
PSK = bytes(range(32))
N_CALLERS = 8
EPISODE_S = (1.0, 3.0)
CALM_S = 8.0  # what libp2p takes to let go of a connection that has ended
LONGEST_CALL_S = 32.0  # `DISCOVER_DEADLINE_S` and a moment
FUTURES_SLACK = 20  # of the loop itself, and of what ends a moment later


class Mischief(Exception):
    """What a call may raise on the trio side."""


@dataclass
class Findings:
    """What a soak has seen."""

    outcomes: Counter[str] = field(default_factory=Counter)
    deaths: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    faults: list[str] = field(default_factory=list)
    n_episodes: int = 0


async def soak(seconds: float, *, seed: int) -> Findings:
    """Run episodes for `seconds`, the last one to its end."""
    found, rng = Findings(), random.Random(seed)
    until = time.monotonic() + seconds
    async with _plane(1) as host:
        await host.announce(_record(host, 1))
        await _episode(host, rng, found)  # imports, caches and pools come with the first
        before = _possessions()
        while time.monotonic() < until:
            await _episode(host, rng, found)
            await _nothing_is_left(before, found)
        await _trio_side_is_calm(host, found)
    if threads := _threads():
        found.faults.append(f"threads are left: {threads}")
    return found


async def _episode(host: ControlPlane, rng: random.Random, found: Findings) -> None:
    found.n_episodes += 1
    plane = _plane(2)
    if rng.random() < 0.1:  # it dies before it lives
        found.deaths["cancelled while it started"] += 1
        starting = asyncio.ensure_future(plane.start())
        await asyncio.sleep(rng.random() * 0.05)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await plane.aclose()
        return
    await plane.start()
    await plane.bootstrap(host.addresses)
    callers = [
        asyncio.ensure_future(_call_for_ever(plane, host, random.Random(rng.random()), found))
        for _ in range(N_CALLERS)
    ]
    await asyncio.sleep(rng.uniform(*EPISODE_S))
    way = rng.choice(("closed", "closed by two", "crashed", "callers cancelled, then closed"))
    found.deaths[way] += 1
    if way == "crashed":
        with suppress(ControlError):
            await plane._call("crash", 5.0, _crash)
        if await plane.wait_closed() is None:
            found.faults.append("a crash was not reported")
    elif way == "closed by two":
        await asyncio.gather(plane.aclose(), plane.aclose())
    elif way == "closed":
        await plane.aclose()
    for caller in callers:
        caller.cancel()
    ended, hung = await asyncio.wait(callers, timeout=LONGEST_CALL_S)
    found.faults += ["a call hangs after the end of its control plane"] * len(hung)
    found.faults += [repr(c.exception()) for c in ended if not c.cancelled() and c.exception()]
    await plane.aclose()
    if plane._thread is None or plane._thread._jobs:
        found.faults.append("calls are still counted after all have ended")


async def _call_for_ever(
    plane: ControlPlane, host: ControlPlane, rng: random.Random, found: Findings
) -> None:
    while True:
        name, call = rng.choice(_calls(plane, host, rng))
        began_at = time.monotonic()
        outcome = await _outcome(call, rng)
        found.longest_s = max(found.longest_s, time.monotonic() - began_at)
        found.outcomes[f"{name}: {outcome}"] += 1
        if time.monotonic() - began_at > LONGEST_CALL_S:
            found.faults.append(f"{name} took {time.monotonic() - began_at:.1f} s")
        await asyncio.sleep(0)


async def _outcome(call: Callable[[], Awaitable[Any]], rng: random.Random) -> str:
    """Await a call, or cancel it after a moment; what became of it, in a word."""
    task = asyncio.ensure_future(call())
    try:
        if rng.random() < 0.5:
            await asyncio.wait({task}, timeout=rng.choice((0.0, 0.001, 0.01, 0.1)))
            task.cancel()
        await task
    except asyncio.CancelledError:
        this = asyncio.current_task()
        if this is not None and this.cancelling():  # it was we, or both
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise
        return "cancelled"
    except RecordRejected:
        return "refused"
    except ControlError as error:
        if isinstance(error.__cause__, Mischief):
            return "mischief"
        return "late" if "took longer" in str(error) else "failed"
    return "done"


def _calls(
    plane: ControlPlane, host: ControlPlane, rng: random.Random
) -> list[tuple[str, Callable[[], Awaitable[Any]]]]:
    stranger = Identity(bytes(31) + bytes([rng.randrange(100, 200)])).peer_id
    deaf = f"/ip4/127.0.0.1/tcp/9/p2p/{stranger}"
    deadline_s = rng.choice((0.0, 0.001, 0.05))

    async def nothing(_: object) -> int:
        return 42

    async def mischief(_: object) -> None:
        await trio.sleep(rng.choice((0, 0.01)))
        raise rng.choice((Mischief("no"), ExceptionGroup("", [Mischief("no")])))

    async def refuse(_: object) -> None:
        raise RecordRejected("it is Tuesday")

    async def stubborn(_: object) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.02)

    return [
        ("lookup", lambda: plane.lookup(host.peer_id)),
        ("lookup in vain", lambda: plane.lookup(stranger)),
        ("discover", plane.discover),
        ("announce", lambda: plane.announce(_record(plane, time.time_ns() // 1000))),
        ("announce anew", lambda: plane.announce(_record(plane, 1))),
        ("bootstrap", lambda: plane.bootstrap((*host.addresses, deaf, "nonsense"))),
        ("mode", lambda: plane.set_reachable(is_reachable=rng.random() < 0.5)),
        ("nothing", lambda: plane._call("nothing", 5.0, nothing)),
        ("mischief", lambda: plane._call("mischief", 5.0, mischief)),
        ("refuse", lambda: plane._call("refuse", 5.0, refuse)),
        ("stubborn", lambda: plane._call("stubborn", deadline_s, stubborn)),
    ]


async def _crash(_: object) -> None:
    async def burst() -> None:
        raise KeyError("burst pipe")

    trio.lowlevel.spawn_system_task(burst)
    await trio.sleep_forever()


async def _nothing_is_left(before: Counter[str], found: Findings) -> None:
    """Compare what this process owns with what it owned, once things have had time to end."""
    until = time.monotonic() + CALM_S
    while True:
        after = _possessions()
        more = {kind: n - before[kind] for kind, n in after.items()}
        is_clean = (
            more["tasks"] <= 0 and more["descriptors"] <= 0 and more["futures"] <= FUTURES_SLACK
        )
        if is_clean:
            return
        if time.monotonic() > until:
            found.faults.append(f"left over after an episode: {more}")
            before.update(more)  # name each loss once
            return
        await asyncio.sleep(0.2)


async def _trio_side_is_calm(host: ControlPlane, found: Findings) -> None:
    """The plane that has lived through it all has no more tasks than it began with."""

    async def n_calls(_: object) -> int:
        nursery = host._thread._nursery if host._thread is not None else None
        return len(nursery.child_tasks) if nursery is not None else -1

    n_here = await host._call("count", 5.0, n_calls)
    if n_here != 1:
        found.faults.append(f"{n_here - 1} calls never ended on the trio side")


def _possessions() -> Counter[str]:
    gc.collect()
    objects = gc.get_objects()
    return Counter(
        tasks=len(asyncio.all_tasks()),
        # Not `isinstance`: that asks an object for its class, which some of torch's answer noisily.
        futures=sum(issubclass(type(thing), asyncio.Future) for thing in objects),
        descriptors=len(list(Path("/proc/self/fd").iterdir())),
    )


def _plane(number: int) -> ControlPlane:
    return ControlPlane(private_key=bytes(31) + bytes([number]), psk=PSK, swarm=SWARM)


def _record(plane: ControlPlane, sequence: int) -> PeerRecord:
    return PeerRecord(
        peer_id=plane.peer_id,
        swarm=SWARM,
        addresses=("127.0.0.1:7070",),
        control_addresses=plane.addresses,
        sequence=sequence,
        expires_at=int(time.time()) + 3600,
    )


def _threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("covey")]


def main() -> int:
    """Soak for as long as was asked for; 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    options = parser.parse_args()
    sys.stdout.write(f"{options.seconds:g} s with --seed {options.seed}\n")
    found = asyncio.run(soak(options.seconds, seed=options.seed))
    for text, n in sorted((found.outcomes + found.deaths).items()):
        sys.stdout.write(f"{n:8} {text}\n")
    for fault in found.faults:
        sys.stdout.write(f"FAULT: {fault}\n")
    rows = [
        ("faults: hangs and leaks", len(found.faults), 0),
        ("episodes", found.n_episodes, None),
        ("calls", found.outcomes.total(), None),
        ("longest call, s", round(found.longest_s, 2), LONGEST_CALL_S),
    ]
    report = [
        {"figure": name, "value": value, "target": target, "met": target is None or value <= target}
        for name, value, target in rows
    ]
    missed = sum(not row["met"] for row in report)
    sys.stdout.write(json.dumps({"rows": report, "missed": missed}) + "\n")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
