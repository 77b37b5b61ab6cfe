"""A relay's receive buffer follows the speed at which its bytes are carried on."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from covey.transport.relay.window import AHEAD_S, MIN_WINDOW_BYTES, Window

pytestmark = pytest.mark.network


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as dialled,
        server.accept()[0],
    ):
        yield dialled


def buffer_of(connection: socket.socket) -> int:
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP)


def test_it_begins_small_and_grows_with_the_speed(connection: socket.socket) -> None:
    window = Window(connection, now=0.0)
    assert buffer_of(connection) == MIN_WINDOW_BYTES
    for n in range(1, 5):
        window.count(100_000, now=n / 10)
    assert buffer_of(connection) == pytest.approx(1e6 * AHEAD_S, rel=0.01)
    window.count(1000, now=5.0)
    assert buffer_of(connection) == MIN_WINDOW_BYTES


def test_small_changes_are_let_pass(connection: socket.socket) -> None:
    window = Window(connection, now=0.0)
    window.count(1_000_000, now=1.0)
    before = buffer_of(connection)
    window.count(1_100_000, now=2.0)
    assert buffer_of(connection) == before


def test_a_connection_that_is_gone_is_nobodys_concern_here(connection: socket.socket) -> None:
    window = Window(connection, now=0.0)
    connection.close()
    window.count(10_000_000, now=1.0)
