"""The node of this machine: found by the `api.json` that it keeps in its home while it runs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import psutil

MAX_FILE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class LocalNode:
    """A running node: where its API is, the key to all of it, and its process."""

    url: str
    key: str
    pid: int


def default_home() -> Path:
    """`COVEY_HOME`, else the platform's folder for state."""
    if home := os.environ.get("COVEY_HOME"):
        return Path(home).expanduser()
    return platformdirs.user_state_path("covey")


def find_local_node(home: Path | None = None) -> LocalNode | None:
    """The node that runs with this home; None if there is none, or its file is not readable."""
    node = _read((default_home() if home is None else home) / "api.json")
    if node is None or not _is_running(node.pid):
        return None  # killed, or its file is half written
    return node


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # ended, not yet waited for
    except psutil.NoSuchProcess:
        return False


def _read(path: Path) -> LocalNode | None:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        facts = json.loads(data) if len(data) <= MAX_FILE_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(facts, dict):
        return None
    url, key, pid = facts.get("url"), facts.get("key"), facts.get("pid")
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        return None
    if not isinstance(key, str) or not key.isascii() or type(pid) is not int or pid <= 0:
        return None
    return LocalNode(url=url, key=key, pid=pid)
