"""The command line against real nodes: facts as JSON, refusals in one line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from covey.cli.child import NodeProcess, wait_for
from covey.cli.processes import wait_until_gone
from covey.client import Client
from covey.node.model.sampling import SamplingParams
from support.swarm import LOOPBACK, MODEL, PLAN_S, Swarm, covey

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(180)]

Alone = Callable[[str, SamplingParams], str]

SKY = "Why is the sky blue?"


def home_of(swarm: Swarm, idx: int) -> tuple[str, str]:
    return "--home", str(swarm.members[idx].process.home)


def facts_of(*arguments: str) -> dict[str, Any]:
    done = covey(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def refusal_of(*arguments: str) -> str:
    """The one line with which a command ends."""
    done = covey(*arguments)
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("covey: ")
    return line


def test_run_prints_the_text_of_one_process(swarm: Swarm, alone: Alone) -> None:
    done = covey("run", MODEL, SKY, "--max-tokens", "16", *home_of(swarm, 1))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == alone(SKY, SamplingParams(max_tokens=16)) + "\n"


def test_run_as_json_says_where_it_was_computed(swarm: Swarm, alone: Alone) -> None:
    facts = facts_of("run", MODEL, SKY, "--max-tokens", "16", *home_of(swarm, 2))
    assert facts["text"] == alone(SKY, SamplingParams(max_tokens=16))
    assert (facts["finish_reason"], facts["completion_tokens"]) == ("length", 16)
    assert [span[0] for span in facts["stages"][1:]] == [span[1] for span in facts["stages"][:-1]]
    assert facts["ttft_s"] > 0
    assert facts["tok_per_s"] > 0


def test_the_status_of_every_member_reports_the_work_of_its_stage(swarm: Swarm) -> None:
    before = [_work(swarm, idx) for idx in range(3)]
    swarm.head.generate("Once", model=MODEL, max_tokens=8, temperature=0.0)
    after = [_work(swarm, idx) for idx in range(3)]
    for old, new in zip(before, after, strict=True):
        done = [new[plan] - old.get(plan, Counter()) for plan in new]
        # One forward of the prompt, one for each token fed back.
        assert sum(work["forwards"] for work in done) == 8
        assert sum(work["received_bytes"] for work in done) > 0


def _work(swarm: Swarm, idx: int) -> dict[str, Counter[str]]:
    """What each stage did, by plan: a better plan may take over at any time."""
    return {
        stage["plan"]: Counter({key: stage[key] for key in ("forwards", "received_bytes")})
        for stage in facts_of("status", *home_of(swarm, idx))["stages"]
    }


def test_status_names_members_links_and_spans(swarm: Swarm) -> None:
    facts = facts_of("status", *home_of(swarm, 0))
    members = {member["name"]: member for member in facts["members"]}
    assert sorted(members) == ["node-0", "node-1", "node-2"]
    assert all(member["is_live"] for member in members.values())
    assert [name for name, member in members.items() if member["is_self"]] == ["node-0"]
    assert members["node-1"]["link"]["bytes_received"] > 0
    n_blocks = sum(end - start for m in members.values() for start, end in m["spans"].values())
    assert n_blocks == 30
    (model,) = facts["models"]
    assert (model["name"], model["is_ready"], model["is_local"]) == (MODEL, True, True)
    # A native engine, or a reason why not.
    assert (model["engine"] == "native") == (facts["engine"]["kind"] == "native")
    assert (model["why_portable"] is None) == (model["engine"] == "native")


def test_plan_shows_the_active_one_and_why_one_machine_is_not_enough(swarm: Swarm) -> None:
    facts = facts_of("plan", MODEL, *home_of(swarm, 1))
    assert facts["n_blocks"] == 30
    assert len(facts["active"]["stages"]) == 3
    assert facts["single"] is None
    assert facts["no_single_because"]
    assert facts["points"]


def test_a_plan_of_ones_own_is_pinned_and_let_go(swarm: Swarm, tmp_path: Path) -> None:
    at_first = swarm.head.plan(MODEL)["active"]
    pinned = {"pipelines": at_first["pipelines"]}
    turned = pinned["pipelines"][0]["stages"]
    for stage, members in zip(turned, [stage["members"] for stage in turned[::-1]], strict=True):
        stage["members"] = [{"name": members[0]["name"]}]
        stage["hub"] = members[0]["name"]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(pinned))
    wanted = [stage["hub"] for stage in turned]
    try:
        done = facts_of("plan", MODEL, "--apply-file", str(path), *home_of(swarm, 1))
        assert [stage["hub"] for stage in done["pipelines"][0]["stages"]] == wanted
        # Whoever proposes heeds it, whoever pinned it.
        wait_for(lambda: _order(swarm) == wanted, PLAN_S, "the pinned plan does not run")
        facts = swarm.members[2].client.plan(MODEL)
        assert (facts["pinned"]["by"], facts["pinned"]["why_not"]) == ("node-1", None)
        assert facts["because"] == "it is pinned"
        assert swarm.head.generate("Once", model=MODEL, max_tokens=4, temperature=0.0).text
    finally:
        assert facts_of("plan", MODEL, "--unpin", *home_of(swarm, 2))["was_pinned"]
    assert swarm.members[2].client.plan(MODEL)["pinned"] is None
    wait_for(swarm.is_planned, PLAN_S, "no plan over all members")


def _order(swarm: Swarm) -> list[str]:
    plans = [member.client.plan(MODEL)["active"] for member in swarm.members]
    orders = [[stage["name"] for stage in plan["stages"]] if plan else [] for plan in plans]
    return orders[0] if all(order == orders[0] for order in orders) else []


def test_a_plan_that_cannot_run_is_not_pinned(swarm: Swarm, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    stage = {"span": [0, 30], "members": [{"name": "node-1"}]}
    path.write_text(json.dumps({"pipelines": [{"stages": [stage]}]}))
    line = refusal_of("plan", MODEL, "--apply-file", str(path), *home_of(swarm, 0))
    assert "node-1 takes at most 11 blocks, not 30" in line
    assert "no plan number 99" in refusal_of("plan", "--apply", "99", *home_of(swarm, 0))


def test_models_lists_the_swarms(swarm: Swarm) -> None:
    facts = facts_of("models", *home_of(swarm, 2))
    assert [model["name"] for model in facts["models"]] == [MODEL]


def test_the_doctor_reaches_every_member_and_says_what_is_in_the_way(swarm: Swarm) -> None:
    facts = facts_of("doctor", *home_of(swarm, 0))
    assert sorted(member["name"] for member in facts["members"]) == ["node-1", "node-2"]
    assert {member["link"]["kind"] for member in facts["members"]} == {"direct"}
    assert [finding["says"] for finding in facts["findings"]] == [
        "This node listens for programs of this machine only."
    ]


def test_a_ping_measures_the_link_to_a_member(swarm: Swarm) -> None:
    facts = facts_of("ping", "node-1", "--count", "2", *home_of(swarm, 0))
    assert (facts["name"], facts["sent"], facts["answered"]) == ("node-1", 2, 2)
    assert facts["bandwidth_bytes_per_s"] > 0


def test_a_ping_to_nobody_names_who_there_is(swarm: Swarm) -> None:
    assert "node-1, node-2" in refusal_of("ping", "attic", *home_of(swarm, 0))


@pytest.mark.parametrize("command", [["doctor"], ["ping", "node-1"]])
def test_what_is_found_out_is_printed_for_people_too(swarm: Swarm, command: list[str]) -> None:
    done = covey(*command, *home_of(swarm, 0))
    assert (done.returncode, done.stderr) == (0, "")
    assert "node-1" in done.stdout
    assert "direct" in done.stdout


@pytest.mark.parametrize("command", [["status"], ["plan"], ["models"]])
def test_tables_for_people_are_printed_too(swarm: Swarm, command: list[str]) -> None:
    done = covey(*command, *home_of(swarm, 0))
    assert (done.returncode, done.stderr) == (0, "")
    assert MODEL in done.stdout


def test_a_one_use_invite_lets_one_machine_in(swarm: Swarm, tmp_path: Path) -> None:
    invite = facts_of("invite", "--uses", "1", *home_of(swarm, 0))["invite"]
    head_only = ["join", invite, "--max-blocks", "0", *LOOPBACK]
    with NodeProcess(head_only, home=tmp_path / "first") as first:
        assert first.facts["peer_id"]
        line = refusal_of(*head_only, "--home", str(tmp_path / "second"))
    assert "invite" in line


@pytest.mark.parametrize("kept", [6, 40, -1])
def test_a_cut_invite_is_refused(swarm: Swarm, tmp_path: Path, kept: int) -> None:
    invite = swarm.head.invite()[:kept]
    assert "invite" in refusal_of("join", invite, *LOOPBACK, "--home", str(tmp_path / "home"))


def test_garbage_is_no_invite(tmp_path: Path) -> None:
    assert "invite" in refusal_of("join", "garbage", *LOOPBACK, "--home", str(tmp_path))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Home and invite of another swarm, whose only node has ended."""
    with NodeProcess(["up", MODEL, *LOOPBACK], home=tmp_path_factory.mktemp("ended")) as node:
        return node.home, node.facts["invite"]


