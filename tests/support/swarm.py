"""Swarms of real node processes on loopback: started, looked at, and always ended."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covey.cli.child import NodeProcess, wait_for
from covey.client import Client, ClientError

MODEL = "smollm2"
N_BLOCKS = 30
PLAN_S = 90.0  # generous: the machine that runs tests does other things too
LOOPBACK = ("--host", "127.0.0.1", "--api-port", "0", "--no-mdns", "--threads", "1")


@dataclass(slots=True)
class Member:
    """One node of a swarm; `process` may be replaced by a later one in the same home."""

    name: str
    max_blocks: int
    process: NodeProcess
    client: Client
    options: Sequence[str] = ()
    model: str = MODEL  # or a file of that name

    def status(self) -> dict[str, Any]:
        """What the node says of itself now."""
        return self.client.status()

    def come_back(self) -> None:
        """Start it again in its home, without an invite, as after a power cut."""
        self.client.close()
        options = _options(self.name, self.max_blocks)
        arguments = ["join", "--model", self.model, *options, *self.options]
        self.process = NodeProcess(arguments, home=self.process.home)
        self.process.wait_until_up()
        self.client = Client(home=self.process.home)

    def stop(self) -> None:
        """End it and the connections to it."""
        self.client.close()
        self.process.stop()


@dataclass(frozen=True, slots=True)
class Swarm:
    """The members, founder first."""

    members: tuple[Member, ...]

    @property
    def head(self) -> Client:
        """A client of the founder."""
        return self.members[0].client

    def n_sessions(self) -> int:
        """Sessions that any member serves now, as head or as stage."""
        sessions = [member.status()["sessions"] for member in self.members]
        return sum(facts["as_head"] + facts["as_stage"] for facts in sessions)

    def mend(self) -> None:
        """Start again who has ended, and wait for the plan."""
        for member in self.members:
            if not member.process.is_running:
                member.come_back()
        wait_for(self.is_planned, PLAN_S, "no plan over all members")

    def is_planned(self) -> bool:
        """Whether every member has the same active plan, over all members."""
        plans = self.active_plans()
        return bool(plans) and len(plans[0]["stages"]) == len(self.members)

    def has_a_plan(self) -> bool:
        """Whether every member has the same active plan."""
        return bool(self.active_plans())

    def active_plans(self) -> list[dict[str, Any]]:
        """Every member's active plan; nothing unless it is the same one."""
        plans = []
        for member in self.members:
            if not member.process.is_running:
                raise RuntimeError(f"{member.name} ended: {member.process.log_tail(5)}")
            try:
                plans.append(member.client.plan(MODEL)["active"])
            except ClientError:
                return []
        first = plans[0]
        is_same = all(plan and first and plan["digest"] == first["digest"] for plan in plans)
        return plans if is_same else []


@contextmanager
def running_swarm(
    folder: Path,
    caps: Sequence[int],
    options: Sequence[str] = (),
    *,
    model: str = MODEL,
    needs_all: bool = True,
) -> Iterator[Swarm]:
    """A swarm of one node per cap, ready with a plan; nothing of it is left afterwards.

    Args:
        folder: for the nodes' homes.
        caps: blocks that each may run.
        options: of every node, besides.
        model: `MODEL`, or a file that is called so.
        needs_all: whether the plan is one over all of them.
    """
    with ExitStack() as stack:
        founder = stack.enter_context(_node(folder, 0, ["up", model, *options], caps[0]))
        join = ["join", founder.facts["invite"], "--model", model, *options]
        processes = [founder] + [
            stack.enter_context(_node(folder, idx, join, cap))
            for idx, cap in enumerate(caps[1:], start=1)
        ]
        members = []
        for idx, (process, cap) in enumerate(zip(processes, caps, strict=True)):
            process.wait_until_up()
            client = Client(home=process.home)
            members.append(Member(f"node-{idx}", cap, process, client, options, model))
            stack.callback(members[-1].stop)
        swarm = Swarm(tuple(members))
        is_planned = swarm.is_planned if needs_all else swarm.has_a_plan
        wait_for(is_planned, PLAN_S, "no plan over all members")
        yield swarm
        # All at once: each takes a second to say goodbye.
        for member in members:
            member.process.process.terminate()


def covey(*arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "covey.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
    )


def _node(folder: Path, idx: int, arguments: list[str], cap: int) -> NodeProcess:
    home = folder / f"node-{idx}"
    return NodeProcess([*arguments, *_options(f"node-{idx}", cap)], home=home)


def _options(name: str, cap: int) -> list[str]:
    return ["--name", name, "--max-blocks", str(cap), *LOOPBACK]
