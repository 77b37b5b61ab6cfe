"""What the kernel knows of a TCP connection's packets: how many were lost.

TCP hides losses from whoever uses it, and they cost a fifth of a second each. Linux only.
"""

from __future__ import annotations

import socket
import struct
from typing import Protocol

from .link import Packets

# Offsets of 32-bit counters in struct tcp_info (include/uapi/linux/tcp.h); it only ever grows.
_TOTAL_RETRANS, _DATA_SEGS_OUT, _DSACK_DUPS = 100, 156, 216
_SIZE = _DSACK_DUPS + 4


class Socket(Protocol):
    """The part of a socket that is asked."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes:
        """See `socket.socket.getsockopt`."""


def tcp_packets(connection: Socket | None) -> Packets | None:
    """Counts of one connection; None where the system does not tell."""
    if connection is None or not hasattr(socket, "TCP_INFO"):
        return None
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE)
    except OSError:
        return None  # no TCP, or no connection any more
    if len(info) < _SIZE:
        return None  # a kernel before 4.19
    (n_resent,) = struct.unpack_from("I", info, _TOTAL_RETRANS)
    (n_sent,) = struct.unpack_from("I", info, _DATA_SEGS_OUT)
    # A message that has nothing behind it is sent again as a probe when its answer is late; the
    # receiver says so of what it had already. On a link that is slow or jitters that is every
    # other one.
    (n_in_vain,) = struct.unpack_from("I", info, _DSACK_DUPS)
    return Packets(n_sent=n_sent, n_resent=max(0, n_resent - n_in_vain))
