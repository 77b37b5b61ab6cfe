"""Whether other processes still run: the parent of a node, or a node that was asked to stop."""

from __future__ import annotations

import asyncio
import time

import psutil

from covey.errors import CoveyError

POLL_S = 0.5
SYNC_POLL_S = 0.05


async def until_gone(pid: int) -> None:
    """Return when the process `pid` has ended; at once if it had ended before."""
    process = _find(pid)
    while _is_running(process):  # noqa: ASYNC110  nothing tells us of a process that is no child
        await asyncio.sleep(POLL_S)


def wait_until_gone(pid: int, timeout_s: float) -> None:
    """Block until the process `pid` has ended.

    Raises:
        CoveyError: it still runs after `timeout_s`.
    """
    process, give_up_at = _find(pid), time.monotonic() + timeout_s
    while _is_running(process):
        if time.monotonic() > give_up_at:
            raise CoveyError(f"process {pid} still runs after {timeout_s:g} s")
        time.sleep(SYNC_POLL_S)


def _find(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def _is_running(process: psutil.Process | None) -> bool:
    """Not so for a zombie, nor for another program that was given the same id meanwhile."""
    if process is None:
        return False
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
