"""Measure every preset of links: round trip and rate, between two hosts.

One host hangs on a cable of that kind, the other on a plain one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import Row

from testbed.lab import Lab
from testbed.links import PRESETS, Link, Way
from testbed.topology import Host, Topology
from testbed.traffic import rate_mbit_per_s, rtt_ms

RATE_S = 2.0
RTT_SLACK_MS, RTT_SLACK_SHARE = 1.0, 0.05
RATE_SLACK_SHARE = 0.10


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which presets."""
    parser.add_argument("presets", nargs="*", type=_preset, help=", ".join(PRESETS))


def measure(folder: Path, options: argparse.Namespace) -> Sequence[Row]:
    """Each preset in a lab of its own."""
    names = options.presets or list(PRESETS)
    return [row for name in names for row in _measure_preset(name, PRESETS[name])]


def _preset(name: str) -> str:
    if name not in PRESETS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PRESETS)}")
    return name


def _measure_preset(name: str, link: Link) -> list[Row]:
    with Lab(Topology(hosts=(Host(name="near", link=link), Host(name="far")))) as lab:
        jitter_s = max(link.up.jitter_ms, link.down.jitter_ms) / 1e3
        found_ms = rtt_ms(lab, "near", "far", spacing_s=max(0.01, 5 * jitter_s))
        rows = [
            Row(f"{name}: RTT, ms", found_ms),
            Row(
                f"{name}: RTT beside {link.rtt_ms:g} ms, off by, ms",
                abs(found_ms - link.rtt_ms),
                RTT_SLACK_MS + RTT_SLACK_SHARE * link.rtt_ms,
            ),
        ]
        for word, way, pair in (
            ("up", link.up, ("near", "far")),
            ("down", link.down, ("far", "near")),
        ):
            rows += _measure_rate(lab, f"{name}: {word}", way, *pair)
    return rows


def _measure_rate(lab: Lab, figure: str, way: Way, sender: str, receiver: str) -> list[Row]:
    if way.mbit_per_s is None:
        return []
    found = rate_mbit_per_s(lab, sender, receiver, expected=way.mbit_per_s, seconds=RATE_S)
    expected = way.mbit_per_s * (1 - way.loss)
    return [
        Row(f"{figure}, Mbit/s", found),
        Row(
            f"{figure}, beside {expected:g} Mbit/s, off by a share of",
            abs(found / expected - 1),
            RATE_SLACK_SHARE,
        ),
    ]
