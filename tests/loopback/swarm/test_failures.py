"""Nodes that are killed, stopped or silent: a clear error in time, and nothing left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from covey.cli.child import wait_for
from covey.cli.processes import wait_until_gone
from covey.client import Client, ClientError, GenerationFailed
from covey.client.sync_client import TextStream
from covey.node.model.sampling import SamplingParams
from support.swarm import LOOPBACK, MODEL, Member, Swarm, covey

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(180)]

Alone = Callable[[str, SamplingParams], str]

GRACE_S = 10.0  # NodeConfig.grace_s
SKY = "Why is the sky blue?"
ENDLESS = {0: -100.0, 2: -100.0}  # the model's two tokens of the end never come
LONG = 1500  # tokens: more than any test waits for


@contextmanager
def generating(client: Client, max_tokens: int = LONG) -> Iterator[TextStream]:
    """A generation that has begun to give text."""
    with client.chat(
        [{"role": "user", "content": SKY}],
        model=MODEL,
        max_tokens=max_tokens,
        temperature=0.0,
        logit_bias=ENDLESS,
        stream=True,
    ) as stream:
        next(stream)
        yield stream


def read_to_the_end(stream: TextStream) -> float:
    """Seconds until it ended, one way or the other."""
    began_at = time.monotonic()
    try:
        for _ in stream:
            pass
    finally:
        took_s = time.monotonic() - began_at
    return took_s


def member_facts(client: Client, name: str) -> dict[str, Any]:
    members: list[dict[str, Any]] = client.status()["members"]
    (facts,) = [member for member in members if member["name"] == name]
    return facts


def is_ready(client: Client) -> bool:
    return any(model.is_ready for model in client.models())


def test_a_killed_stage_ends_the_text_and_comes_back(pair: Swarm, alone: Alone) -> None:
    head, other = pair.members
    with generating(head.client) as stream:
        killed_at = time.monotonic()
        other.process.kill()
        with pytest.raises(GenerationFailed, match="peer lost") as caught:
            read_to_the_end(stream)
        assert time.monotonic() - killed_at < 3.0
    assert caught.value.code == "peer_lost"
    wait_for(lambda: not member_facts(head.client, other.name)["is_live"], 10.0, "still alive")
    wait_for(lambda: not is_ready(head.client), 5.0, "still ready")
    sessions = head.status()["sessions"]
    assert (sessions["as_head"], sessions["as_stage"]) == (0, 0)
    other.come_back()
    wait_for(lambda: is_ready(head.client), 60.0, "not ready again")
    result = head.client.chat(
        [{"role": "user", "content": SKY}], model=MODEL, max_tokens=16, temperature=0.0
    )
    assert result.text == alone(SKY, SamplingParams(max_tokens=16))


def test_a_silent_stage_ends_the_text_within_seconds(pair: Swarm) -> None:
    head, other = pair.members
    with generating(head.client) as stream:
        silent_at = time.monotonic()
        other.process.process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(GenerationFailed):
                read_to_the_end(stream)
            assert time.monotonic() - silent_at < 4.0
        finally:
            other.process.process.send_signal(signal.SIGCONT)
    wait_for(lambda: _answers(head), 60.0, "no answer after the pause")


def _answers(member: Member) -> bool:
    try:
        return bool(member.client.generate("One", model=MODEL, max_tokens=2).text)
    except ClientError:
        return False


def test_a_stopped_head_finishes_its_text(pair: Swarm) -> None:
    head, _ = pair.members
    with generating(head.client, max_tokens=48) as stream:
        head.process.process.terminate()
        read_to_the_end(stream)
    assert stream.result.usage.completion_tokens == 48
    assert head.process.process.wait(20.0) == 0
    assert not (head.process.home / "api.json").exists()


def test_a_stopped_node_ends_what_takes_too_long(pair: Swarm) -> None:
    head, other = pair.members
    with generating(head.client) as of_the_head, generating(other.client) as its_own:
        asked_at = time.monotonic()
        done = covey("stop", "--home", str(other.process.home), "--json")
        assert time.monotonic() - asked_at < GRACE_S + 6.0
        assert (done.returncode, json.loads(done.stdout)["stopped"]) == (0, True), done.stderr
        with pytest.raises(GenerationFailed) as caught:
            read_to_the_end(its_own)
        assert caught.value.code == "shutting_down"
        with pytest.raises(GenerationFailed) as caught:
            read_to_the_end(of_the_head)
        assert caught.value.code in {"shutting_down", "peer_lost"}
    assert other.process.process.wait(1.0) == 0
    wait_for(lambda: head.status()["sessions"]["as_stage"] == 0, 5.0, "a session was left")


def test_a_node_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time\n"
        "from covey.cli.child import NodeProcess\n"
        "node = NodeProcess(sys.argv[2:], home=pathlib.Path(sys.argv[1]))\n"
        "node.wait_until_up()\n"
        "print(node.process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "home"), "up", MODEL, *LOOPBACK],
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    wait_until_gone(pid, 15.0)


def test_a_detached_node_is_stopped_by_command(tmp_path: Path) -> None:
    home = ("--home", str(tmp_path / "home"))
    started = covey("up", MODEL, *LOOPBACK, *home, "--detach", "--json", timeout_s=120)
    assert started.returncode == 0, started.stderr
    pid = json.loads(started.stdout)["pid"]
    assert psutil.pid_exists(pid)
    assert covey("stop", *home).returncode == 0
    wait_until_gone(pid, 0.0)


@pytest.mark.parametrize(
    ("number", "n_nodes"),
    [
        (signal.SIGINT, 1),
        pytest.param(signal.SIGINT, 3, marks=pytest.mark.lab),
        (signal.SIGTERM, 3),
    ],
)
def test_a_demo_that_is_stopped_leaves_nothing(
    tmp_path: Path, number: signal.Signals, n_nodes: int
) -> None:
    with subprocess.Popen(
        # A shell that starts the tests in the background has them ignore Ctrl-C.
        ["env", "--default-signal=INT", sys.executable, "-m", "covey.cli", "demo", "--json"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    ) as demo:
        children: set[psutil.Process] = set()

        def has_begun() -> bool:
            children.update(psutil.Process(demo.pid).children(recursive=True))
            return len(children) >= n_nodes

        wait_for(has_begun, 60.0, "the demo started no node")
        demo.send_signal(number)
        assert demo.wait(30.0) != 0
    assert [child for child in children if child.is_running()] == []
    assert list(tmp_path.iterdir()) == []
