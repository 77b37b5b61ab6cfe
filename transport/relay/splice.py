"""Bytes from one socket to another and back, as they are.

Each direction reads into one scratch buffer, shared by all, and hands on at once what it read. What
the other side does not take is kept, and nothing more is read until it is gone: a slow reader
slows its sender down, and costs a relay one quantum of memory. splice(2) was tried: a tenth
faster at best, for two file descriptors more in each direction.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress

from .shaping import MAX_QUANTUM_BYTES, Shaper
from .window import Window

# What the kernel may hold of what cannot be sent yet. A heartbeat waits behind it.
UNSENT_BYTES = 64 << 10

_scratch = memoryview(bytearray(MAX_QUANTUM_BYTES))  # nothing stays in it between two callbacks


class Toll:
    """Lets flows pass at the pace of a `Shaper`, and wakes those that had to wait."""

    def __init__(self, *, rate: float, rate_per_payer: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._shaper: Shaper[_Flow] = Shaper(
            rate=rate, rate_per_payer=rate_per_payer, now=self._loop.time()
        )
        self._timer: asyncio.TimerHandle | None = None
        self.quantum = self._shaper.quantum
        self.nbytes = 0  # carried so far

    def pass_now(self, flow: _Flow) -> bool:
        """Whether the flow may move a quantum; if not, its `go` will be called."""
        may_pass = self._shaper.ask(flow, flow.payer, now=self._loop.time())
        if not may_pass and self._timer is None:
            self._schedule()
        return may_pass

    def charge(self, payer: str, nbytes: int) -> None:
        """These were moved."""
        self.nbytes += nbytes
        self._shaper.moved(payer, nbytes, now=self._loop.time())

    def forget_flow(self, flow: _Flow) -> None:
        """It has ended."""
        self._shaper.forget_flow(flow)

    def forget_payer(self, payer: str) -> None:
        """It has no circuit left."""
        self._shaper.forget_payer(payer, now=self._loop.time())

    def close(self) -> None:
        """Wake nobody any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _schedule(self) -> None:
        at = self._shaper.next_at(now=self._loop.time())
        self._timer = None if at is None else self._loop.call_at(at, self._wake)

    def _wake(self) -> None:
        self._timer = None
        while (flow := self._shaper.pop(now=self._loop.time())) is not None:
            flow.go()
        self._schedule()


class _Flow:
    """One direction."""

    def __init__(
        self, splice: Splice, source: socket.socket, sink: socket.socket, toll: Toll, payer: str
    ) -> None:
        self.payer = payer
        self.is_ended = False
        self._splice = splice
        self._source = source
        self._sink = sink
        self._toll = toll
        self._loop = asyncio.get_running_loop()
        self._window = Window(source, now=self._loop.time())
        self._kept = memoryview(b"")  # read, and not yet taken by the sink
        self._loop.add_reader(source, self._readable)

    def go(self) -> None:
        """The toll lets us pass, after we had to wait."""
        self._loop.add_reader(self._source, self._readable)
        self._move()

    def close(self) -> None:
        """Watch the sockets no more."""
        self.is_ended = True
        self._toll.forget_flow(self)
        self._loop.remove_reader(self._source)
        self._loop.remove_writer(self._sink)

    def _readable(self) -> None:
        if self._toll.pass_now(self):
            self._move()
        else:
            self._loop.remove_reader(self._source)

    def _move(self) -> None:
        try:
            nbytes = self._source.recv_into(_scratch, self._toll.quantum)
        except BlockingIOError:
            return
        except OSError:
            self._splice.close()
            return
        if nbytes == 0:
            self._end()
            return
        self._toll.charge(self.payer, nbytes)
        self._window.count(nbytes, now=self._loop.time())
        n_sent = self._send(_scratch[:nbytes])
        if n_sent is not None and n_sent < nbytes:
            self._kept = memoryview(bytes(_scratch[n_sent:nbytes]))
            self._loop.remove_reader(self._source)
            self._loop.add_writer(self._sink, self._writable)

    def _writable(self) -> None:
        n_sent = self._send(self._kept)
        if n_sent is None:
            return
        self._kept = self._kept[n_sent:]
        if not self._kept:
            self._loop.remove_writer(self._sink)
            self._loop.add_reader(self._source, self._readable)

    def _send(self, data: memoryview) -> int | None:
        """How much of it the sink took; None if the circuit is over."""
        try:
            n_sent = self._sink.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self._splice.close()
            return None
        self._splice.moved_at = self._loop.time()
        return n_sent

    def _end(self) -> None:
        """The source has no more to say; nothing is kept here, or we would not have read."""
        self.close()
        with suppress(OSError):
            self._sink.shutdown(socket.SHUT_WR)
        self._splice.flow_ended()


class Splice:
    """Two sockets that it owns, and the bytes between them; `on_end` is called once."""

    def __init__(
        self,
        one: socket.socket,
        other: socket.socket,
        *,
        toll: Toll,
        payer: str,
        on_end: Callable[[], None],
    ) -> None:
        self.moved_at = asyncio.get_running_loop().time()
        self._sockets = (one, other)
        self._on_end = on_end
        self._is_closed = False
        for connection in self._sockets:
            _tune(connection)
        self._flows = (_Flow(self, one, other, toll, payer), _Flow(self, other, one, toll, payer))

    @property
    def is_ending(self) -> bool:
        """Whether one direction has ended."""
        return any(flow.is_ended for flow in self._flows)

    def flow_ended(self) -> None:
        """One direction is over; the other may still have something under way."""
        if all(flow.is_ended for flow in self._flows):
            self.close()

    def close(self) -> None:
        """End both connections now."""
        if self._is_closed:
            return
        self._is_closed = True
        for flow in self._flows:
            flow.close()
        for connection in self._sockets:
            connection.close()
        self._on_end()


def _tune(connection: socket.socket) -> None:
    with suppress(OSError):  # gone already: the first read will say so
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # Linux, macOS
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
