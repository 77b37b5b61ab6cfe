"""What the kernel says of a connection's packets."""

from __future__ import annotations

import socket

from covey.transport.tcp_info import tcp_packets


def test_packets_of_a_connection_are_counted() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as near,
        server.accept()[0] as far,
    ):
        before = tcp_packets(near)
        near.sendall(b"x" * 100)
        assert far.recv(100)
        after = tcp_packets(near)
    assert before is not None
    assert after is not None
    assert after.n_sent > before.n_sent
    assert after.n_resent == 0
    assert tcp_packets(near) is None  # closed


def test_what_is_no_tcp_says_nothing() -> None:
    assert tcp_packets(None) is None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        assert tcp_packets(udp) is None
