"""Limits of memory: which one is used where, and that it is set."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from testbed.devices import MemoryLimit, memory_limit, own_copy

MB = 1 << 20


class FakeGroups:
    """A file system that makes a group's files when the group is made, as the kernel does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *files: str) -> None:
        real = Path.mkdir

        def mkdir(path: Path) -> None:
            real(path)
            for name in files:
                (path / name).touch()

        def rmdir(path: Path) -> None:
            self.removed.append(path)

        self.removed: list[Path] = []
        monkeypatch.setattr(Path, "mkdir", mkdir)
        monkeypatch.setattr(Path, "rmdir", rmdir)


def test_version_2_is_used_where_it_has_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = FakeGroups(monkeypatch, "memory.max", "cgroup.procs")
    with memory_limit("it", 200 * MB, root=tmp_path) as (kind, join):
        assert kind is MemoryLimit.CGROUP_V2
        assert (tmp_path / "it" / "memory.max").read_text() == f"{200 * MB}\n"
        join()
        assert (tmp_path / "it" / "cgroup.procs").read_text().strip().isdecimal()
    assert groups.removed == [tmp_path / "it"]


def test_version_1_has_memory_in_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory").mkdir()
    FakeGroups(monkeypatch, "memory.limit_in_bytes", "cgroup.procs")
    with memory_limit("it", 200 * MB, root=tmp_path) as (kind, _):
        assert kind is MemoryLimit.CGROUP_V1
        limit = tmp_path / "memory" / "it" / "memory.limit_in_bytes"
        assert limit.read_text() == f"{200 * MB}\n"


def test_without_control_groups_the_address_space_is_limited(tmp_path: Path) -> None:
    code = "import resource; print(resource.getrlimit(resource.RLIMIT_AS)[0])"
    with memory_limit("it", 1 << 40, root=tmp_path / "none") as (kind, join):
        said = subprocess.check_output([sys.executable, "-c", code], preexec_fn=join, text=True)
    assert kind is MemoryLimit.ADDRESS_SPACE
    assert int(said) == 1 << 40
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != 1 << 40  # ours is as it was


def test_each_node_gets_weights_of_its_own(tmp_path: Path) -> None:
    weights = tmp_path / "model.gguf"
    weights.write_bytes(b"weights")
    own = tmp_path / "own"
    own.mkdir()
    copy = own_copy(weights, own)
    assert copy.read_bytes() == b"weights"
    assert copy.stat().st_ino != weights.stat().st_ino
