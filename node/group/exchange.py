"""The lanes of one member of a group, under epochs: what is stale is dropped, what is wrong aborts.

An attempt is an epoch. Within it every member makes the same calls in the same order, and each
message says which call it belongs to, so that a message is either exactly the one expected, or of
an earlier epoch and dropped, or the end of this one. A message of a later epoch is kept: whoever
sent it has given this one up. Nothing here adds or knows what is added.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NoReturn

from covey.transport.frame import Buffer
from covey.transport.lane.errors import LaneBroken, LaneTimeout
from covey.transport.lane.lane import Lane
from covey.transport.lane.waiting import SPIN_S, Readiness

from .errors import ReduceAborted
from .message import MAX_EPOCH, Header, Kind, read_header


class Exchange:
    """Sends and receives for one rank; one thread at a time."""

    def __init__(
        self,
        rank: int,
        lanes: Mapping[int, Lane],
        *,
        timeout_s: float,
        spin_s: float = SPIN_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.rank = rank
        self.others = tuple(sorted(lanes))
        self.epoch = -1
        self.number = 0  # of the call under way, in this epoch
        self.is_over = True  # the epoch was aborted, or none has begun
        self._lanes = dict(lanes)
        self._ranks = {lane.fileno(): rank for rank, lane in lanes.items()}
        self._held: dict[int, memoryview] = {}  # a message of a later epoch, by whom
        self._timeout_s = timeout_s
        self._spin_s = spin_s
        self._clock = clock
        self._readiness: dict[tuple[int, ...], Readiness] = {}

    def begin(self, epoch: int) -> None:
        """A call begins, under this epoch or a later one.

        Raises:
            ReduceAborted: the epoch is over.
            ValueError: not an epoch.
        """
        if not 0 <= epoch <= MAX_EPOCH:
            raise ValueError(f"{epoch} is not an epoch")
        if epoch > self.epoch:
            self.epoch, self.number, self.is_over = epoch, 0, False
        elif epoch < self.epoch or self.is_over:
            raise ReduceAborted("it is over already", epoch=epoch, rank=None)
        self.number += 1

    def send(self, rank: int, header: bytes, *parts: Buffer) -> None:
        """One message to a member. Raises ReduceAborted."""
        try:
            self._lanes[rank].send(header, *parts)
        except LaneBroken as error:
            self.abort(error.reason, rank=rank, is_lost=True)

    def poll(self, rank: int) -> tuple[Header, memoryview] | None:
        """The next message of this epoch from a member, if it is here. Raises ReduceAborted."""
        while True:
            message = self._held.pop(rank, None)
            if message is None:
                try:
                    message = self._lanes[rank].poll()
                except LaneBroken as error:
                    self.abort(error.reason, rank=rank, is_lost=True)
                if message is None:
                    return None
            header = read_header(message)
            if header is None or header.rank != rank:
                self.abort("it sent what is no message of a group", rank=rank)
            if header.epoch < self.epoch:
                continue
            if header.epoch > self.epoch:
                self._held[rank] = memoryview(bytes(message))
                self.abort("it has begun the next epoch", rank=rank)
            if header.kind == Kind.ABORT:
                self.abort("it could not go on", rank=rank)
            return header, message

    def receive(self, rank: int) -> tuple[Header, memoryview]:
        """The next message of this epoch from a member. Raises ReduceAborted."""
        deadline = self.deadline()
        while True:
            self.wait((rank,), deadline)
            found = self.poll(rank)
            if found is not None:
                return found

    def deadline(self) -> float:
        """Until when something must have come that is waited for from now on."""
        return self._clock() + self._timeout_s

    def wait(self, ranks: Sequence[int], deadline: float) -> Sequence[int]:
        """Until one of them may have sent something; which may. Raises ReduceAborted at the end."""
        unseen = [r for r in ranks if r in self._held or self._lanes[r].has_unseen()]
        if unseen:
            return unseen
        key = tuple(ranks)
        readiness = self._readiness.get(key)
        if readiness is None:
            files = [self._lanes[rank].fileno() for rank in key]
            readiness = self._readiness[key] = Readiness(files, spin_s=self._spin_s)
        ready = readiness.wait(deadline - self._clock())
        if not ready and self._clock() >= deadline:
            self.abort(f"nothing came for {self._timeout_s:g} s", rank=key[0])
        return [self._ranks[file] for file in ready]

    def expect(self, found: tuple[Header, memoryview], kind: Kind, *facts: int) -> None:
        """Check that a message is of this kind, this call and these rows, columns and part.

        Raises:
            ReduceAborted: it is another.
        """
        header = found[0]
        said = (header.kind, header.number, header.rows, header.columns, header.part)
        if said != (kind, self.number, *facts):
            self.abort("it does something else", rank=header.rank)

    def hear(self, rank: int, timeout_s: float) -> tuple[Header, memoryview]:
        """The next word of a member that begins or goes on with an epoch; all else is dropped.

        Raises:
            LaneTimeout: none came.
            ReduceAborted: the lane ended.
        """
        deadline = self._clock() + timeout_s
        while True:
            message = self._held.pop(rank, None)
            if message is None:
                try:
                    message = self._lanes[rank].receive(max(0.0, deadline - self._clock()))
                except LaneTimeout as error:
                    raise LaneTimeout(timeout_s) from error
                except LaneBroken as error:
                    self.abort(error.reason, rank=rank, is_lost=True)
            header = read_header(message)
            if header is None or header.rank != rank:
                self.abort("it sent what is no message of a group", rank=rank)
            if header.epoch < self.epoch:
                continue
            if header.kind == Kind.WORD and (header.epoch > self.epoch or not self.is_over):
                if header.epoch == self.epoch and header.number != self.number + 1:
                    self.abort("it does something else", rank=rank)
                if header.epoch > self.epoch and header.number != 1:
                    continue  # the beginning of that epoch was not for us
                self.begin(header.epoch)
                return header, message
            if header.epoch == self.epoch and not self.is_over:
                if header.kind != Kind.ABORT:
                    self.abort("it does something else", rank=rank)
                self.end()

    def end(self) -> None:
        """This epoch is over for us, and all are told; once."""
        if self.is_over:
            return
        self.is_over = True
        goodbye = Header(Kind.ABORT, None, self.rank, self.epoch, self.number).pack()
        for lane in self._lanes.values():
            with suppress(LaneBroken):
                lane.send(goodbye)

    def abort(self, reason: str, *, rank: int | None, is_lost: bool = False) -> NoReturn:
        """End this epoch for every member. Raises ReduceAborted, always."""
        self.end()
        raise ReduceAborted(reason, epoch=self.epoch, rank=rank, is_lost=is_lost)

    def close(self) -> None:
        """Close every lane; the others' calls, and one under way here, are aborted."""
        for lane in self._lanes.values():
            lane.close()
