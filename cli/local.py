"""The node that runs on this machine, for commands that make no sense without one."""

from __future__ import annotations

from pathlib import Path

from covey.client import Client, LocalNode, NoLocalNode, default_home, find_local_node


def local_node(home: Path | None) -> LocalNode:
    """Where it is; raises NoLocalNode if none runs."""
    folder = home or default_home()
    node = find_local_node(folder)
    if node is None:
        raise NoLocalNode(
            f"no node runs with the home {folder}: start one with `covey up` or `covey join`"
        )
    return node


def local_client(home: Path | None, *, timeout_s: float = 30.0) -> Client:
    """A client of the node that runs with this home.

    Unlike `Client(home=...)` it never starts a node: an invite of one that only lives for this
    command would be worth nothing, and its status says nothing of the swarm.

    Args:
        timeout_s: how long an answer may take to come; more for what the node has to work out.

    Raises:
        NoLocalNode: none runs.
    """
    node = local_node(home)
    return Client(node.url, api_key=node.key, timeout=timeout_s)
