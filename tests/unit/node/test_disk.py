"""Files read past the system's cache, and the speed of a disk."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from covey.node.disk import ColdFile, disk_read_speed, forget, read_memory, room_for

CONTENT = np.random.default_rng(0).integers(0, 256, 300_001, dtype=np.uint8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT.tobytes())
    return path


def is_cached(path: Path) -> bool:
    """Whether the system holds the beginning of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(4096)], 0, os.RWF_NOWAIT) == 4096
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("offset", "n_bytes"),
    [(0, 4096), (0, 300_001), (64, 100), (4032, 128), (299_968, 33), (300_001, 0)],
)
def test_any_part_of_a_file_can_be_read(path: Path, offset: int, n_bytes: int) -> None:
    memory = read_memory(room_for(n_bytes))
    with ColdFile(path) as file:
        read = file.read_into(memory, offset, n_bytes)
        assert file.size == len(CONTENT)
    assert np.array_equal(read, CONTENT[offset : offset + n_bytes])
    assert offset % 64 or read.ctypes.data % 64 == 0


def test_what_lies_behind_the_end_is_not_made_up(path: Path) -> None:
    memory = read_memory(room_for(len(CONTENT) + 1))
    with ColdFile(path) as file, pytest.raises(OSError, match="shorter"):
        file.read_into(memory, 0, len(CONTENT) + 1)


def test_memory_must_have_room(path: Path) -> None:
    with ColdFile(path) as file, pytest.raises(ValueError, match="into"):
        file.read_into(read_memory(4096)[:4096], 0, 4096)


def test_a_file_without_a_name_can_still_be_read(path: Path) -> None:
    with ColdFile(path) as file:
        path.unlink()
        read = file.read_into(read_memory(room_for(4096)), 0, 4096)
    assert np.array_equal(read, CONTENT[:4096])


def test_reading_leaves_nothing_in_the_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        forget(file.fileno())
    with ColdFile(path) as cold:
        cold.read_into(read_memory(room_for(len(CONTENT))), 0, len(CONTENT))
        assert not (cold.is_direct and is_cached(path))


def test_a_disk_has_a_speed_whether_a_file_is_cached_or_not(path: Path) -> None:
    assert disk_read_speed(path) > 1.0
    (path.parent / "index.json").write_text("{}")
    assert disk_read_speed(path.parent / "index.json") > 1.0  # of the file beside it
    assert disk_read_speed(path.parent) > 1.0


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing"):
        disk_read_speed(tmp_path)
