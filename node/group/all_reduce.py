"""Partial sums of a group added up, so that every member has the same bits, or none has any.

As a star: the hub receives from all spokes at once, adds in the order of ranks whoever comes first,
and sends the sum back. Two members exchange their parts, and each adds in that order. Large sums of
more than two go round a ring, an n-th at a time. Addition is in fp32, and what each adds is what
the others saw, after the codec: the same calls give the same bits. What a call returns is valid
until the next one.

Either every message of a call is exactly what is expected, or the call raises `ReduceAborted` at
every member, sooner or later, and its epoch is over; its input is untouched. Nothing is retried
here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from covey.partition.allreduce import MAX_DIRECT, Algorithm
from covey.transport.frame import Buffer
from covey.transport.lane.lane import Lane
from covey.transport.lane.waiting import SPIN_S

from .choosing import Chooser, GroupLink, size_class
from .codec import GROUP, Coder, Floats, Sum, SumCodec, encoded_bytes
from .errors import ReduceAborted
from .exchange import Exchange
from .message import HEADER_BYTES, MAX_BUSY_US, MAX_RANK, Header, Kind, fits

TIMEOUT_S = 5.0
MAX_ROUNDS = 1024  # kept of those that have ended
# Of a ring: each member sends a piece and takes one, so that no cycle of full buffers can arise.
PIECE_VALUES = 8192  # 32 KiB exactly

Shape = tuple[int, int]  # rows, columns
Part = tuple[SumCodec, memoryview]  # what a member adds, as it came


class Round(NamedTuple):
    """One call that added something, as the rank that added saw it; of all ranks, in their order.

    `busy_s` is what each took from the end of its last call to the beginning of this one, by its
    own clock; `arrived_s` how long after our own part each part was there, 0 if it was before us.
    """

    algorithm: Algorithm
    epoch: int
    number: int
    nbytes: int
    busy_s: tuple[float, ...]
    arrived_s: tuple[float, ...]
    took_s: float

    @property
    def spread_s(self) -> float:
        """Between the first and the last member to have its part ready."""
        return max(self.busy_s) - min(self.busy_s)


class AllReduce:
    """One member's end of a group's sums; every member makes the same calls in the same order.

    Args:
        rank: ours, the place among the members.
        hub_idx: the hub's.
        lanes: to other members by rank; all of them at the hub, the hub at least elsewhere.
        codec: of partial sums on the wire.
        n_members: of the group.
        link: at the hub, what lies between members; then large sums go round a ring, and every
            member must have lanes to the ranks next to it.
        timeout_s: how long a call waits for the slowest member.
        spin_s: how long it looks before it sleeps.
        clock: seconds that only go forward.
    """

    def __init__(
        self,
        rank: int,
        hub_idx: int,
        lanes: Mapping[int, Lane],
        codec: SumCodec,
        *,
        n_members: int,
        link: GroupLink | None = None,
        timeout_s: float = TIMEOUT_S,
        spin_s: float = SPIN_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        needed = set(range(n_members)) if rank == hub_idx else {hub_idx}
        if not (n_members <= MAX_RANK and needed - {rank} <= set(lanes)) or rank in lanes:
            raise ValueError("the lanes are not those of this rank")
        self.rank = rank
        self.hub_idx = hub_idx
        self.n_members = n_members
        self.rounds: deque[Round] = deque(maxlen=MAX_ROUNDS)
        self._exchange = Exchange(rank, lanes, timeout_s=timeout_s, spin_s=spin_s, clock=clock)
        self._coder = Coder(codec)
        self._exact = Coder("exact")
        self._chooser: Chooser | None = None
        if link is not None and rank == hub_idx and n_members > MAX_DIRECT:
            self._chooser = Chooser(n_members, link)
        self._rings = 0  # what all have agreed on
        self._clock = clock
        self._ended_at: float | None = None  # our last call
        self._began_at = 0.0
        self._busy_us = 0
        self._sum = Sum()

    @property
    def is_hub(self) -> bool:
        """Whether this member is the hub."""
        return self.rank == self.hub_idx

    @property
    def epoch(self) -> int:
        """The epoch of the last call; -1 before the first."""
        return self._exchange.epoch

    # --- the calls --------------------------------------------------------------------------------

    def sum(self, partial: Floats | None, shape: Shape, *, epoch: int) -> Floats:
        """The sum of every member's `partial`, float32 [n_rows, columns]; None adds nothing.

        Raises:
            ReduceAborted: it did not come about.
            ValueError: `partial` is not of this shape.
        """
        values, algorithm = self._begin(partial, shape, epoch), self._algorithm(shape)
        if algorithm == "direct":
            total = self._direct(values, shape)
        elif algorithm == "ring":
            total = self._ring(values, shape)
        else:
            total = self._star(values, shape)
        self._end()
        if self._chooser is not None and algorithm != "direct":
            nbytes = encoded_bytes(self._coder.codec, prod(shape))
            self._chooser.measured(nbytes, algorithm, self._clock() - self._began_at)
        return total.reshape(shape)

    def reduce(self, partial: Floats | None, shape: Shape, *, epoch: int) -> Floats | None:
        """As `sum`, but exactly, and only the hub gets it; None elsewhere. Raises as `sum`."""
        values, total = self._begin(partial, shape, epoch), None
        if self.is_hub:
            total = self._add_up(_exactly(values), shape, None).reshape(shape)
        else:
            self._send_part(self.hub_idx, values, shape, self._exact)
        self._end()
        return total

    def broadcast(self, values: Floats | None, shape: Shape, *, epoch: int) -> Floats:
        """The hub's `values`, exactly, at every member; the others give None. Raises as `sum`."""
        flat = self._begin(values, shape, epoch)
        if self.is_hub:
            if flat is None:
                raise ValueError("the hub has nothing to send")
            self._send_to_all(Kind.VECTOR, flat, shape, self._exact)
        else:
            flat = self._take_vector(Kind.VECTOR, shape)
        self._end()
        return flat.reshape(shape)

    def tell(self, *parts: Buffer, epoch: int) -> None:
        """A word of the hub's to all, which `hear` it; opaque here. Begins an epoch, or goes on.

        Raises:
            ReduceAborted: somebody is gone.
        """
        self._start_call(epoch)
        header = self._header(Kind.WORD, None, (0, 0)).pack()
        for rank in self._exchange.others:
            self._exchange.send(rank, header, *parts)
        self._adopt()
        self._end()

    def hear(self, timeout_s: float) -> tuple[int, memoryview]:
        """The hub's next word and its epoch; what is left of epochs that are over is dropped.

        The word is valid until the next call.

        Raises:
            LaneTimeout: none came; everything stays as it was.
            ReduceAborted: the lane to the hub ended, or it goes on without a word.
        """
        header, message = self._exchange.hear(self.hub_idx, timeout_s)
        self._rings = header.rings
        self._end()
        return header.epoch, message[HEADER_BYTES:]

    def drop_rings(self) -> None:
        """At the hub: a member lacks a lane. From the next word on, nothing goes round a ring."""
        self._chooser, self._rings = None, 0

    def abort(self) -> None:
        """End this epoch for every member: this one cannot go on."""
        self._exchange.end()

    def close(self) -> None:
        """Close the lanes; from any thread."""
        self._exchange.close()

    # --- what a call begins and ends with ---------------------------------------------------------

    def _begin(self, values: Floats | None, shape: Shape, epoch: int) -> Floats | None:
        """Check and count a call; its values, flat."""
        if values is not None and (values.shape != shape or values.dtype != np.float32):
            raise ValueError(f"not float32 of {shape}")
        self._start_call(epoch)
        return None if values is None else np.ascontiguousarray(values).reshape(-1)

    def _start_call(self, epoch: int) -> None:
        self._exchange.begin(epoch)
        self._began_at = self._clock()
        busy_s = 0.0 if self._ended_at is None else self._began_at - self._ended_at
        self._busy_us = min(int(busy_s * 1e6), MAX_BUSY_US)

    def _end(self) -> None:
        self._ended_at = self._clock()

    def _algorithm(self, shape: Shape) -> Algorithm:
        if self.n_members <= MAX_DIRECT:
            return "direct"
        nbytes = encoded_bytes(self._coder.codec, prod(shape))
        return "ring" if self._rings >> size_class(nbytes) & 1 else "star"

    def _adopt(self) -> None:
        """All have heard what the hub wants from now on."""
        if self._chooser is not None:
            self._rings = self._chooser.rings

    def _header(self, kind: Kind, codec: SumCodec | None, shape: Shape, part: int = 0) -> Header:
        exchange = self._exchange
        rings = self._chooser.rings if self._chooser is not None else self._rings
        return Header(
            kind,
            codec,
            self.rank,
            exchange.epoch,
            exchange.number,
            *shape,
            rings,
            self._busy_us,
            part,
        )

    # --- star and direct --------------------------------------------------------------------------

    def _send_part(self, rank: int, values: Floats | None, shape: Shape, coder: Coder) -> None:
        if values is None:
            self._exchange.send(rank, self._header(Kind.PART, None, shape).pack())
            return
        codec, body = coder.encode(values)
        self._exchange.send(rank, self._header(Kind.PART, codec, shape).pack(), body)

    def _star(self, values: Floats | None, shape: Shape) -> Floats:
        if not self.is_hub:
            self._send_part(self.hub_idx, values, shape, self._coder)
            return self._take_vector(Kind.SUM, shape)
        total = self._add_up(_exactly(values), shape, "star")
        codec, body = self._send_to_all(Kind.SUM, total, shape, self._coder)
        if codec != "exact":
            self._sum.put(codec, body)
        return total

    def _direct(self, values: Floats | None, shape: Shape) -> Floats:
        own = None if values is None else self._coder.encode(values)
        codec, body = own if own is not None else (None, b"")
        header = self._header(Kind.PART, codec, shape).pack()
        for rank in self._exchange.others:
            self._exchange.send(rank, header, body)
        return self._add_up(own, shape, "direct")

    def _add_up(self, own: Part | None, shape: Shape, algorithm: Algorithm | None) -> Floats:
        """Everybody's part, added in rank order as far as they have come.

        It is a round of `algorithm`, or none that counts.
        """
        self._sum.start(prod(shape))
        parts: dict[int, Part | None] = {self.rank: own}
        started = self._clock()
        arrived = [0.0] * self.n_members
        busy = [self._busy_us / 1e6] * self.n_members
        pending = list(self._exchange.others)
        deadline = self._exchange.deadline()
        n_added, is_begun = 0, False
        while n_added < self.n_members:
            while n_added in parts:
                part = parts.pop(n_added)
                n_added += 1
                if part is not None:
                    (self._sum.add if is_begun else self._sum.put)(*part)
                    is_begun = True
            for rank in self._exchange.wait(pending, deadline) if pending else ():
                found = self._exchange.poll(rank)
                if found is not None:
                    header, parts[rank] = self._check_part(found, shape)
                    busy[rank], arrived[rank] = header.busy_us / 1e6, self._clock() - started
                    pending.remove(rank)
        if not is_begun:
            self._sum.values[:] = 0.0
        if algorithm is not None:
            self._note(algorithm, shape, busy, arrived)
        return self._sum.values

    def _check_part(
        self, found: tuple[Header, memoryview], shape: Shape
    ) -> tuple[Header, Part | None]:
        header, message = found
        self._exchange.expect(found, Kind.PART, *shape, 0)
        if not self.is_hub and header.rank == self.hub_idx:
            self._rings = header.rings
        return header, self._part(header, message, prod(shape))

    def _part(self, header: Header, message: memoryview, n_values: int) -> Part | None:
        if not fits(header, message, n_values):
            self._exchange.abort("its message has another length", rank=header.rank)
        return None if header.codec is None else (header.codec, message[HEADER_BYTES:])

    def _send_to_all(self, kind: Kind, values: Floats, shape: Shape, coder: Coder) -> Part:
        """From the hub, which goes on with what the others see."""
        codec, body = coder.encode(values)
        header = self._header(kind, codec, shape).pack()
        for rank in self._exchange.others:
            self._exchange.send(rank, header, body)
        self._adopt()
        return codec, body

    def _take_vector(self, kind: Kind, shape: Shape) -> Floats:
        found = self._exchange.receive(self.hub_idx)
        self._exchange.expect(found, kind, *shape, 0)
        part = self._part(*found, prod(shape))
        if part is None:
            self._exchange.abort("its message has no values", rank=self.hub_idx)
        self._rings = found[0].rings
        self._sum.start(prod(shape))
        self._sum.put(*part)
        return self._sum.values

    def _note(
        self, algorithm: Algorithm, shape: Shape, busy: Sequence[float], arrived: Sequence[float]
    ) -> None:
        self.rounds.append(
            Round(
                algorithm,
                self._exchange.epoch,
                self._exchange.number,
                encoded_bytes(self._coder.codec, prod(shape)),
                tuple(busy),
                tuple(arrived),
                self._clock() - self._began_at,
            )
        )

    # --- ring -------------------------------------------------------------------------------------

    def _ring(self, values: Floats | None, shape: Shape) -> Floats:
        """Each slice goes round once to be added up, beginning with its own rank, and once more."""
        n, size = self.n_members, prod(shape)
        self._sum.start(size)
        total = self._sum.values
        if values is not None:
            np.copyto(total, values)
        slices = _slices(size, n)
        has_some = [values is not None] * n
        for step in range(n - 1):
            out, into = (self.rank - step) % n, (self.rank - step - 1) % n
            is_some = has_some[into]
            for piece in range(max(map(len, slices))):
                if piece < len(slices[out]):
                    one = self._encoded(total[slices[out][piece]], has_some[out])
                    self._pass_on(one, shape, step, piece)
                if piece < len(slices[into]):
                    place = slices[into][piece]
                    part = self._take_piece(shape, step, piece, place.stop - place.start)
                    if part is not None:
                        (self._sum.add if has_some[into] else self._sum.put)(*part, place.start)
                        is_some = True
            has_some[into] = is_some
        self._tell_round(total, slices, has_some[(self.rank + 1) % n], shape)
        return total

    def _tell_round(
        self, total: Floats, slices: Sequence[Sequence[slice]], has_some: bool, shape: Shape
    ) -> None:
        """The second time round: each slice as its last adder encoded it, without a change."""
        n = self.n_members
        pieces: list[Part | None] = []
        for place in slices[(self.rank + 1) % n]:
            one = self._encoded(total[place], has_some)
            pieces.append(_kept(one))
            self._place(place, pieces[-1])
        for step in range(n - 1):
            out, into = (self.rank + 1 - step) % n, (self.rank - step) % n
            taken: list[Part | None] = []
            for piece in range(max(map(len, slices))):
                if piece < len(slices[out]):
                    self._pass_on(pieces[piece], shape, n - 1 + step, piece)
                if piece < len(slices[into]):
                    place = slices[into][piece]
                    part = self._take_piece(shape, n - 1 + step, piece, place.stop - place.start)
                    taken.append(_kept(part))
                    self._place(place, taken[-1])
            pieces = taken

    def _place(self, place: slice, part: Part | None) -> None:
        if part is None:
            self._sum.values[place] = 0.0
        else:
            self._sum.put(*part, place.start)

    def _encoded(self, values: Floats, has_some: bool) -> Part | None:
        return self._coder.encode(values) if has_some else None

    def _pass_on(self, one: Part | None, shape: Shape, step: int, piece: int) -> None:
        codec, body = one if one is not None else (None, b"")
        header = self._header(Kind.SHARE, codec, shape, step << 16 | piece).pack()
        self._exchange.send((self.rank + 1) % self.n_members, header, body)

    def _take_piece(self, shape: Shape, step: int, piece: int, n_values: int) -> Part | None:
        left = (self.rank - 1) % self.n_members
        found = self._exchange.receive(left)
        self._exchange.expect(found, Kind.SHARE, *shape, step << 16 | piece)
        return self._part(*found, n_values)


def _slices(size: int, n: int) -> list[list[slice]]:
    """Where each of `n` slices lies, in pieces; whole groups of a codec, the last may be empty."""
    each = -(-size // (n * GROUP)) * GROUP
    bounds = [(min(i * each, size), min((i + 1) * each, size)) for i in range(n)]
    return [
        [slice(at, min(at + PIECE_VALUES, end)) for at in range(start, end, PIECE_VALUES)]
        for start, end in bounds
    ]


def _exactly(values: Floats | None) -> Part | None:
    """Flat values that need no wire."""
    return None if values is None else ("exact", values.data.cast("B"))


def _kept(part: Part | None) -> Part | None:
    """A copy, for what is valid only until the next message."""
    return None if part is None else (part[0], memoryview(bytes(part[1])))


__all__ = ["AllReduce", "GroupLink", "ReduceAborted", "Round"]
