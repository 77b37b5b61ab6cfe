"""Round trips and rates between two machines of a lab, by sockets of this process in both.

Rates count whole Ethernet frames, as links do. Up to 50 Mbit/s they are measured by sending more
UDP than passes, which loss and long delays do not disturb; beyond, by one TCP connection.
"""

from __future__ import annotations

import socket
import statistics
import struct
import threading
import time
from contextlib import closing, suppress

from .lab import Lab

_PORT = 9000
_PAYLOAD_BYTES = 1200
_HEADER_BYTES = 14 + 20 + 8  # Ethernet, IP, UDP
_TCP_SHARE = 1448 / 1514  # payload of a full frame, with time stamps
_UDP_LIMIT_MBIT = 50.0  # beyond, this process would be the slowest part
_BATCH_S = 0.002
_CHUNK = bytes(256 << 10)


def rtts_ms(
    lab: Lab, a: str, b: str, *, n: int = 40, spacing_s: float = 0.01, timeout_s: float = 2.0
) -> list[float]:
    """Round trips from `a` to `b` over UDP, in the order sent; lost ones are left out.

    Args:
        lab: has both.
        a: asks.
        b: answers; must be reachable from `a` without being asked first.
        n: how many to send.
        spacing_s: how long after another; more than a few times the jitter, or it shows less.
        timeout_s: how long to wait for answers after the last.
    """
    place = (lab.address(b), _PORT)
    stop = threading.Event()
    asking = lab.machines[a].socket(socket.SOCK_DGRAM)
    echoing = lab.machines[b].socket(socket.SOCK_DGRAM)
    with closing(asking), closing(echoing):
        echoing.bind(place)
        echoing.settimeout(0.1)
        asking.connect(place)
        echo = threading.Thread(target=_echo, args=(echoing, stop))
        echo.start()
        try:
            _ask(asking, 1, 0.0, timeout_s)  # the neighbours find each other first
            return _ask(asking, n, spacing_s, timeout_s)
        finally:
            stop.set()
            echo.join()


def rtt_ms(lab: Lab, a: str, b: str, *, spacing_s: float = 0.01) -> float:
    """The median of round trips; raises ValueError if none came back."""
    found = rtts_ms(lab, a, b, spacing_s=spacing_s)
    if not found:
        raise ValueError(f"nothing comes back to {a} from {b}")
    return statistics.median(found)


def rate_mbit_per_s(lab: Lab, a: str, b: str, *, expected: float, seconds: float) -> float:
    """What arrives at `b` of what `a` sends, from a second after the first arrival on.

    Args:
        lab: has both.
        a: sends.
        b: receives; must be reachable from `a`.
        expected: about how fast the link is.
        seconds: how long to measure.
    """
    if expected <= _UDP_LIMIT_MBIT:
        return _udp_rate(lab, a, b, offered=1.2 * expected, seconds=seconds)
    return _tcp_rate(lab, a, b, seconds=seconds)


def _echo(echoing: socket.socket, stop: threading.Event) -> None:
    while not stop.is_set():
        with suppress(TimeoutError):
            data, source = echoing.recvfrom(64)
            echoing.sendto(data, source)


def _ask(asking: socket.socket, n: int, spacing_s: float, timeout_s: float) -> list[float]:
    found: list[float] = []
    began_at = time.perf_counter()
    n_sent = 0
    while n_sent < n or time.perf_counter() < began_at + n * spacing_s + timeout_s:
        next_at = began_at + n_sent * spacing_s
        wait_s = next_at - time.perf_counter() if n_sent < n else timeout_s
        if wait_s <= 0:
            asking.send(struct.pack("d", time.perf_counter()))
            n_sent += 1
            continue
        asking.settimeout(wait_s)
        with suppress(TimeoutError):
            (sent_at,) = struct.unpack("d", asking.recv(64))
            if sent_at >= began_at:
                found.append(1e3 * (time.perf_counter() - sent_at))
        if len(found) == n:
            break
    return found


def _udp_rate(lab: Lab, a: str, b: str, *, offered: float, seconds: float) -> float:
    place = (lab.address(b), _PORT)
    stop = threading.Event()
    sending = lab.machines[a].socket(socket.SOCK_DGRAM)
    receiving = lab.machines[b].socket(socket.SOCK_DGRAM)
    with closing(sending), closing(receiving):
        receiving.bind(place)
        receiving.settimeout(5.0)
        sending.connect(place)
        flood = threading.Thread(target=_flood, args=(sending, offered, stop))
        flood.start()
        try:
            return _received(receiving, seconds, _PAYLOAD_BYTES, _HEADER_BYTES)
        finally:
            stop.set()
            flood.join()


def _flood(sending: socket.socket, mbit_per_s: float, stop: threading.Event) -> None:
    per_s = mbit_per_s * 1e6 / 8 / (_PAYLOAD_BYTES + _HEADER_BYTES)
    payload = bytes(_PAYLOAD_BYTES)
    began_at = time.perf_counter()
    n_sent = 0
    while not stop.wait(_BATCH_S):
        owed = int(per_s * (time.perf_counter() - began_at)) - n_sent
        for _ in range(owed):
            n_sent += 1
            with suppress(OSError):  # the link is full, as it should be
                sending.send(payload)


def _tcp_rate(lab: Lab, a: str, b: str, *, seconds: float) -> float:
    place = (lab.address(b), _PORT)
    sending = lab.machines[a].socket(socket.SOCK_STREAM)
    listening = lab.machines[b].socket(socket.SOCK_STREAM)
    with closing(sending), closing(listening):
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen()
        sending.connect(place)
        push = threading.Thread(target=_push, args=(sending,))
        receiving, _ = listening.accept()
        with closing(receiving):
            push.start()
            rate = _received(receiving, seconds, len(_CHUNK), 0) / _TCP_SHARE
            sending.shutdown(socket.SHUT_RDWR)
            push.join()
        return rate


def _push(sending: socket.socket) -> None:
    with suppress(OSError):  # until it is shut down
        while True:
            sending.sendall(_CHUNK)


def _received(receiving: socket.socket, seconds: float, at_most: int, header_bytes: int) -> float:
    """Mbit/s that arrive, headers included, once the first second is over."""
    receiving.recv(at_most)
    begin_at = time.perf_counter() + 1.0
    n_bytes = 0
    while (now := time.perf_counter()) < begin_at + seconds:
        nbytes = len(receiving.recv(at_most))
        if now >= begin_at:
            n_bytes += nbytes + header_bytes
    return n_bytes * 8e-6 / (now - begin_at)
