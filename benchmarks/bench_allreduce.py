"""What adding up a vector over a group costs, from the compute thread and back.

    make bench-allreduce

Every member is a process with a mesh, and lanes agreed over its links. On loopback 4 KB (2048
halves on the wire, added in fp32) over TLS and over the same-host path, in turn; the time of a call
is that at the member where its median is longest. Then a star of eight on `tpi-llm` links in the
lab, over what physics leaves it: a ping through the same links, and the bytes through the hub's
cable. An emulated cable lets what it carries in 2 ms pass at once (`testbed.cables`), so a small
star may be faster than that. Rings stand beside stars, for what each is good for. Needs an idle
machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

from testbed import namespaces
from testbed.lab import TOOLS, Lab
from testbed.links import PRESETS
from testbed.topology import Host, Topology
from testbed.traffic import rtt_ms

from covey.node.group.codec import encoded_bytes
from covey.transport.lane.lane import LaneKind

from .group_nodes import Group, NodeFailed, Place
from .rows import Row, report

KB = 1 << 10
N_ROUNDS = 9
N_WARM, N_CALLS = 200, 1000  # on loopback; the first are thrown away
SMALL, LARGE = 2048, 128 * KB  # values: 4 KB and 256 KB as halves

LINK, N_NODES, HUB = "tpi-llm", 8, "n0"
LAB_CALLS = 30
LAB_VALUES = (SMALL, 4 * SMALL)
FLOOR_RATIO = 1.25
RING_VALUES = (4 * SMALL, LARGE)  # where a ring is tried too
PARTS = ("loopback", "lab")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A group on loopback, how much it adds up, and the most that may take, us."""

    n_members: int
    kind: LaneKind
    n_values: int = SMALL
    forms_ring: bool = False
    target_us: float | None = None

    @property
    def figure(self) -> str:
        """What is measured, for people."""
        way = {"tls": "TLS", "local": "same-host path", "link": "links"}[self.kind]
        shape = "ring" if self.forms_ring else "star" if self.n_members > 2 else "direct"
        size = _size(self.n_values)
        return f"{size} all-reduce, {self.n_members} processes, {way}, {shape}: p50, us"


SETTINGS = (
    Setting(n_members=2, kind="tls", target_us=140),
    Setting(n_members=4, kind="tls", target_us=220),
    Setting(n_members=2, kind="local", target_us=60),
    Setting(n_members=4, kind="local"),
    Setting(n_members=4, kind="tls", forms_ring=True),
    Setting(n_members=4, kind="tls", n_values=LARGE),
    Setting(n_members=4, kind="tls", n_values=LARGE, forms_ring=True),
)


