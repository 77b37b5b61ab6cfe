"""Where a peer may be reached: "192.0.2.1:4000", "[2001:db8::1]:4000", "host.example:4000"."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable

import psutil

MAX_ADDRESSES = 16  # of one node; a machine with many virtual interfaces has more

_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


def format_address(host: str, port: int) -> str:
    """The text form; an IPv6 host goes in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(text: str) -> tuple[str, int]:
    """Host and port.

    Raises:
        ValueError: not an address.
    """
    host, _, port_text = text.rpartition(":")
    if not (port_text.isascii() and port_text.isdigit() and 0 < int(port_text[:6]) < 65536):
        raise ValueError(f"{text!r} has no port")
    if host.startswith("[") and host.endswith("]"):
        host = str(ipaddress.IPv6Address(host[1:-1]))
    elif not _HOST_NAME.fullmatch(host):
        raise ValueError(f"{text!r} has no host")
    return host, int(port_text)


def reachable_hosts(bound_host: str) -> Iterable[str]:
    """The hosts that lead to a socket bound to `bound_host`.

    For "0.0.0.0" and "::" every address of this machine but loopback and link-local ones, which
    mean something else (or need a zone) on another machine.
    """
    try:
        bound = ipaddress.ip_address(bound_host)
    except ValueError:
        return [bound_host]
    if not bound.is_unspecified:
        return [bound_host]
    family = socket.AF_INET6 if bound.version == 6 else socket.AF_INET
    hosts = [
        address.address
        for interface in psutil.net_if_addrs().values()
        for address in interface
        if address.family == family and "%" not in address.address
    ]
    found = [host for host in hosts if _is_global_enough(host)]
    return sorted(found, key=lambda host: not ipaddress.ip_address(host).is_global)


def _is_global_enough(host: str) -> bool:
    address = ipaddress.ip_address(host)
    return not (address.is_loopback or address.is_link_local)
