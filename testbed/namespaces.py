"""Hosts in network namespaces, joined by veth pairs, inside one `unshare` that the kernel clears.

Works without root where user namespaces are allowed. Everything here must run inside `entered`:
its mounts, namespaces and processes end with the lab's first process, however that ends.
Addresses are of documentation ranges (RFC 5737), so nothing can leak.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INSIDE = "COVEY_LAB_INSIDE"  # set in the environment of the process that runs the lab
_ENTER = ("unshare", "-Urnm", "--pid", "--fork", "--kill-child", "--mount-proc")


class LabUnavailable(RuntimeError):
    """This machine cannot make namespaces; the text says which part failed and why."""


def check_available() -> None:
    """Try to enter the namespaces a lab needs, and leave them.

    Raises:
        LabUnavailable: it does not work here.
    """
    for command in ((*_ENTER, "true"), ("ip", "-V")):
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
    command = [*_ENTER, sys.executable, "-m", module, *arguments]
    return subprocess.run(command, check=False, env={**os.environ, INSIDE: "1"}).returncode


def prepare() -> Path:
    """Give the lab its own /run, for named namespaces and for files; once, before the first host.

    Returns:
        A folder in memory that is gone with the lab.
    """
    _run("mount", "-t", "tmpfs", "none", "/run")
    Path("/run/netns").mkdir()
    folder = Path("/run/lab")
    folder.mkdir()
    return folder


@dataclass(frozen=True, slots=True)
class Host:
    """One emulated machine: a network namespace with nothing but its loopback at first."""

    name: str

    @classmethod
    def create(cls, name: str) -> Host:
        """Make it."""
        host = cls(name)
        _run("ip", "netns", "add", name)
        host.ip("link", "set", "lo", "up")
        return host

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command so that it runs on this host, under the same pid."""
        return ("ip", "netns", "exec", self.name)

    def remove(self) -> None:
        """Take it away, with its ends of cables."""
        _run("ip", "netns", "delete", self.name)

    def ip(self, *arguments: str) -> None:
        """Run `ip` on this host."""
        _run("ip", "-n", self.name, *arguments)


def join_by_cable(left: Host, right: Host, *, left_address: str, right_address: str) -> None:
    """Connect two hosts by a veth pair; addresses are like 198.51.100.1/24.

    A default route over the cable lets multicast, and so mDNS, leave.
    """
    _run(
        *("ip", "link", "add", "eth0", "netns", left.name),
        *("type", "veth", "peer", "name", "eth0", "netns", right.name),
    )
    for host, address in ((left, left_address), (right, right_address)):
        host.ip("addr", "add", address, "dev", "eth0")
        host.ip("link", "set", "eth0", "up")
        host.ip("route", "add", "default", "dev", "eth0")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode != 0:
        raise LabUnavailable(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
