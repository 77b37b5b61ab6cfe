"""lattica, the rival, called over its own RPC: a server and a caller in processes of their own.

It is a wheel, installed once into the user's cache. Its server calls `pickle.loads` on what it
is sent, so both processes stay on loopback, and end with the benchmark.
"""

from __future__ import annotations

import importlib
import json
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .installs import cache_folder, install

VERSION = "1.0.21"
_CONNECT_S = 20.0
_ANSWER_S = 30  # lattica takes whole seconds


def ensure_installed() -> Path:
    """The folder to put on sys.path; filled at first use.

    Raises:
        CannotBuild: no network, or no wheel for this machine.
    """
    folder = cache_folder() / f"lattica-{VERSION}"
    if not folder.is_dir():
        install(folder, ["--only-binary", ":all:", f"lattica=={VERSION}"])
    return folder


class Caller:
    """A process that calls another's method, one block of calls after the other."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._stdin, self._stdout = _pipes(process)

    def calls_per_s(self, nbytes: int, in_flight: int, n_calls: int) -> float:
        """The speed of `n_calls` with that payload each, so many of them under way at once."""
        self._stdin.write(json.dumps([nbytes, in_flight, n_calls]) + "\n")
        self._stdin.flush()
        return float(self._stdout.readline())


@contextmanager
def running_pair() -> Generator[Caller]:
    """A server and a caller that has reached it.

    Raises:
        CannotBuild: as `ensure_installed`.
    """
    site = ensure_installed()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with _child("serve", str(site), str(port)) as server:
        peer_id = _pipes(server)[1].readline().strip()
        with _child("call", str(site), str(port), peer_id) as caller:
            _pipes(caller)[1].readline()  # it has connected
            yield Caller(caller)


@contextmanager
def _child(*arguments: str) -> Generator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.lattica_rpc", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    if process.stdin is None or process.stdout is None:
        raise ValueError("a child without pipes")
    return process.stdin, process.stdout


# --- inside the children -----------------------------------------------------------------------


def _node(site: str, port: int, bootstraps: list[str]) -> tuple[Any, Any]:
    """A node of lattica with nothing on that is not needed, and its handler of calls."""
    sys.path.insert(0, site)
    lattica: Any = importlib.import_module("lattica")

    class Bench(lattica.ConnectionHandler):  # type: ignore[misc]  # seen at run time only
        """The method that both ends know."""

        @lattica.rpc_method  # type: ignore[untyped-decorator]
        def take(self, payload: bytes) -> bytes:
            """Answer with a word."""
            return b"taken"

    builder = lattica.Lattica.builder().with_listen_addrs([f"/ip4/127.0.0.1/tcp/{port}"])
    for switch in ("with_mdns", "with_upnp", "with_autonat", "with_dcutr"):
        builder = getattr(builder, switch)(False)
    if bootstraps:
        builder = builder.with_bootstraps(bootstraps)
    node = builder.build()
    return node, Bench(node)


def _serve(site: str, port: int) -> None:
    node, _ = _node(site, port, [])
    print(node.peer_id(), flush=True)
    sys.stdin.read()


def _call(site: str, port: int, peer_id: str) -> None:
    node, handler = _node(site, 0, [f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer_id}"])
    deadline = time.monotonic() + _CONNECT_S
    while peer_id not in node.get_all_peers():
        if time.monotonic() > deadline:
            raise TimeoutError("lattica does not reach its own server")
        time.sleep(0.05)
    stub = handler.get_stub(peer_id)
    print("connected", flush=True)
    for line in sys.stdin:
        nbytes, in_flight, n_calls = json.loads(line)
        payload = bytes(nbytes)
        under_way: deque[Any] = deque()
        started_at = time.perf_counter()
        for _ in range(n_calls):
            if len(under_way) == in_flight:
                under_way.popleft().result(_ANSWER_S)
            under_way.append(stub.take(payload))
        while under_way:
            under_way.popleft().result(_ANSWER_S)
        print(n_calls / (time.perf_counter() - started_at), flush=True)


if __name__ == "__main__":
    role, folder, at_port, *peer = sys.argv[1:]
    if role == "serve":
        _serve(folder, int(at_port))
    else:
        _call(folder, int(at_port), peer[0])
