"""Processes of `testbed.mesh_node` on a lab's machines, and what they say."""

from __future__ import annotations

import json
import queue
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covey.transport.identity import Identity
from covey.transport.membership import Swarm

from .lab import Lab
from .namespaces import LabBroken

READY_S = 30.0
REACH_S = 30.0

Event = dict[str, Any]


def found_swarm() -> Swarm:
    """The state of a swarm whose founder takes no part."""
    return Swarm.create(Identity(secrets.token_bytes(32)).peer_id)


@dataclass(frozen=True, slots=True)
class _Ended:
    """In place of an event: there will be no more."""


class Member:
    """One process; the lab kills it at its end, and `close` before that."""

    def __init__(self, lab: Lab, host: str, swarm: Swarm, *, port: int, log: Path) -> None:
        """Start it; does not wait.

        Args:
            lab: has the host.
            host: where to run.
            swarm: whose member it is.
            port: what it listens on.
            log: what it says on stderr is appended to that.
        """
        self.host = host
        seed = secrets.token_bytes(32)
        self.peer_id = Identity(seed).peer_id
        self.addresses: Sequence[str] = ()
        self.is_reachable = False  # by anybody; else through relays
        self._process = lab.start(
            host,
            *(sys.executable, "-m", "testbed.mesh_node"),
            *(seed.hex(), json.dumps(swarm.to_dict()), str(port)),
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
        self.addresses = event["addresses"]

    def learn(self, other: Member, *, relays: Sequence[Member] = ()) -> None:
        """Let it know where another says that it is, and whom that one has a link to."""
        addresses, ids = list(other.addresses), [relay.peer_id for relay in relays]
        self._do(do="learn", peer=other.peer_id, addresses=addresses, relays=ids)

    def see(self, relays: Mapping[str, Member]) -> None:
        """Let it know of members that relay, by host, and wait until it knows how it is reached.

        Raises LabBroken if it does not find out.
        """
        self._do(do="see", relays={relay.peer_id: host for host, relay in relays.items()})

        def is_settled(event: Event) -> bool:
            return event["said"] == "reach" and (
                event["is_reachable"] or len(event["relays"]) == len(relays)
            )

        event = self.wait_for(is_settled, REACH_S)
        if event is None:
            raise LabBroken(f"{self.host} does not find out how it can be reached; see its log")
        self.is_reachable = event["is_reachable"]

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
