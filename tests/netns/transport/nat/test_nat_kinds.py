"""Real routers in the lab: members name each kind of NAT right, and ports are opened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from testbed.namespaces import LabUnavailable, check_available

ROOT = Path(__file__).parents[4]

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(240)]

Said = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def said() -> Said:
    """What every host of `support.nat_lab` found out."""
    try:
        check_available()
    except LabUnavailable as error:
        pytest.skip(str(error))
    # The lab is not installed: it is found in the checkout, which pytest's runs keep off.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    paths = [str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "support.nat_lab"],
        capture_output=True,
        text=True,
        check=False,
        timeout=230,
        env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr
    found: Said = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("host", "udp", "tcp"),
    [
        ("open", "open", "open"),
        ("cone", "full_cone", "full_cone"),
        ("conu", "full_cone", "port_restricted"),
        ("addr", "address_restricted", "address_restricted"),
        ("port", "port_restricted", "port_restricted"),
        ("sym", "symmetric", "symmetric"),
        ("office", "blocked", "port_restricted"),
        ("mobile", "port_restricted", "port_restricted"),  # two routers in a row
        ("sym, one observer", "symmetric", "symmetric"),
        ("port, one observer", "port_restricted", "port_restricted"),
    ],
)
def test_two_members_name_the_nat(said: Said, host: str, udp: str, tcp: str) -> None:
    facts = said[host]["facts"]
    assert (facts["udp"], facts["tcp"]) == (udp, tcp), said[host]["steps"]
    assert facts["n_observers"] == (1 if "one" in host else 2)
    assert facts["is_reachable"] == (host == "open")
    assert len(facts["public_hosts"]) == 1


@pytest.mark.parametrize("host", ["upnp", "upnp only"])
def test_a_router_opens_the_port_and_it_is_reached(said: Said, host: str) -> None:
    facts = said[host]["facts"]
    (public_host,) = facts["public_hosts"]
    assert facts["mapped_addresses"] == [f"{public_host}:4000"]


@pytest.mark.parametrize("host", ["upnp again", "upnp only, again"])
def test_a_mapped_port_is_given_back_at_the_end(said: Said, host: str) -> None:
    facts = said[host]["facts"]
    assert not facts["is_reachable"]
    assert facts["mapped_addresses"] == []


def test_a_mapping_behind_a_carriers_router_is_not_announced(said: Said) -> None:
    assert said["mobile"]["facts"]["mapped_addresses"] == []
    assert "no public address" in said["mobile"]["mapping"]


def test_a_firewall_without_translation_is_seen_as_a_filter(said: Said) -> None:
    facts = said["six"]["facts"]
    assert (facts["udp"], facts["tcp"]) == ("port_restricted", "port_restricted")
    assert set(facts["public_hosts"]) <= set(facts["lan_hosts"])


def test_a_host_that_moves_notices_and_finds_out_anew(said: Said) -> None:
    kinds = [said[when]["facts"]["udp"] for when in ("before the walk", "after the walk")]
    assert kinds == ["port_restricted", "symmetric"]
    on_the_way = said["on the way"]["facts"]
    assert on_the_way["udp"] == "unknown"
    assert on_the_way["lan_hosts"] == said["after the walk"]["facts"]["lan_hosts"]
