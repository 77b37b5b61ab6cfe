"""Which node a client finds, from files and what it was given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from covey.client.errors import ClientError, ConnectionLost, NoLocalNode
from covey.client.head import join_command
from covey.client.local import LocalNode, default_home, find_local_node
from covey.client.target import HeadToStart, Target, find_target, http_settings, translated

NODE = {"url": "http://127.0.0.1:8080", "key": "secret", "pid": os.getpid()}


def write(home: Path, facts: object) -> None:
    (home / "api.json").write_text(facts if isinstance(facts, str) else json.dumps(facts))


def test_a_running_node_is_found(tmp_path: Path) -> None:
    write(tmp_path, NODE)
    assert find_local_node(tmp_path) == LocalNode("http://127.0.0.1:8080", "secret", os.getpid())


def test_the_default_home_is_looked_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, NODE)
    monkeypatch.setenv("COVEY_HOME", str(tmp_path))
    assert find_local_node() is not None


def test_a_file_of_a_dead_process_is_no_node(tmp_path: Path) -> None:
    write(tmp_path, NODE | {"pid": 2**22 + 1})  # beyond Linux's highest
    assert find_local_node(tmp_path) is None


@pytest.mark.parametrize(
    "facts",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        {},
        NODE | {"url": 3},
        NODE | {"url": "file:///etc/passwd"},
        NODE | {"key": None},
        NODE | {"key": "sécret"},
        NODE | {"pid": "1"},
        NODE | {"pid": True},
        NODE | {"pid": -1},
        NODE | {"more": "x" * 100_000},
    ],
)
def test_a_file_that_is_not_right_is_no_node(tmp_path: Path, facts: object) -> None:
    write(tmp_path, facts)
    assert find_local_node(tmp_path) is None


def test_no_file_is_no_node(tmp_path: Path) -> None:
    assert find_local_node(tmp_path / "missing") is None


def test_the_home_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COVEY_HOME", "/some/home")
    assert default_home() == Path("/some/home")
    monkeypatch.setenv("COVEY_HOME", "")
    assert default_home().name == "covey"


def test_a_local_nodes_own_key_is_used_unless_one_is_given(tmp_path: Path) -> None:
    write(tmp_path, NODE)
    url = "http://127.0.0.1:8080"
    assert find_target(None, api_key=None, home=tmp_path) == Target(url, "secret")
    assert find_target(None, api_key="mine", home=tmp_path) == Target(url, "mine")


def test_a_saved_swarm_without_a_node_is_started(tmp_path: Path) -> None:
    (tmp_path / "swarm.json").write_text("{}")
    assert find_target(None, api_key=None, home=tmp_path) == HeadToStart(None, tmp_path)


def test_nothing_at_all_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NoLocalNode, match="covey up"):
        find_target(None, api_key=None, home=tmp_path)


def test_an_invite_starts_a_head_of_its_own() -> None:
    assert find_target(" covey1abc\n", api_key=None, home=None) == HeadToStart("covey1abc", None)


def test_a_url_is_taken_as_it_is() -> None:
    assert find_target("http://h:1/v1", api_key="k", home=None) == Target("http://h:1", "k")


@pytest.mark.parametrize("given", ["", "localhost:8080", "ftp://h", "invite"])
def test_anything_else_is_refused(given: str) -> None:
    with pytest.raises(ClientError, match="neither a URL"):
        find_target(given, api_key=None, home=None)


def test_the_command_of_a_head_only_node() -> None:
    tail = ["--max-blocks", "0", "--home", "/h", "--port", "0", "--api-port", "0", "--json"]
    tail += ["--exit-with", str(os.getpid())]
    head = [sys.executable, "-m", "covey.cli", "join"]
    made_for_it = join_command(Path("/h"), "covey1abc", is_home_ours=True)
    assert made_for_it == [*head, "covey1abc", *tail, "--discard-home"]
    assert join_command(Path("/h"), None, is_home_ours=False) == [*head, *tail]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_no_proxy_is_asked_for_this_machine(host: str) -> None:
    assert http_settings(Target(f"http://{host}:1", None), 30.0)["trust_env"] is False
    assert http_settings(Target("http://10.0.0.1:1", None), 30.0)["trust_env"] is True


@pytest.mark.parametrize(
    "target", [Target("http://h", "a\nb"), Target("http://h", "é"), Target("http://h:x", None)]
)
def test_what_cannot_be_sent_is_refused(target: Target) -> None:
    with pytest.raises(ClientError):
        http_settings(target, 30.0)


def all_subclasses(kind: type[Exception]) -> list[type[Exception]]:
    return [kind, *(sub for child in kind.__subclasses__() for sub in all_subclasses(child))]


@pytest.mark.parametrize("kind", all_subclasses(httpx.TransportError))
def test_whatever_breaks_in_httpx_is_a_lost_connection(kind: type[httpx.TransportError]) -> None:
    with pytest.raises(ConnectionLost, match="http://h:1"), translated(httpx.URL("http://h:1/a")):
        raise kind("")


def test_a_node_that_ended_and_was_not_waited_for_is_gone(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    try:
        write(tmp_path, {**NODE, "pid": child.pid})
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and stays a zombie
        assert find_local_node(tmp_path) is None
    finally:
        child.wait()
