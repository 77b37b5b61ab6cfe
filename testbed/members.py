"""Processes of `testbed.mesh_node` on a lab's machines, and what they say."""

from __future__ import annotations

import json
import queue
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covey.transport.identity import Identity
from covey.transport.membership import Swarm

from .lab import Lab
from .namespaces import LabBroken

READY_S = 30.0

Event = dict[str, Any]


def found_swarm() -> Swarm:
    """The state of a swarm whose founder takes no part."""
    return Swarm.create(Identity(secrets.token_bytes(32)).peer_id)


@dataclass(frozen=True, slots=True)
class _Ended:
    """In place of an event: there will be no more."""


class Member:
    """One process; the lab kills it at its end, and `close` before that."""

    def __init__(
        self,
        lab: Lab,
        host: str,
        swarm: Swarm,
        *,
        port: int,
        log: Path,
        maps_ports: bool = False,
    ) -> None:
        """Start it; does not wait.

        Args:
            lab: has the host.
            host: where to run.
            swarm: whose member it is.
            port: what it listens on.
            log: what it says on stderr is appended to that.
            maps_ports: whether it asks its router to open the port.
        """
        self.host = host
        self.address = lab.address(host)
        seed = secrets.token_bytes(32)
        self.peer_id = Identity(seed).peer_id
        self.card: Event = {}  # what it would announce
        self._process = lab.start(
            host,
            *(sys.executable, "-m", "testbed.mesh_node"),
            *(seed.hex(), json.dumps(swarm.to_dict()), str(port)),
            *(["maps-ports"] if maps_ports else []),
            log=log,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._events: queue.Queue[Event | _Ended] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def wait_until_ready(self) -> None:
        """Wait until it listens. Raises LabBroken if it ends instead or takes too long."""
        event = self.wait_for(lambda it: it["said"] == "ready", READY_S)
        if event is None:
            raise LabBroken(f"a node on {self.host} does not start; see its log")
        self.card = event["card"]

    def settle(self, relays: Sequence[Member]) -> None:
        """Let it link to relays and find out what NAT is in its way; does not wait."""
        for relay in relays:
            self.learn(relay)
        hosts = {it.peer_id: it.address for it in relays}
        self._do(do="settle", relays=hosts)

    def wait_until_settled(self) -> None:
        """Wait for that. Raises LabBroken if it reaches no relay."""
        event = self.wait_for(lambda it: it["said"] in ("settled", "failed"), READY_S)
        if event is None or event["said"] == "failed":
            why = "no word" if event is None else event["why"]
            raise LabBroken(f"the node on {self.host} does not reach the relays: {why}")
        self.card = event["card"]

    def learn(self, other: Member) -> None:
        """Let it know what another announces."""
        self._do(do="learn", peer=other.peer_id, card=other.card)

    def dial(self, other: Member) -> None:
        """Let it make a link and watch it."""
        self._do(do="dial", peer=other.peer_id)

    def wait_for(self, matches: Callable[[Event], bool], timeout_s: float) -> Event | None:
        """The next event that matches; None if none comes in time. Others before it are lost."""
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                event = self._events.get(timeout=left_s)
            except queue.Empty:
                break
            if isinstance(event, _Ended):
                self._events.put(event)
                break
            if matches(event):
                return event
        return None

    def close(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _do(self, **command: object) -> None:
        stdin = self._process.stdin
        if stdin is None:
            raise ValueError("started without a pipe")
        try:
            stdin.write(json.dumps(command).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError as error:
            raise LabBroken(f"the node on {self.host} has ended; see its log") from error

    def _read(self) -> None:
        stdout = self._process.stdout
        if stdout is not None:
            for line in stdout:
                self._events.put(json.loads(line))
        self._events.put(_Ended())
