"""How far a sender may get ahead of a slow onward connection: less than half a second.

Left to itself Linux lets a fast sender put megabytes into a relay's receive buffer. At 5 Mbit/s
each of them delays what comes behind it by 1.6 s, and heartbeats come behind it. So the buffer
follows the speed at which its bytes are carried on; a sender 300 ms away is still not held up.
"""

from __future__ import annotations

import socket
import sys
from contextlib import suppress

AHEAD_S = 0.4
MIN_WINDOW_BYTES = 192 << 10  # Linux allows programs 208 unless told otherwise
_MEASURE_S = 0.25
_CHANGE = 1.25  # smaller changes are not worth a system call
_FREE_BYTES = 512 << 10  # beyond the system's limit and this, the kernel chooses the size again
_SO_BUF_LOCK = 72  # Linux 5.15


class Window:
    """The receive buffer of one socket, from which one reads only what can be carried on."""

    def __init__(self, connection: socket.socket, *, now: float) -> None:
        self._connection = connection
        self._nbytes = 0
        self._since = now
        self._size = MIN_WINDOW_BYTES
        self._apply()

    def count(self, nbytes: int, *, now: float) -> None:
        """Bytes were read, after all before them had been carried on."""
        self._nbytes += nbytes
        elapsed_s = now - self._since
        if elapsed_s < _MEASURE_S:
            return
        size = max(int(self._nbytes / elapsed_s * AHEAD_S), MIN_WINDOW_BYTES)
        self._nbytes, self._since = 0, now
        if not self._size / _CHANGE < size < self._size * _CHANGE:
            self._size = size
            self._apply()

    def _apply(self) -> None:
        with suppress(OSError):  # gone already, or a system that knows better
            # Room for as much bookkeeping of the kernel's as for bytes: Linux doubles it by itself.
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._size)
            if sys.platform != "linux":
                return
            # What the buffer was at first would stay the limit of what may be under way.
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, self._size)
            granted = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
            if granted < 2 * self._size and self._size > _FREE_BYTES:
                self._connection.setsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK, 0)
