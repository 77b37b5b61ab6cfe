"""The state folder: one node at a time, whole files, no secret for others to read."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from covey.node.errors import ConfigError
from covey.node.home import MAX_STATE_BYTES, Home, read_state


def test_a_second_node_in_one_home_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    with Home(tmp_path):
        with pytest.raises(ConfigError, match="a node runs in"):
            Home(tmp_path)
        with Home(tmp_path / "another"):
            pass
    with Home(tmp_path):
        pass


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from covey.node.home import Home;"
        "Home(Path(sys.argv[1])); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    with Home(tmp_path):
        pass


def test_a_node_that_ends_in_an_error_unlocks_its_home(tmp_path: Path) -> None:
    def fail() -> None:
        with Home(tmp_path) as home:
            home.publish_api("http://127.0.0.1:1", "key")
            raise ValueError("for the test")

    with pytest.raises(ValueError, match="for the test"):
        fail()
    assert not (tmp_path / "api.json").exists()
    with Home(tmp_path):
        pass


def test_a_new_home_is_for_its_owner_only(tmp_path: Path) -> None:
    with Home(tmp_path / "deep" / "home") as home:
        assert stat.S_IMODE(home.path.stat().st_mode) == 0o700


def test_files_are_for_their_owner_only_and_replaced_as_a_whole(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        before = os.umask(0)
        try:
            home.save("x.json", {"a": 1})
            home.save("x.json", {"b": "é"})
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o600
        assert home.load("x.json") == {"b": "é"}
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "x.json"]


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_no_litter(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        home.save("x.json", {"a": 1})
        with pytest.raises(TypeError):
            home.save("x.json", {"a": object()})
        assert home.load("x.json") == {"a": 1}
        (tmp_path / "folder").mkdir()
        with pytest.raises(ConfigError, match="cannot write"):
            home.save("folder", {})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "lock", "x.json"]


def test_the_api_file_says_where_and_who_and_goes_with_the_node(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        home.publish_api("http://127.0.0.1:1", "key")
        expected = {"url": "http://127.0.0.1:1", "key": "key", "pid": os.getpid()}
        assert read_state(tmp_path / "api.json") == expected
        assert stat.S_IMODE((tmp_path / "api.json").stat().st_mode) == 0o600
    assert not (tmp_path / "api.json").exists()


def test_the_api_file_of_a_killed_node_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "api.json").write_text(json.dumps({"url": "old"}))
    with Home(tmp_path):
        assert not (tmp_path / "api.json").exists()


def test_a_refused_second_node_leaves_the_first_ones_api_file(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        home.publish_api("http://127.0.0.1:1", "key")
        with pytest.raises(ConfigError):
            Home(tmp_path)
        assert (tmp_path / "api.json").exists()


def test_what_was_never_saved_is_none(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        assert home.load("x.json") is None
        home.remove("x.json")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1]",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": ' * 100_000,
        b'{"a": "' + b"x" * MAX_STATE_BYTES + b'"}',
    ],
    ids=["empty", "cut", "list", "string", "not UTF-8", "deep", "deep objects", "too large"],
)
def test_a_damaged_file_says_what_to_do(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with Home(tmp_path) as home, pytest.raises(ConfigError, match=r"x\.json is damaged: remove it"):
        home.load("x.json")


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()
    with pytest.raises(ConfigError, match="cannot read"):
        read_state(tmp_path / "x.json")


def test_a_home_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the state folder"):
        Home(tmp_path / "file" / "home")


def test_a_folder_that_nobody_may_write_to_cannot_be_a_home(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    # A mode does not stop root; the kernel's own folder does.
    home = Path("/proc/covey") if os.geteuid() == 0 else tmp_path
    with pytest.raises(ConfigError, match="cannot write the state folder"):
        Home(home)
