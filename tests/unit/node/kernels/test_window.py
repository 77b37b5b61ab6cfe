"""The window on files: what comes in when, and what happens when a disk fails."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from covey.node.disk import ColdFile
from covey.node.kernels.block_source import fewest_streamed, places_to_stream, span_bytes
from covey.node.kernels.errors import WeightsUnreadable
from covey.node.kernels.window import Extent, Window

N_EXTENTS, EXTENT_BYTES = 5, 10_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"".join(bytes([i]) * EXTENT_BYTES for i in range(N_EXTENTS)))
    return path


@pytest.fixture
def window(path: Path) -> Iterator[Window]:
    window = open_window(path)
    yield window
    window.close()


def open_window(path: Path, n_extents: int = N_EXTENTS, n_places: int = 2) -> Window:
    file = ColdFile(path)
    extents = [Extent(file, i * EXTENT_BYTES, EXTENT_BYTES) for i in range(n_extents)]
    return Window(extents, n_places)


def is_extent(data: np.ndarray[tuple[int], np.dtype[np.uint8]], idx: int) -> bool:
    return len(data) == EXTENT_BYTES and bool((data == idx).all())


def test_passes_follow_one_another(window: Window) -> None:
    for idx in [*range(N_EXTENTS)] * 3:
        assert is_extent(window.take(idx), idx)
        window.release()
    assert window.facts.n_passes == 3
    assert window.facts.read_bytes >= 3 * N_EXTENTS * EXTENT_BYTES


def test_the_first_extent_comes_in_while_the_last_is_used(window: Window, path: Path) -> None:
    for idx in range(N_EXTENTS):
        window.take(idx)
    wait_for_bytes(window, N_EXTENTS + 1)
    path.write_bytes(b"")  # whatever is read from here on fails
    window.release()
    assert is_extent(window.take(0), 0)


def test_what_is_held_stays_while_the_next_is_read(window: Window) -> None:
    held = window.take(0)
    wait_for_bytes(window, 2)
    assert is_extent(held, 0)
    assert is_extent(window.take(0), 0)  # the same again, not a pass later
    assert window.facts.n_passes == 0


def test_no_more_is_read_than_finds_room(window: Window) -> None:
    window.take(0)
    wait_for_bytes(window, 2)
    assert window.memory_bytes <= 2 * (2 << 20)
    assert window.facts.read_bytes == 2 * EXTENT_BYTES


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    order=st.lists(st.tuples(st.integers(0, N_EXTENTS - 1), st.booleans()), max_size=12),
    n_extents=st.integers(1, N_EXTENTS),
    n_places=st.integers(1, 4),
)
def test_any_order_gives_what_was_asked_for(
    path: Path, order: list[tuple[int, bool]], n_extents: int, n_places: int
) -> None:
    window = open_window(path, n_extents, n_places)
    try:
        for idx, is_released in order:
            assert is_extent(window.take(idx % n_extents), idx % n_extents)
            if is_released:
                window.release()
    finally:
        window.close()


def test_what_finds_room_together_is_read_once(path: Path) -> None:
    window = open_window(path, n_extents=2)
    for idx in [0, 1] * 4:
        assert is_extent(window.take(idx), idx)
        window.release()
    assert window.facts.read_bytes == 2 * EXTENT_BYTES
    window.close()


def test_a_failure_is_told_and_the_next_try_may_succeed(window: Window, path: Path) -> None:
    content = path.read_bytes()
    window.take(0)
    wait_for_bytes(window, 2)
    path.write_bytes(b"")  # the same file, cut short
    assert is_extent(window.take(1), 1)  # was in memory by then
    window.release()
    for _ in range(2):
        with pytest.raises(WeightsUnreadable, match="shorter"):
            window.take(2)
    path.write_bytes(content)
    assert is_extent(window.take(2), 2)


def test_whoever_waits_when_a_window_closes_is_told(path: Path) -> None:
    window = open_window(path)
    wait_for_bytes(window, 2)
    window.close()
    with pytest.raises(WeightsUnreadable, match="closed"):
        window.take(2)


def test_a_window_that_nobody_holds_ends_its_thread(path: Path) -> None:
    before = set(threading.enumerate())
    window = open_window(path)
    [thread] = set(threading.enumerate()) - before
    del window
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


@given(n_blocks=st.integers(1, 80), data=st.data())
def test_streamed_blocks_are_spread_evenly(n_blocks: int, data: st.DataObject) -> None:
    n_streamed = data.draw(st.integers(0, n_blocks))
    places = sorted(places_to_stream(n_blocks, n_streamed))
    assert len(places) == n_streamed
    assert all(0 <= at < n_blocks for at in places)
    around = [
        b - a
        for a, b in zip(places, [*places[1:], *(p + n_blocks for p in places[:1])], strict=True)
    ]
    assert not around or max(around) - min(around) <= 1


@given(
    sizes=st.lists(st.integers(1, 10**9), min_size=1, max_size=40),
    memory=st.integers(0, 10**10),
)
def test_no_fewer_blocks_could_be_streamed(sizes: list[int], memory: int) -> None:
    n_streamed = fewest_streamed(sizes, memory)
    if n_streamed is None:
        assert span_bytes(sizes, len(sizes)) > memory
        return
    assert span_bytes(sizes, n_streamed) <= memory
    assert all(span_bytes(sizes, fewer) > memory for fewer in range(n_streamed))


def wait_for_bytes(window: Window, n_extents: int) -> None:
    """Until so many were read."""
    state = window._state
    with state.changed:
        assert state.changed.wait_for(
            lambda: state.read_bytes >= n_extents * EXTENT_BYTES, timeout=10
        )
