"""User-space cables, for kernels without netem: one process that holds packets back.

A script of its own that imports nothing of ours, so that it starts at once; run it in the namespace
where both ends of each cable are. It reads one JSON object a line, and answers each with a line:

    {"id": "h1", "up": {"from": "u-h1", "to": "d-h1", "delay_ms": 5}, "down": {...}}   lay it
    {"id": "h1", "up": {"delay_ms": 50, "jitter_ms": 0, "loss": 0.01}}                 change it

Packets keep their order, and bundles of packets (GSO) pass whole. It ends with its input.
"""

from __future__ import annotations

import heapq
import json
import os
import random
import select
import socket
import sys
import time
from contextlib import suppress

SOL_PACKET = 263  # linux/if_packet.h
PACKET_VNET_HDR = 15  # bundles and their unfinished checksums pass as they are
PACKET_IGNORE_OUTGOING = 23  # no echo of our own frames
ETH_P_ALL = 3
SO_RCVBUFFORCE = 33
BUFFER_BYTES = 32 << 20
MAX_FRAME_BYTES = 70_000
AT_ONCE = 64  # frames read from one end before the others have their turn
LIMIT = 8192  # frames on the way at most, as netem has one


class Way:
    """One direction: what it does to a frame, and how many are on it."""

    def __init__(self, source: socket.socket, target: socket.socket, rng: random.Random) -> None:
        self.source = source
        self.target = target
        self.n_held = 0
        self._rng = rng
        self._last_due = 0
        self._delay_ns = self._jitter_ns = self._loss = 0.0

    def change(self, facts: dict[str, float]) -> None:
        """Take over what `facts` names; the rest is 0."""
        self._delay_ns = facts.get("delay_ms", 0.0) * 1e6
        self._jitter_ns = facts.get("jitter_ms", 0.0) * 1e6
        self._loss = facts.get("loss", 0.0)

    def due(self, now_ns: int) -> int | None:
        """When a frame that came now goes on; None if it is lost."""
        if self.n_held >= LIMIT or (self._loss and self._rng.random() < self._loss):
            return None
        delay_ns = self._delay_ns
        if self._jitter_ns:
            delay_ns += self._rng.gauss(0.0, self._jitter_ns)
        self._last_due = max(self._last_due, now_ns + int(delay_ns))
        return self._last_due


class Wire:
    """All cables of a lab and the frames on them."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)  # noqa: S311 - which packets are lost is no secret
        self._cables: dict[str, dict[str, Way]] = {}
        self._ends: dict[str, socket.socket] = {}
        self._by_number: dict[int, Way] = {}  # by the descriptor of their source
        self._held: list[tuple[int, int, Way, bytes]] = []  # a heap by due time, then arrival
        self._n_frames = 0

    def command(self, facts: dict[str, dict[str, float]]) -> None:
        """Lay or change a cable."""
        cable = self._cables.setdefault(str(facts["id"]), {})
        for direction in ("up", "down"):
            if direction not in facts:
                continue
            if direction not in cable:
                source, target = (self._end(str(facts[direction][k])) for k in ("from", "to"))
                way = Way(source, target, self._rng)
                cable[direction] = self._by_number[source.fileno()] = way
            cable[direction].change(facts[direction])

    def run(self) -> None:
        """Carry frames until the input ends."""
        pending = b""
        while True:
            self._release()
            waiting = [0, *self._by_number]
            ready, _, _ = select.select(waiting, [], [], self._wait_s())
            for number in ready:
                if number != 0:
                    self._take(self._by_number[number])
                    continue
                read = os.read(0, 1 << 16)
                if not read:
                    return
                *lines, pending = (pending + read).split(b"\n")
                for line in lines:
                    self.command(json.loads(line))
                    sys.stdout.write("ok\n")
                    sys.stdout.flush()

    def _wait_s(self) -> float | None:
        # select keeps microseconds, where epoll rounds up to whole milliseconds.
        return max(0, self._held[0][0] - time.monotonic_ns()) / 1e9 if self._held else None

    def _release(self) -> None:
        now_ns = time.monotonic_ns()
        while self._held and self._held[0][0] <= now_ns:
            _, _, way, frame = heapq.heappop(self._held)
            way.n_held -= 1
            with suppress(OSError):  # the other end is down: the frame is lost, as on a real cable
                way.target.send(frame)

    def _take(self, way: Way) -> None:
        for _ in range(AT_ONCE):
            try:
                frame = way.source.recv(MAX_FRAME_BYTES)
            except OSError:  # nothing left, or this end is down
                return
            due_ns = way.due(time.monotonic_ns())
            if due_ns is not None:
                way.n_held += 1
                self._n_frames += 1
                heapq.heappush(self._held, (due_ns, self._n_frames, way, frame))

    def _end(self, interface: str) -> socket.socket:
        end = self._ends.get(interface)
        if end is None:
            end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            end.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            end.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
            try:
                end.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
            except PermissionError:  # needs root outside: as much as the system lets anybody have
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
            end.setblocking(False)
            end.bind((interface, 0))
            self._ends[interface] = end
        return end


def main() -> None:
    """Run, ahead of everything else on the machine if that is allowed.

    Arguments: a seed, and perhaps the descriptor to ask on (`testbed.namespaces.run_inside`).
    """
    seed, *asking = (int(word) for word in sys.argv[1:])
    for descriptor in asking:
        with suppress(OSError):  # nobody listens any more
            os.write(descriptor, b"?")
    Wire(seed).run()


if __name__ == "__main__":
    main()
