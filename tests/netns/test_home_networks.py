"""Homes that are more than a NAT: a router that opens ports, IPv6, several hosts with one port."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from testbed import upnp
from testbed.lab import Lab
from testbed.nat import Nat, NatKind
from testbed.topology import Family, Host, Router, Topology

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(180)]

PORT = 7000
NAT = Nat(NatKind.PORT_RESTRICTED)


@pytest.fixture(scope="module")
def lab(inside: Path) -> Iterator[Lab]:
    """A home with everything, one with IPv6 only, and strangers."""
    if not upnp.is_available():
        pytest.skip("miniupnpd is not installed (apt install miniupnpd-nftables)")
    routers = (
        Router(name="home", nat=NAT, family=Family.DUAL, has_upnp=True),
        Router(name="new", nat=NAT, family=Family.V6),
        Router(name="cone", nat=Nat(NatKind.FULL_CONE)),
    )
    hosts = (
        Host(name="pc", at="home", family=Family.DUAL),
        Host(name="six", at="new", family=Family.V6),
        Host(name="one", at="cone"),
        Host(name="two", at="cone"),
        Host(name="stranger", family=Family.DUAL),
    )
    with Lab(Topology(routers=routers, hosts=hosts)) as built:
        yield built


def listener(lab: Lab, name: str, family: int = socket.AF_INET) -> socket.socket:
    made = lab.machines[name].socket(socket.SOCK_STREAM, family)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((lab.address(name, v6=family == socket.AF_INET6), PORT))
    made.listen()
    return made


def connects(lab: Lab, name: str, place: tuple[str, int], family: int = socket.AF_INET) -> bool:
    with closing(lab.machines[name].socket(socket.SOCK_STREAM, family)) as dialling:
        dialling.settimeout(0.5)
        try:
            dialling.connect(place)
        except TimeoutError:
            return False
    return True


def ask_natpmp(lab: Lab, request: bytes) -> bytes:
    gateway = str(lab.topology.network("home").gateways[0])
    with closing(lab.machines["pc"].socket(socket.SOCK_DGRAM)) as asking:
        asking.connect((gateway, 5351))
        for _ in range(20):  # the daemon may not listen yet
            asking.settimeout(0.25)
            asking.send(request)
            try:
                return asking.recv(64)
            except (TimeoutError, ConnectionRefusedError):
                continue
    pytest.fail("no answer by NAT-PMP")


def test_a_stranger_gets_in_only_where_a_port_was_opened(lab: Lab) -> None:
    place = (lab.address("home"), PORT)
    with closing(listener(lab, "pc")):
        assert not connects(lab, "stranger", place)
        answer = ask_natpmp(lab, struct.pack("!BBHHHI", 0, 2, 0, PORT, PORT, 60))  # RFC 6886, 3.3
        version, operation, result, _, inner, outer, _ = struct.unpack("!BBHIHHI", answer)
        assert (version, operation, result) == (0, 130, 0)
        assert (inner, outer) == (PORT, PORT)
        assert connects(lab, "stranger", place)


def test_the_router_tells_its_outer_address(lab: Lab) -> None:
    answer = ask_natpmp(lab, bytes(2))  # RFC 6886, 3.2
    assert socket.inet_ntoa(answer[8:12]) == lab.address("home")


def test_the_router_is_found_by_upnp(lab: Lab) -> None:
    search = (
        b"M-SEARCH * HTTP/1.1\r\nHOST: 239.255.255.250:1900\r\n"
        b'MAN: "ssdp:discover"\r\nMX: 1\r\n'
        b"ST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n\r\n"
    )
    with closing(lab.machines["pc"].socket(socket.SOCK_DGRAM)) as asking:
        asking.settimeout(5)
        asking.sendto(search, ("239.255.255.250", 1900))
        answer = asking.recv(2048).decode()
    gateway = lab.topology.network("home").gateways[0]
    assert f"LOCATION: http://{gateway}:5000" in answer


def test_ipv6_needs_no_translation_and_lets_no_stranger_in(lab: Lab) -> None:
    v6 = socket.AF_INET6
    with ExitStack() as stack:
        for name in ("stranger", "pc", "six"):
            stack.enter_context(closing(listener(lab, name, v6)))
        public = (lab.address("stranger", v6=True), PORT)
        assert connects(lab, "six", public, v6)
        assert connects(lab, "pc", public, v6)
        assert not connects(lab, "stranger", (lab.address("six", v6=True), PORT), v6)
        assert not connects(lab, "six", (lab.address("pc", v6=True), PORT), v6)


def test_who_has_only_ipv6_has_no_other_address(lab: Lab) -> None:
    with pytest.raises(ValueError, match="does not speak IPv4"):
        lab.address("six")


def test_a_cone_tells_two_hosts_with_one_port_apart(lab: Lab) -> None:
    place = lab.observer.places[0]
    with ExitStack() as stack:
        hosts = {}
        for name in ("one", "two"):
            hosts[name] = stack.enter_context(closing(lab.machines[name].socket(socket.SOCK_DGRAM)))
            hosts[name].bind((lab.address(name), PORT))
            hosts[name].settimeout(2)
            hosts[name].sendto(bytes(20), place)  # opens the mapping; the answer does not matter
        ports = {
            words["src"]: int(words["dport"])
            for line in lab.machines["cone"].run("conntrack", "-L", "-p", "udp").splitlines()
            if f"sport={PORT} " in line
            # The reply's port comes last and says where the outside sends to.
            for words in [_words(line)]
        }
        public = stack.enter_context(closing(lab.machines["stranger"].socket(socket.SOCK_DGRAM)))
        for name in hosts:
            outer = (lab.address("cone"), ports[lab.address(name)])
            public.sendto(name.encode(), outer)
            assert hosts[name].recv(64) == name.encode()


def _words(line: str) -> dict[str, str]:
    """Of a connection: where it is from, and the port at which answers come in."""
    pairs = [word.split("=") for word in line.split() if "=" in word]
    first_source = next(value for key, value in pairs if key == "src")
    return {**dict(pairs), "src": first_source}
