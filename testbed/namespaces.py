"""Network namespaces inside one `unshare` that the kernel clears, and how to act in each of them.

Works without root where user namespaces are allowed. Everything here must run inside `enter`:
its mounts, namespaces and processes end with the lab's first process, however that ends. No
interface of it leads to the machine's own network, so nothing can leak.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.rows import Row

INSIDE = "COVEY_LAB_INSIDE"  # set in the environment of the process that runs the lab
PROMOTE = "COVEY_LAB_PROMOTE"  # names a descriptor, see `run_inside`
ENTER = ("unshare", "-Urnm", "--pid", "--fork", "--kill-child", "--mount-proc")
COMMAND_S = 30.0
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # where Debian keeps them
_CLONE_NEWNET = 0x40000000  # linux/sched.h
_CREDENTIALS = struct.Struct("iII")  # pid, user, group: struct ucred
_libc = ctypes.CDLL(None, use_errno=True)


class LabUnavailable(RuntimeError):
    """This machine cannot make a lab; the text says which part failed and why."""


class LabBroken(RuntimeError):
    """The lab is not what it says, so nothing measured in it would mean anything."""


class PartlyMeasured(RuntimeError):
    """A part of a lab could not be measured; carries the figures of the others."""

    def __init__(self, rows: Sequence[Row], failed: Sequence[str]) -> None:
        super().__init__(", ".join(failed))
        self.rows = rows


def check_available(tools: Iterable[str] = ()) -> None:
    """Try to enter the namespaces a lab needs, and leave them.

    Args:
        tools: programs that it needs besides; see `testbed.lab.TOOLS`.

    Raises:
        LabUnavailable: it does not work here.
    """
    missing = [tool for tool in tools if shutil.which(tool, path=_PATH) is None]
    if missing:
        raise LabUnavailable(f"not installed: {', '.join(missing)}")
    for command in ((*ENTER, "true"), ("ip", "-V")):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        except FileNotFoundError as error:
            raise LabUnavailable(
                f"`{command[0]}` is not installed (iproute2, util-linux)"
            ) from error
        if done.returncode != 0:
            said = done.stderr.strip() or f"exit status {done.returncode}"
            raise LabUnavailable(f"`{' '.join(command)}` does not work here: {said}")


def is_inside() -> bool:
    """Whether this process was started by `enter`."""
    return os.environ.get(INSIDE) == "1"


def enter(module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` inside namespaces of its own; returns its exit status."""
    return run_inside([sys.executable, "-m", module, *arguments]).returncode


def run_inside(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] = MappingProxyType({}),
    timeout_s: float | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a command inside namespaces of its own.

    Inside nobody has root's right to SCHED_FIFO any more, without which the lab's wire waits for a
    core like everybody else. So it asks this process, which gives it that if it may.

    Args:
        command: what to run.
        environment: added to this process's own.
        timeout_s: after that it is killed, and TimeoutExpired raised.
        options: of `subprocess.run`.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        threading.Thread(target=_promote, args=(ours,), daemon=True).start()
        return subprocess.run(
            [*ENTER, *command],
            check=False,
            text=True,
            timeout=timeout_s,
            env={**os.environ, **environment, INSIDE: "1", PROMOTE: str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            **options,
        )


def promotion() -> tuple[int, ...]:
    """The descriptor over which a process inside asks to be promoted, if there is one."""
    return (int(os.environ[PROMOTE]),) if PROMOTE in os.environ else ()


def _promote(asking: socket.socket) -> None:
    """Give every process that writes here real-time priority, if that is allowed."""
    with suppress(OSError):  # closed at the end, or not allowed
        while True:
            _, ancillary, _, _ = asking.recvmsg(1, socket.CMSG_SPACE(_CREDENTIALS.size))
            for _, _, data in ancillary:
                pid, _, _ = _CREDENTIALS.unpack(data)  # as seen from outside
                os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(1))


