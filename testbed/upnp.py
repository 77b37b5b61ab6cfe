"""A router that opens ports when asked: miniupnpd, as in most real ones (UPnP IGD and NAT-PMP)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network
from pathlib import Path
from tempfile import TemporaryDirectory

from .namespaces import LabUnavailable, Namespace
from .nat import LAN, TABLE, WAN

PROGRAM = "/usr/sbin/miniupnpd"


def is_available() -> bool:
    """Whether the program is installed (Debian's `miniupnpd-nftables`)."""
    return Path(PROGRAM).exists()


@contextmanager
def serving(router: Namespace, inside: IPv4Network) -> Iterator[None]:
    """Let `router` open ports for hosts in `inside`, until the block ends.

    Raises:
        LabUnavailable: miniupnpd is not installed.
    """
    if not is_available():
        raise LabUnavailable(f"{PROGRAM} is missing (apt install miniupnpd-nftables)")
    with TemporaryDirectory() as folder:
        config = Path(folder, "miniupnpd.conf")
        config.write_text(_config(inside))
        with Path(folder, "log").open("wb") as log:
            process = subprocess.Popen(
                [*router.prefix, PROGRAM, "-d", "-f", str(config), "-P", f"{folder}/pid"],
                stdout=log,
                stderr=log,
            )
            try:
                yield
            finally:
                process.kill()
                process.wait()


def _config(inside: IPv4Network) -> str:
    return f"""ext_ifname={WAN}
listening_ip={LAN}
http_port=5000
enable_upnp=yes
enable_natpmp=yes
ipv6_disable=yes
secure_mode=yes
upnp_table_name={TABLE}
upnp_nat_table_name={TABLE}
uuid=cb0848e0-967d-471e-b067-6af007ffb894
allow 1024-65535 {inside} 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
"""
