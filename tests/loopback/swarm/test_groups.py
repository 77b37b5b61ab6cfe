"""Two real nodes that share each block out between them: one text, whoever asks, and faults."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from covey.cli.child import wait_for
from covey.client import BadRequest, Client, GenerationFailed, NotReady
from covey.client.sync_client import TextStream
from covey.node.alone import generate_alone, load_alone
from covey.node.catalog import open_model
from covey.node.engines import Engines
from covey.node.model.sampling import SamplingParams
from covey.node.prompt import chat_tokens
from support.swarm import MODEL, PLAN_S, Swarm, running_swarm
from support.tiny_models import SPECIALS, TINY, write_tiny_gguf

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(240)]

SKY = [{"role": "user", "content": "Why is the sky blue?"}]
TINY3 = replace(
    TINY, n_heads=6, n_kv_heads=3, intermediate_size=96, context_length=2048
)  # as SmolLM2, three KV heads; a lab tries that one itself
N_BLOCKS = TINY3.n_blocks
ENDLESS = dict.fromkeys(range(len(SPECIALS)), -100.0)  # no token of the end ever comes
N_TOKENS = 24
HUB, SPOKE = 1, 0
SHARES = {HUB: (2, 64), SPOKE: (1, 32)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_gguf(tmp_path_factory.mktemp("model") / f"{MODEL}.gguf", TINY3))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, model: str) -> Iterator[Swarm]:
    """Each of them could run the model alone; the group is pinned."""
    folder, caps = tmp_path_factory.mktemp("group"), (N_BLOCKS, N_BLOCKS)
    options = ("--engine", "fp32")  # what the native one rounds depends on the order of sums
    with running_swarm(folder, caps, options, model=model, needs_all=False) as swarm:
        members = [
            {"name": f"node-{idx}", "kv_heads": heads, "mlp_columns": columns}
            for idx, (heads, columns) in SHARES.items()
        ]
        stage = {"span": [0, N_BLOCKS], "members": members, "hub": f"node-{HUB}"}
        plan = {"pipelines": [{"stages": [{**stage, "sum_codec": "exact"}]}]}
        wait_for(lambda: is_pinned(swarm, plan), PLAN_S, "the founder hears not of all members")
        wait_for(lambda: is_shared(swarm), PLAN_S, "the group does not serve")
        yield swarm


@pytest.fixture(scope="module")
def expected(model: str) -> str:
    """What one process says."""
    opened = open_model(model, Engines("fp32", 1))
    params = SamplingParams(max_tokens=N_TOKENS, temperature=0.0, logit_bias=ENDLESS)
    tokens = chat_tokens(opened.tokenizer, SKY)
    return "".join(generate_alone(opened, load_alone(opened), tokens, params))


def is_pinned(swarm: Swarm, plan: dict[str, Any]) -> bool:
    try:
        swarm.head.pin_plan(MODEL, plan)
    except BadRequest:  # not all of them have been measured
        return False
    return True


def is_shared(swarm: Swarm) -> bool:
    """Whether the group serves, and no other plan is on its way in or out."""
    roles = [[stage["role"] for stage in member.status()["stages"]] for member in swarm.members]
    plans = swarm.active_plans()
    is_active = bool(plans) and len(plans[0]["pipelines"][0]["stages"][0]["members"]) == 2
    return is_active and roles == [["spoke"], ["hub"]]


def text_of(client: Client) -> str:
    return client.chat(
        SKY, model=MODEL, max_tokens=N_TOKENS, temperature=0.0, logit_bias=ENDLESS
    ).text


def text_if_any(client: Client) -> str | None:
    """None while the plan changes."""
    try:
        return text_of(client)
    except (NotReady, GenerationFailed):
        return None


@pytest.mark.parametrize("asked", [HUB, SPOKE])
def test_the_text_is_that_of_one_process(nodes: Swarm, asked: int, expected: str) -> None:
    assert text_of(nodes.members[asked].client) == expected


def test_status_tells_who_has_which_part(nodes: Swarm) -> None:
    text_of(nodes.head)
    for idx, role in ((HUB, "hub"), (SPOKE, "spoke")):
        status = nodes.members[idx].status()
        (part,) = [stage for stage in status["stages"] if stage["role"] == role]
        assert (part["kv_heads"], part["mlp_columns"]) == SHARES[idx]
        assert part["forwards"] >= N_TOKENS - 1
        assert 0 < part["sum_wait_s"] < part["compute_s"]
        assert (part["arrival_spread"] is not None) == (role == "hub")
        spans = [list(member["spans"].values()) for member in status["members"]]
        assert spans == [[[0, N_BLOCKS]]] * 2


@contextmanager
def generating(client: Client) -> Iterator[TextStream]:
    """A text that has begun and would go on for long."""
    with client.chat(
        SKY, model=MODEL, max_tokens=1500, temperature=0.0, logit_bias=ENDLESS, stream=True
    ) as stream:
        next(stream)
        yield stream


def seconds_to_the_end(stream: TextStream) -> float:
    began_at = time.monotonic()
    with pytest.raises(GenerationFailed, match="peer lost"):
        for _ in stream:
            pass
    return time.monotonic() - began_at


def test_a_silent_spoke_ends_the_text_within_seconds(nodes: Swarm, expected: str) -> None:
    hub, spoke = nodes.members[HUB], nodes.members[SPOKE]
    with generating(hub.client) as stream:
        spoke.process.process.send_signal(signal.SIGSTOP)
        try:
            assert seconds_to_the_end(stream) < 5.0
        finally:
            spoke.process.process.send_signal(signal.SIGCONT)
    wait_for(lambda: is_shared(nodes), PLAN_S, "the group does not come back")
    wait_for(lambda: text_if_any(hub.client) == expected, PLAN_S, "no text")


def test_a_killed_spoke_ends_the_text_and_the_hub_goes_on(nodes: Swarm, expected: str) -> None:
    hub, spoke = nodes.members[HUB], nodes.members[SPOKE]
    with generating(hub.client) as stream:
        spoke.process.kill()
        assert seconds_to_the_end(stream) < 4.0
    wait_for(lambda: members_of(hub.client) == ["node-1"], PLAN_S, "no other plan")
    wait_for(lambda: text_if_any(hub.client) == expected, PLAN_S, "no text")
    spoke.come_back()
    wait_for(lambda: is_shared(nodes), PLAN_S, "the group does not come back")
    wait_for(lambda: text_if_any(hub.client) == expected, PLAN_S, "no text")


def members_of(client: Client) -> list[str]:
    plan: dict[str, Any] | None = client.plan(MODEL)["active"]
    stages = plan["pipelines"][0]["stages"] if plan else []
    return [member["name"] for stage in stages for member in stage["members"]]