def prepare() -> Path:
    """Give the lab its own /run, for named namespaces and for files; once, before the first host.

    Returns:
        A folder in memory that is gone with the lab.
    """
    run("mount", "-t", "tmpfs", "none", "/run")
    Path("/run/netns").mkdir()
    folder = Path("/run/lab")
    folder.mkdir()
    return folder


@dataclass(frozen=True, slots=True)
class Namespace:
    """One emulated machine: nothing but its loopback at first."""

    name: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command so that it runs here, under the same pid."""
        return ("ip", "netns", "exec", self.name)

    def run(self, *command: str, stdin: str = "") -> str:
        """Run a command here and return what it printed. Raises LabUnavailable if it fails."""
        return run(*self.prefix, *command, stdin=stdin)

    def ip(self, *lines: str) -> None:
        """Run `ip` here, once for each line, all in one process."""
        run("ip", "-n", self.name, "-batch", "-", stdin="\n".join(lines))

    def links(self) -> str:
        """What `ip link` says of its interfaces, a line for each."""
        return run("ip", "-n", self.name, "-o", "link", "show")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is here until the block ends; only for what does not wait."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            self.stay()
            try:
                yield
            finally:
                _set_namespace(home)
        finally:
            os.close(home)

    def stay(self) -> None:
        """The calling thread is here from now on, with all sockets that it opens."""
        there = os.open(f"/run/netns/{self.name}", os.O_RDONLY)
        try:
            _set_namespace(there)
        finally:
            os.close(there)

    def socket(self, kind: socket.SocketKind, family: int = socket.AF_INET) -> socket.socket:
        """A socket of this machine: it stays here, whichever thread uses it."""
        with self.entered():
            return socket.socket(family, kind)

    def set(self, setting: str, value: int) -> None:
        """Write one of the kernel's settings that each namespace has of its own, as sysctl does.

        Raises:
            LabUnavailable: this kernel does not have it.
        """
        path = Path("/proc/sys", *setting.split("."))
        try:
            with self.entered():
                path.write_text(f"{value}\n")
        except OSError as error:
            raise LabUnavailable(f"{setting} cannot be set: {error.strerror}") from error


def create(names: Iterable[str]) -> dict[str, Namespace]:
    """Make a namespace for each name."""
    made = {name: Namespace(name) for name in names}
    run("ip", "-batch", "-", stdin="\n".join(f"netns add {name}" for name in made))
    for namespace in made.values():
        namespace.ip("link set lo up")
        # Nobody else has a new address here; to make sure would take the first second of IPv6.
        namespace.set("net.ipv6.conf.default.accept_dad", 0)
    return made


def remove(names: Iterable[str]) -> None:
    """Take namespaces away, with their ends of cables."""
    run("ip", "-batch", "-", stdin="\n".join(f"netns delete {name}" for name in names))


def join_by_cable(
    left: Namespace, right: Namespace, *, left_address: str, right_address: str
) -> None:
    """Connect two machines by a veth pair; addresses are like 198.51.100.1/24.

    A default route over the cable lets multicast, and so mDNS, leave.
    """
    run(
        *("ip", "link", "add", "eth0", "netns", left.name),
        *("type", "veth", "peer", "name", "eth0", "netns", right.name),
    )
    for namespace, address in ((left, left_address), (right, right_address)):
        namespace.ip(
            f"addr add {address} dev eth0", "link set eth0 up", "route add default dev eth0"
        )


def run(*command: str, stdin: str = "") -> str:
    """Run one of the system's tools and return what it printed.

    Raises:
        LabUnavailable: it is not installed, or it failed; the text has what it said.
    """
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, check=False, timeout=COMMAND_S
        )
    except FileNotFoundError as error:
        raise LabUnavailable(f"`{command[0]}` is not installed") from error
    if done.returncode != 0:
        raise LabUnavailable(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout


def _set_namespace(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
