"""How fast a link is on loopback: TLS 1.3 between two processes on uvloop.

    python -m benchmarks.bench_link [--loop asyncio]

Needs an idle machine: with other work on its cores the figures say nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import uvloop

from covey.transport.errors import LinkClosed
from covey.transport.frame import Frame, Tensor
from covey.transport.identity import Identity
from covey.transport.messages import Beat, Forward
from covey.transport.steady.link import SteadyLink
from covey.transport.stream_link import open_stream_link
from covey.transport.tls import authenticate, build_contexts

from .rows import Row, report

SMALL_BYTES, N_SMALL = 16 << 10, 3000
LARGE_BYTES, N_LARGE = 8 << 20, 24
SEED = bytes(32)  # of the certificate authority: this is no secret
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": uvloop.new_event_loop,
    "asyncio": asyncio.new_event_loop,
}


async def connect(connection: socket.socket, *, is_dialer: bool) -> SteadyLink:
    """One end of the measured link, with all that a node puts above the connection."""
    contexts = build_contexts(SEED, Identity.generate())
    carrier = await open_stream_link(
        connection,
        context=contexts.client if is_dialer else contexts.server,
        is_dialer=is_dialer,
        authenticate=lambda tls: authenticate(tls, expected=None, is_allowed=lambda _: True),
        handshake_s=5.0,
    )
    link = SteadyLink(carrier, bytes(16))
    link.on_lost = lambda: link.abort(link.lost_to)
    return link


async def echo(link: SteadyLink) -> None:
    """The other process: return small frames whole, answer large ones with a word."""
    with suppress(LinkClosed):
        while True:
            frame = await link.receive()
            if sum(len(tensor.data) for tensor in frame.tensors.values()) > SMALL_BYTES:
                frame = Frame(message=Beat(body=b"got it"))
            await link.send(frame)
    await link.aclose()


async def round_trips_us(link: SteadyLink, n: int) -> list[float]:
    """What `n` small frames took to come back, one after the other."""
    small = forward(SMALL_BYTES)
    times: list[float] = []
    for _ in range(n):
        started = time.perf_counter()
        await link.send(small)
        await link.receive()
        times.append((time.perf_counter() - started) * 1e6)
    return times


async def speeds_mb_s(link: SteadyLink, n: int) -> list[float]:
    """How fast `n` large frames went one way, the short answer included."""
    large = forward(LARGE_BYTES)
    speeds: list[float] = []
    for _ in range(n):
        started = time.perf_counter()
        await link.send(large)
        await link.receive()
        speeds.append(LARGE_BYTES / 1e6 / (time.perf_counter() - started))
    return speeds


async def measure(connection: socket.socket) -> list[Row]:
    """Round trips of small frames, then one way of large ones."""
    link = await connect(connection, is_dialer=False)
    times_us = await round_trips_us(link, N_SMALL)
    speeds = await speeds_mb_s(link, N_LARGE)
    await link.aclose()
    p50, p99 = (statistics.quantiles(times_us, n=100)[i] for i in (49, 98))
    return [
        Row("16 KB frame, round trip p50, us", p50, 150),
        Row("  99th percentile, us", p99),
        Row("8 MB frame, one way, MB/s", statistics.median(speeds), 500, "at least"),
    ]


def forward(nbytes: int) -> Frame:
    """A frame as sessions send them."""
    message = Forward(session="bench", epoch=0, stage_idx=0, step=0, position=0, n_return=1)
    return Frame(message=message, tensors={"hidden": Tensor("u8", (nbytes,), bytes(nbytes))})


async def echo_to(port: int) -> None:
    """As `echo`, on a connection of its own making."""
    connection = socket.create_connection(("127.0.0.1", port))  # loopback: at once
    await echo(await connect(connection, is_dialer=True))


def link_rows(loop: str = "uvloop") -> list[Row]:
    """Start the other process and measure."""
    with (
        asyncio.Runner(loop_factory=LOOPS[loop]) as runner,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        port = server.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "benchmarks.bench_link",
            "--loop",
            loop,
            "--echo",
            str(port),
        ]
        with subprocess.Popen(command):
            connection, _ = server.accept()
            return runner.run(measure(connection))


def main() -> None:
    """Be the other process, or measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", choices=LOOPS, default="uvloop")
    parser.add_argument("--echo", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.echo:
        with asyncio.Runner(loop_factory=LOOPS[options.loop]) as runner:
            runner.run(echo_to(options.echo))
        return
    report(link_rows(options.loop))


if __name__ == "__main__":
    main()
