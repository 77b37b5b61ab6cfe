"""`covey members`: a member is removed from a running swarm, and the others go on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from covey.cli.child import NodeProcess, wait_for
from covey.client import Client
from support.swarm import LOOPBACK, MODEL, Member, Swarm, covey, running_swarm

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(240)]

CUT_OFF_S = 5.0


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """A founder and a member that compute, and a head that only asks, to be removed."""
    with running_swarm(tmp_path_factory.mktemp("trio"), (20, 20)) as pair:
        guest = NodeProcess(
            ["join", pair.head.invite(), "--name", "guest", "--max-blocks", "0", *LOOPBACK],
            home=tmp_path_factory.mktemp("guest"),
        )
        try:
            guest.wait_until_up()
            client = Client(home=guest.home)
            yield Swarm((*pair.members, Member("guest", 0, guest, client)))
            client.close()
        finally:
            guest.stop()


def home_of(member: Member) -> tuple[str, str]:
    return "--home", str(member.process.home)


def members_of(member: Member) -> dict[str, Any]:
    done = covey("members", "list", "--json", *home_of(member))
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def test_a_removed_member_is_cut_off_and_told_and_the_rest_go_on(
    trio: Swarm, tmp_path: Path
) -> None:
    founder, other, guest = trio.members
    wait_for(lambda: len(_links(founder)) == len(_links(other)) == 2, 30, "links are missing")
    before = {m["name"]: m for m in members_of(other)["members"]}
    assert {name: m["role"] for name, m in before.items()} == {
        "node-0": "founder",
        "node-1": "member",
        "guest": "member",
    }
    assert before["guest"]["invited_by"] == [before["node-0"]["peer_id"]]

    refused = covey("members", "remove", "guest", "--yes", *home_of(other))
    assert refused.returncode == 1
    assert "ask for it at node-0" in refused.stderr

    with founder.client.chat(
        [{"role": "user", "content": "Count."}],
        model=MODEL,
        max_tokens=400,
        temperature=0.0,
        logit_bias={0: -100.0, 2: -100.0},
        stream=True,
    ) as stream:
        next(stream)
        founder.client.remove_member(before["guest"]["peer_id"][-8:])
        removed_at = time.monotonic()
        wait_for(lambda: not _is_linked(guest, founder, other), CUT_OFF_S, "not cut off")
        assert time.monotonic() - removed_at < CUT_OFF_S
        n_tokens = 1 + sum(1 for _ in stream)
    assert n_tokens >= 400  # the session of two honest members did not notice

    assert guest.process.process.wait(20) == 1
    line = guest.process.log_tail(1)[0]
    assert line.startswith("covey: this node was removed from the swarm by node-0")
    for member in (founder, other):
        facts = members_of(member)
        assert [m["name"] for m in facts["members"]].count("guest") == 0
        assert [(m["name"], m["by_name"]) for m in facts["removed"]] == [("guest", "node-0")]
        assert facts["epoch"] == 1
    again = covey("join", *LOOPBACK, *home_of(guest))
    assert (again.returncode, again.stdout) == (1, "")
    assert "was removed from the swarm by node-0" in again.stderr

    # A restart changes nothing: the removal is in the store.
    other.process.kill()
    other.come_back()
    assert [m["name"] for m in members_of(other)["removed"]] == ["guest"]
    people = covey("members", "list", *home_of(founder))
    assert (people.returncode, people.stderr) == (0, "")
    assert "Removed" in people.stdout


@pytest.mark.lab  # among meshes the same is tested in loopback/transport/test_renewal.py
def test_who_was_away_gets_in_again_unless_it_was_removed(trio: Swarm, tmp_path: Path) -> None:
    founder, other, _ = trio.members
    arguments = ["--name", "late", "--max-blocks", "0", *LOOPBACK]
    late = NodeProcess(["join", founder.client.invite(), *arguments], home=tmp_path / "late")
    late.wait_until_up()
    wait_for(lambda: {"node-1", "late"} <= set(_links(founder)), 30, "links are missing")
    epoch = members_of(founder)["epoch"]
    late.stop()
    other.stop()
    done = covey("members", "remove", "late", "--yes", *home_of(founder))
    assert (done.returncode, done.stderr) == (0, "")
    assert "removed: late;" in done.stdout

    other.come_back()
    wait_for(lambda: "node-0" in _links(other), 30, "who was away did not get in")
    facts = members_of(other)
    assert facts["epoch"] == epoch + 1
    wait_for(lambda: "late" in _removed(other), 10, "the store was not synchronised")
    wait_for(trio_is_planned(trio), 60, "no plan over both members")

    again = covey("join", *arguments, "--home", str(late.home), timeout_s=60)
    assert again.returncode == 1
    assert "this node was removed from the swarm by node-0" in again.stderr


def trio_is_planned(trio: Swarm) -> Callable[[], bool]:
    return Swarm(trio.members[:2]).is_planned


def _removed(member: Member) -> list[str]:
    return [m["name"] for m in members_of(member)["removed"]]


def _links(member: Member) -> list[str]:
    return [m["name"] for m in member.status()["members"] if m["link"]]


def _is_linked(guest: Member, *others: Member) -> bool:
    return any(
        m["link"] for other in others for m in other.status()["members"] if m["name"] == guest.name
    )
