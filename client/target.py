"""Which node a client talks to, from what its caller gave; and what the HTTP library may raise."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import httpx

from .errors import ClientError, ConnectionLost, NoLocalNode
from .head import HeadOnlyNode
from .local import LocalNode, default_home, find_local_node
from .protocol import base_url

INVITE_PREFIX = "covey1"
CONNECT_TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 16 * 1024 * 1024  # of an answer that is not a stream


@dataclass(frozen=True, slots=True)
class Target:
    """A node to talk to."""

    url: str  # without a path
    key: str | None


@dataclass(frozen=True, slots=True)
class HeadToStart:
    """No node yet: a head-only one is to be started; see `HeadOnlyNode`."""

    invite: str | None
    home: Path | None

    def start(self) -> HeadOnlyNode:
        """Start it; the caller waits for it and closes it."""
        return HeadOnlyNode(invite=self.invite, home=self.home)


def find_target(
    url_or_invite: str | None, *, api_key: str | None, home: Path | None
) -> Target | HeadToStart:
    """Decide where to go; starts nothing.

    Raises:
        NoLocalNode: nothing was given, no node runs, and `home` has no swarm to return to.
        ClientError: neither a URL nor an invite.
    """
    if url_or_invite is None:
        home = default_home() if home is None else home
        if (node := find_local_node(home)) is not None:
            return target_of(node, api_key)
        if (home / "swarm.json").is_file():
            return HeadToStart(invite=None, home=home)
        raise NoLocalNode(
            "no node runs on this machine: start one with `covey up` or `covey join INVITE`, "
            "or give the client a URL or an invite"
        )
    given = url_or_invite.strip()
    if given.startswith(INVITE_PREFIX):
        return HeadToStart(invite=given, home=None)
    if given.startswith(("http://", "https://")):
        return Target(base_url(given), api_key)
    raise ClientError("neither a URL (http://...) nor an invite (covey1...)")


def target_of(node: LocalNode, api_key: str | None) -> Target:
    """A node of this machine; its own key opens everything, control included."""
    return Target(base_url(node.url), node.key if api_key is None else api_key)


class HttpSettings(TypedDict):
    """Keywords of both httpx clients."""

    base_url: str
    headers: dict[str, str]
    timeout: httpx.Timeout
    trust_env: bool


def http_settings(target: Target, timeout_s: float) -> HttpSettings:
    """How to talk to `target`.

    Raises:
        ClientError: the URL or the key cannot be sent.
    """
    headers = {}
    if target.key is not None:
        if not target.key.isascii() or not target.key.isprintable():
            raise ClientError("the API key has characters that no header can carry")
        headers["Authorization"] = f"Bearer {target.key}"
    try:
        host = httpx.URL(target.url).host
    except httpx.InvalidURL as error:
        raise ClientError(f"{target.url!r} is not a URL: {error}") from error
    return HttpSettings(
        base_url=target.url,
        headers=headers,
        timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
        trust_env=not _is_loopback(host),  # a proxy cannot reach this machine's loopback
    )


@contextmanager
def translated(url: httpx.URL) -> Iterator[None]:
    """Turn what httpx raises for a broken connection into `ConnectionLost`."""
    node = f"{url.scheme}://{url.netloc.decode()}"
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ConnectionLost(f"no node answers at {node}: is it running?") from error
    except httpx.TimeoutException as error:
        raise ConnectionLost(f"the node at {node} fell silent") from error
    except (httpx.TransportError, httpx.StreamError, httpx.DecodingError) as error:
        raise ConnectionLost(f"the connection to {node} broke") from error


def without_nones(**values: Any) -> dict[str, Any]:
    """Query parameters, less those that were not given."""
    return {name: value for name, value in values.items() if value is not None}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