def main(argv: Sequence[str]) -> int:
    """Measure and report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="bench_allreduce", description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="run this part only")
    parser.add_argument("--rounds", type=int, default=N_ROUNDS)
    parser.add_argument(
        "--spin", type=float, nargs="+", metavar="US", help="how long waiting threads look: compare"
    )
    arguments = parser.parse_args(argv)
    try:
        if arguments.spin:
            report(_spin_rows([us / 1e6 for us in arguments.spin], arguments.rounds))
            return 0
        if arguments.only != "loopback" and not namespaces.is_inside():
            namespaces.check_available(TOOLS)
            return namespaces.enter("benchmarks.bench_allreduce", argv)
        rows = [] if arguments.only == "lab" else _loopback_rows(arguments.rounds)
        rows += [] if arguments.only == "loopback" else _lab_rows(arguments.rounds)
    except (namespaces.LabUnavailable, NodeFailed, ValueError, subprocess.SubprocessError) as error:
        print(f"could not be measured: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    report(rows)
    return 0


# --- on loopback ----------------------------------------------------------------------------------


def _loopback_rows(n_rounds: int) -> list[Row]:
    if namespaces.is_inside():
        namespaces.run("ip", "link", "set", "lo", "up")
    with ExitStack() as stack:
        groups = {
            setting: stack.enter_context(
                Group(
                    [Place()] * setting.n_members,
                    kinds=[setting.kind],
                    forms_ring=setting.forms_ring,
                )
            )
            for setting in SETTINGS
        }
        return [
            Row(setting.figure, 1e6 * median(found), setting.target_us)
            for setting, found in _in_turn(groups, n_rounds).items()
        ]


def _in_turn(groups: Mapping[Setting, Group], n_rounds: int) -> dict[Setting, list[float]]:
    found: dict[Setting, list[float]] = {setting: [] for setting in groups}
    for setting, group in groups.items():
        group.seconds(setting.n_values, N_WARM)
    for number in range(n_rounds):
        for setting, group in groups.items():
            n_calls = N_CALLS if setting.n_values == SMALL else N_CALLS // 10
            found[setting].append(group.seconds(setting.n_values, n_calls))
        _progress("loopback", number, n_rounds)
    return found


def _spin_rows(spins_s: Sequence[float], n_rounds: int) -> list[Row]:
    rows = []
    settings = [setting for setting in SETTINGS if setting.target_us is not None]
    for setting in settings:
        with ExitStack() as stack:
            groups = [
                stack.enter_context(
                    Group([Place()] * setting.n_members, kinds=[setting.kind], spin_s=spin_s)
                )
                for spin_s in spins_s
            ]
            taken = [
                [group.seconds(setting.n_values, N_CALLS) for group in groups]
                for _ in range(n_rounds)
            ]
        rows += [
            Row(f"{setting.figure}, spin {spin_s * 1e6:g} us", 1e6 * median(column))
            for spin_s, column in zip(spins_s, zip(*taken, strict=True), strict=True)
        ]
    return rows


# --- in the lab -----------------------------------------------------------------------------------


def _lab_rows(n_rounds: int) -> list[Row]:
    namespaces.prepare()
    link = PRESETS[LINK]
    if link.up.mbit_per_s is None:
        raise ValueError(f"{LINK} has no rate")
    bytes_per_s = link.up.mbit_per_s * 1e6 / 8
    hosts = tuple(Host(name=f"n{idx}", link=link) for idx in range(N_NODES))
    with Lab(Topology(hosts=hosts)) as lab, ExitStack() as stack:
        places = [Place(lab.address(host.name), lab.machines[host.name].prefix) for host in hosts]
        star, ring = (
            stack.enter_context(Group(places, kinds=["tls"], forms_ring=forms_ring))
            for forms_ring in (False, True)
        )
        pings_s, stars, rings = _lab_rounds(lab, star, ring, n_rounds)
    name = f"all-reduce, star of {N_NODES}, {LINK} links"
    rows = []
    for n_values in LAB_VALUES:
        through_hub_s = 2 * (N_NODES - 1) * encoded_bytes("fp16", n_values) / bytes_per_s
        ratios = [
            taken / (ping_s + through_hub_s)
            for taken, ping_s in zip(stars[n_values], pings_s, strict=True)
        ]
        figure = f"{_size(n_values)} {name}: over its floor"
        rows += [
            Row(figure, median(ratios), FLOOR_RATIO),
            Row("  its floor, ms", 1e3 * (median(pings_s) + through_hub_s)),
        ]
    rows.append(Row(f"ping on {LINK} links, ms", 1e3 * median(pings_s)))
    rows += [Row(f"{_size(n)} {name}: p50, ms", 1e3 * median(stars[n])) for n in stars]
    ring_name = name.replace("star", "ring")
    rows += [Row(f"{_size(n)} {ring_name}: p50, ms", 1e3 * median(rings[n])) for n in rings]
    return rows


def _lab_rounds(
    lab: Lab, star: Group, ring: Group, n_rounds: int
) -> tuple[list[float], dict[int, list[float]], dict[int, list[float]]]:
    """In turn: seconds of a ping, and by the number of values those of a star and of a ring."""
    pings_s: list[float] = []
    stars: dict[int, list[float]] = {n: [] for n in sorted({*LAB_VALUES, *RING_VALUES})}
    rings: dict[int, list[float]] = {n: [] for n in RING_VALUES}
    for group, by_size in ((star, stars), (ring, rings)):
        for n_values in by_size:
            group.seconds(n_values, LAB_CALLS // 3)
    for number in range(n_rounds):
        pings_s.append(rtt_ms(lab, f"n{1 + number % (N_NODES - 1)}", HUB) / 1e3)
        for n_values, taken in stars.items():
            taken.append(star.seconds(n_values, LAB_CALLS))
        for n_values, taken in rings.items():
            taken.append(ring.seconds(n_values, LAB_CALLS // 3))
        _progress("lab", number, n_rounds)
    return pings_s, stars, rings


def _size(n_values: int) -> str:
    return f"{encoded_bytes('fp16', n_values) // KB} KB"


def _progress(part: str, number: int, n_rounds: int) -> None:
    print(f"{part}: round {number + 1} of {n_rounds}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
