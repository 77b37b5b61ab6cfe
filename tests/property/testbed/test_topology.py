"""Whatever the topology, nobody has somebody else's address; whatever the wire, order is kept."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from testbed.nat import Nat, NatKind, seen_through
from testbed.topology import INTERNET, Family, Host, Router, Topology
from testbed.wire import Way

kinds = st.sampled_from([kind for kind in NatKind if kind is not NatKind.OPEN])
nats = st.builds(Nat, kinds, cone_for_tcp=st.booleans(), blocks_udp=st.booleans())


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Trees of routers that speak both versions, with hosts anywhere."""
    networks = [INTERNET]
    routers = []
    for idx in range(draw(st.integers(0, 8))):
        at = draw(st.sampled_from(networks))
        routers.append(Router(name=f"r{idx}", at=at, nat=draw(nats), family=Family.DUAL))
        networks.append(f"r{idx}")
    hosts = [
        Host(name=f"h{idx}", at=draw(st.sampled_from(networks)), family=Family.DUAL)
        for idx in range(draw(st.integers(0, 12)))
    ]
    return Topology(routers=tuple(routers), hosts=tuple(hosts))


@given(topologies())
def test_addresses_on_a_network_are_of_it_and_of_one_member(topology: Topology) -> None:
    for at in (INTERNET, *(router.name for router in topology.routers)):
        network = topology.network(at)
        taken = [topology.addresses(it.name, at) for it in topology.members if it.name != at]
        for version, space in (("v4", network.v4), ("v6", network.v6)):
            addresses = [getattr(it, version) for it in taken]
            assert all(address in space for address in addresses)
            assert len({*addresses, *network.gateways, space[0]}) == len(addresses) + 3


@given(topologies())
def test_networks_do_not_overlap(topology: Topology) -> None:
    networks = [topology.network(at) for at in (INTERNET, *(it.name for it in topology.routers))]
    for idx, one in enumerate(networks):
        for other in networks[:idx]:
            assert not one.v4.overlaps(other.v4)
            assert not one.v6.overlaps(other.v6)


@given(st.lists(nats, max_size=4), nats)
def test_another_router_in_the_row_never_lets_more_through(row: list[Nat], added: Nat) -> None:
    (udp, tcp), (udp_then, tcp_then) = seen_through(row), seen_through([*row, added])
    assert tcp_then.strictness >= tcp.strictness
    assert udp_then is None or (udp is not None and udp_then.strictness >= udp.strictness)


@given(
    st.lists(st.tuples(st.integers(0, 10_000_000), st.floats(0, 50), st.floats(0, 20)), max_size=30)
)
def test_frames_keep_their_order(steps: Sequence[tuple[int, float, float]]) -> None:
    left, right = socket.socketpair()
    with left, right:
        way = Way(left, right, random.Random(1))
        now_ns, last_ns = 0, 0
        for passed_ns, delay_ms, jitter_ms in steps:
            now_ns += passed_ns
            way.change({"delay_ms": delay_ms, "jitter_ms": jitter_ms})
            due_ns = way.due(now_ns)
            assert due_ns is not None
            assert due_ns >= last_ns
            last_ns = due_ns
