"""How the doctor's findings look to a person."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from covey.cli import doctor, main

FACTS: dict[str, Any] = {
    "nat": {
        "tcp": "port_restricted",
        "udp": "blocked",
        "port": 4000,
        "lan_hosts": ["192.168.1.2"],
        "public_hosts": ["11.0.9.9"],
    },
    "findings": [{"says": "The router opens no port.", "advice": "Switch on UPnP."}],
    "steps": [{"test": "TCP to 11.0.0.1:4000", "observer": "abcdefgh", "outcome": "seen as [x]"}],
    "relays": [{"peer_id": "p" * 52, "name": "cloud"}],
    "members": [
        {
            "peer_id": "k" * 52,
            "name": "kitchen",
            "link": {"kind": "relayed", "rtt_s": 0.031, "host": None, "address": None},
            "error": None,
            "tried": [
                {"way": "punch", "addresses": [], "took_s": 2.5, "failure": "nobody came"},
            ],
        },
        {"peer_id": "a" * 52, "name": "attic", "link": None, "error": "cannot reach", "tried": []},
    ],
}


class FakeClient:
    """A node that answers with the facts above."""

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def doctor(self) -> dict[str, Any]:
        return FACTS

    def ping(self, member: str, *, count: int) -> dict[str, Any]:
        return {
            "peer_id": "k" * 52,
            "name": member,
            "link": {"kind": "punched", "host": "11.0.9.8", "address": None},
            "sent": count,
            "answered": 3,
            "rtt_min_s": 0.001,
            "rtt_median_s": 0.002,
            "rtt_max_s": 1.5,
            "bandwidth_bytes_per_s": 5e6,
        }


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "local_client", lambda home: FakeClient())


def said(*arguments: str) -> str:
    done = CliRunner().invoke(main.app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.output


def test_findings_come_with_what_helps() -> None:
    text = said("doctor")
    assert "NAT for TCP: port restricted, for UDP: blocked" in text
    assert "What helps: Switch on UPnP." in text
    assert "reached through cloud" in text
    assert "dial each other at once, 2.5 s: nobody came" in text
    assert "attic: cannot reach" in text
    assert "seen as" not in text


def test_each_test_is_shown_if_asked_for() -> None:
    assert "seen as [x]" in said("doctor", "--verbose")


def test_a_ping_says_what_carries_the_link() -> None:
    text = said("ping", "kitchen", "--count", "4")
    assert "punched link, 11.0.9.8" in text
    assert "3 of 4 answered in time, 25% lost" in text
    assert "1.00 ms at best, 2.00 ms median, 1.50 s at worst" in text
    assert "throughput towards it 5.0 MB/s" in text
