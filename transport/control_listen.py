"""The addresses that the control plane listens on, and those that others may dial.

Belongs to `control_node.py` and to the trio thread.
"""

from __future__ import annotations

import errno
import socket
from typing import Any

import psutil
from multiaddr import Multiaddr

from .control_records import ControlError


def dialable(address: str) -> list[str]:
    """A multiaddr /ip4|ip6/.../tcp/... that we listen on, as others may dial it.

    "Any address" becomes those of the interfaces; loopback only if there is no other.
    """
    _, protocol, host, rest = address.split("/", 3)
    if host not in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        return [address]
    family = socket.AF_INET if protocol == "ip4" else socket.AF_INET6
    hosts = sorted(
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == family and not entry.address.startswith(("169.254.", "fe80:"))
    )
    remote = [host for host in hosts if not host.startswith("127.") and host != "::1"]
    return [f"/{protocol}/{host}/{rest}" for host in remote or hosts]


def listen_address(host: str, port: int) -> Any:
    """The multiaddr to listen on."""
    return Multiaddr(f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}")


def check_free(host: str, port: int) -> None:
    """Refuse a port that another program listens on.

    libp2p binds with SO_REUSEPORT, so two nodes of one user would share the port without a word
    and each would get half of the connections.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            advice = "; stop the other program or choose another --port" if in_use else ""
            raise ControlError(
                f"cannot listen on {host} port {port}: {error.strerror or error}{advice}"
            ) from error
