"""Prove every kind of NAT, and with --matrix connect two members through each pair of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import Row

from testbed.lab import Lab
from testbed.labs import nat_matrix
from testbed.nat import Nat, NatKind
from testbed.topology import Host, Router, Topology

FLAVOURS = tuple(
    Nat(kind, cone_for_tcp=cone_for_tcp)
    for kind in NatKind
    if kind is not NatKind.OPEN
    for cone_for_tcp in ((True, False) if kind.is_cone else (True,))
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Whether to connect members, and through which pairs of NATs."""
    parser.add_argument("--matrix", action="store_true", help="connect members through each pair")
    parser.add_argument(
        "--flavour",
        choices=("both", "tcp-cones", "udp-only-cones"),
        default="both",
        help="whether cones are cones for TCP too",
    )
    parser.add_argument(
        "--only",
        action="append",
        type=nat_matrix.parse_pair,
        metavar="KIND,KIND",
        help="this pair, as 'open,symmetric'",
    )
    parser.add_argument("--relays", type=int, choices=(1, 2), default=2, help="public members")
    parser.add_argument("--capture", action="store_true", help="record the packets of failed pairs")


def measure(folder: Path, options: argparse.Namespace) -> Sequence[Row]:
    """Prove every kind, or all that the matrix uses and then connect through them."""
    if not options.matrix:
        return _prove_gallery()
    rows: list[Row] = []
    for flavour in ("tcp-cones", "udp-only-cones"):
        if options.flavour in (flavour, "both"):
            print(f"--- {flavour}", flush=True)
            rows += nat_matrix.measure(
                options.only or nat_matrix.all_pairs(),
                cone_for_tcp=flavour == "tcp-cones",
                n_relays=options.relays,
                has_captures=options.capture,
            )
    return rows


def _prove_gallery() -> list[Row]:
    with Lab(gallery()) as lab:
        found = lab.prove()
    for name, (udp, tcp) in found.items():
        print(f"{name:12} {udp or 'no UDP':20} {tcp or 'no TCP'}")
    return [Row("hosts whose NAT is what it says", len(found), len(found), "at least")]


def gallery() -> Topology:
    """A host behind each kind of router, an open one, one behind two routers, one without UDP."""
    port_restricted = Nat(NatKind.PORT_RESTRICTED)
    routers = [Router(name=f"r{idx}", nat=nat) for idx, nat in enumerate(FLAVOURS)]
    hosts = [Host(name=f"h{idx}", at=router.name) for idx, router in enumerate(routers)]
    routers += [
        Router(name="carrier", nat=port_restricted),
        Router(name="home", at="carrier", nat=Nat(NatKind.FULL_CONE)),
        Router(name="office", nat=Nat(NatKind.PORT_RESTRICTED, blocks_udp=True)),
    ]
    hosts += [
        Host(name="open"),
        Host(name="mobile", at="home"),
        Host(name="clerk", at="office"),
    ]
    return Topology(routers=tuple(routers), hosts=tuple(hosts))
