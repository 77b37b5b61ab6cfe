"""Sockets within one machine, under a name that only the two ends of a lane can know.

The names are Linux's abstract ones: no file is left behind, and two network namespaces, containers
or emulated hosts, never meet.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import sys

from covey.transport.errors import LinkBroken

HAS_LOCAL = sys.platform == "linux"


def listen_local(key: bytes) -> socket.socket | None:
    """A listening socket for the holder of `key`; None where there is no such thing."""
    if not HAS_LOCAL:
        return None
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(_name(key))
        listening.listen(1)
        listening.setblocking(False)
    except OSError:  # a container may forbid it
        listening.close()
        return None
    return listening


async def connect_local(key: bytes) -> socket.socket:
    """A connection to whoever listens under `key` on this machine; answers at once.

    Raises:
        LinkBroken: nobody does.
    """
    if not HAS_LOCAL:
        raise LinkBroken("this system has no sockets within the machine")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(connection, _name(key))
    except OSError as error:
        connection.close()
        raise LinkBroken("the peer is not on this machine") from error
    except BaseException:
        connection.close()
        raise
    return connection


def _name(key: bytes) -> bytes:
    return b"\0covey-lane-" + hmac.digest(key, b"covey lane name", "sha256").hex().encode()