def test_an_invite_of_nobody_that_listens_is_refused(
    ended: tuple[Path, str], tmp_path: Path
) -> None:
    assert "reach" in refusal_of("join", ended[1], *LOOPBACK, "--home", str(tmp_path / "home"))


def test_a_home_stays_in_its_swarm(swarm: Swarm, ended: tuple[Path, str]) -> None:
    line = refusal_of("join", swarm.head.invite(), *LOOPBACK, "--home", str(ended[0]))
    assert "another swarm" in line


def test_a_home_has_one_node(swarm: Swarm) -> None:
    line = refusal_of("up", MODEL, *LOOPBACK, *home_of(swarm, 0))
    assert "already" in line
    # The refused one must not have taken away how the first is found.
    assert facts_of("status", *home_of(swarm, 0))["name"] == "node-0"


@pytest.mark.parametrize("option", ["--api-port", "--port"])
def test_a_port_in_use_is_named(tmp_path: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refusal_of("up", MODEL, *LOOPBACK, option, port, "--home", str(tmp_path / "home"))
    assert port in line


@pytest.mark.parametrize("options", [[], ["--detach"]])
def test_a_home_that_cannot_be_written_is_named(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "file").touch()
    home = str(tmp_path / "file" / "home")
    line = refusal_of("up", MODEL, *LOOPBACK, "--home", home, *options)
    assert home in line


def test_a_home_without_a_swarm_cannot_come_back(tmp_path: Path) -> None:
    assert "invite" in refusal_of("join", *LOOPBACK, "--home", str(tmp_path))


@pytest.mark.parametrize("command", [["status"], ["plan"], ["invite"], ["stop"]])
def test_without_a_node_a_command_says_how_to_start_one(tmp_path: Path, command: list[str]) -> None:
    assert "covey up" in refusal_of(*command, "--home", str(tmp_path))


def test_an_unknown_model_is_refused_with_those_there_are(swarm: Swarm) -> None:
    line = refusal_of("run", "nosuch", "hi", *home_of(swarm, 0))
    assert "nosuch" in line
    assert MODEL in line


def test_a_client_with_an_invite_brings_its_own_head(swarm: Swarm, alone: Alone) -> None:
    with Client(swarm.head.invite()) as client:
        home, pid = _head_of(client, os.getpid())
        wait_for(lambda: any(model.is_ready for model in client.models()), 30.0, "not ready")
        result = client.chat(
            [{"role": "user", "content": SKY}], model=MODEL, max_tokens=16, temperature=0.0
        )
        assert client.status()["stages"] == []
    assert result.text == alone(SKY, SamplingParams(max_tokens=16))
    assert not psutil.pid_exists(pid)
    assert not home.exists()


PROGRAM = """
    import sys, time
    from covey.client import Client
    with Client(sys.argv[1]) as client:
        print(client.status()["home"], flush=True)
        time.sleep(600)
"""


def test_a_head_ends_with_a_client_that_is_killed(swarm: Swarm) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), swarm.head.invite()],
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        home = Path(program.stdout.readline().strip())
        (pid,) = [child.pid for child in psutil.Process(program.pid).children()]
        assert home.exists()
        program.send_signal(signal.SIGKILL)
    wait_until_gone(pid, 15.0)
    assert not home.exists()


def _head_of(client: Client, parent: int) -> tuple[Path, int]:
    home = Path(client.status()["home"])
    (pid,) = [
        child.pid for child in psutil.Process(parent).children() if str(home) in child.cmdline()
    ]
    return home, pid
