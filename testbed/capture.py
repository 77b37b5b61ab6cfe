"""Records what a machine sends and receives, as `tcpdump -w` would: `python capture.py IF FILE`.

A script of its own that imports nothing of ours, so that it starts at once. tcpdump itself does not
run inside a user namespace, where it cannot give up rights as it insists; it reads the file.
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from pathlib import Path

ETH_P_ALL = 3
SNAP_BYTES = 256  # headers, and the beginning of what is encrypted anyway
MAX_BYTES = 64 << 20  # then it stops: a capture is for the first seconds of a failure


def main(interface: str, path: str) -> None:
    """Write frames until killed."""
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as tap,
        Path(path).open("wb", buffering=0) as out,
    ):
        tap.bind((interface, 0))
        out.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, SNAP_BYTES, 1))  # 1: Ethernet
        while out.tell() < MAX_BYTES:
            frame = tap.recv(1 << 17)
            seconds, nanoseconds = divmod(time.time_ns(), 10**9)
            kept = frame[:SNAP_BYTES]
            out.write(struct.pack("<IIII", seconds, nanoseconds // 1000, len(kept), len(frame)))
            out.write(kept)


if __name__ == "__main__":
    main(*sys.argv[1:3])
