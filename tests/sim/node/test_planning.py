"""Planning without a leader: several members with real replicas and a tiny real model.

Documents are exchanged at once and in full, time is virtual, and nothing listens anywhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from covey.node import links
from covey.node.catalog import LocalModel
from covey.node.config import NodeConfig
from covey.node.engines import Engines
from covey.node.home import Home
from covey.node.model.checkpoint import open_checkpoint
from covey.node.model.errors import CorruptModel
from covey.node.planning import Planning
from covey.node.planning_state import link_record, plan_record
from covey.node.serving import StageServer
from covey.node.switch import Switch
from covey.node.worker import Done
from covey.partition.activation import PENDING_S
from covey.partition.plan import LayerPlan, Pipeline, Prediction, StagePlan, make_plan
from covey.partition.profile import DeviceProfile, LinkProfile
from covey.store.replica import Replica
from covey.store.views import Views
from covey.transport.link import LinkKind
from support.swarm_keys import signer, verify
from support.tiny_models import TINY, write_tiny_gguf
from support.virtual_time import VirtualTimeLoop

SETTLE_S = 4.0


class InlineWorker:
    """Runs jobs in the loop: virtual time does not wait for threads."""

    async def run(self, job: Callable[[], Any]) -> Done[Any]:
        return Done(job(), 0.0, 0.0)


class Swarm:
    """Members that hear each other at once, while they live."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.members: dict[str, Member] = {}

    @property
    def live(self) -> frozenset[str]:
        return frozenset(name for name, member in self.members.items() if member.is_live)

    def spread(self, author: str, envelope: bytes) -> None:
        for member in self.members.values():
            if member.peer_id != author and member.is_live and author in self.live:
                member.replica.apply(envelope)


class Member:
    """What `Planning` sees of a node."""

    def __init__(self, name: str, swarm: Swarm, model: LocalModel, max_blocks: int | None) -> None:
        self.peer_id = name
        self.is_live = True
        self.swarm = swarm
        self.clock = asyncio.get_running_loop().time
        self.home = Home(swarm.folder / name)
        self.config = NodeConfig(
            home=self.home.path, name=name, max_blocks=max_blocks, prefer="latency"
        )
        self.catalog: Any = Catalog([model])
        self.loader = InlineWorker()
        self.replica = Replica(
            name,
            swarm="meadow2026",
            sign=signer(name),
            verify=verify,
            is_member=lambda _: True,
            disk=None,
            started_ms=1,
        )
        self.views = Views(self.replica)
        self.switch = Switch(name, cast("Any", None))
        self.server = StageServer(self.switch, cast("Any", self.loader), self.clock)
        peer = SimpleNamespace(
            busy=False,
            is_needed=False,
            rtt_s=1e-3,
            kind=LinkKind.DIRECT,
            packets=None,
            measure=self._measured,
        )
        self.mesh = SimpleNamespace(peers={}, peer=self._answer(peer))
        self.replica.on_local(lambda envelope: swarm.spread(name, envelope))
        self.planning = Planning(cast("Any", self))
        self.run: asyncio.Task[None] | None = None

    @property
    def is_planning(self) -> bool:
        return self.run is not None and not self.run.done()

    def live_peers(self) -> frozenset[str]:
        return self.swarm.live

    def spans(self, digest: str) -> dict[str, tuple[int, int]] | None:
        route = self.planning.route(digest)
        return None if route is None else dict(zip(route.peers, route.spans, strict=True))

    @staticmethod
    def _answer(peer: object) -> Callable[[str], Awaitable[object]]:
        async def find(_: str) -> object:
            return peer

        return find

    @staticmethod
    async def _measured() -> tuple[float, float]:
        return 1e-3, 1e8


class Catalog:
    def __init__(self, models: list[LocalModel]) -> None:
        self._models = models

    def __iter__(self) -> Any:
        return iter(self._models)

    def by_digest(self, digest: str) -> LocalModel | None:
        return next((model for model in self._models if model.digest == digest), None)


@asynccontextmanager
async def member(
    name: str, swarm: Swarm, model: LocalModel, max_blocks: int | None
) -> AsyncIterator[Member]:
    new = Member(name, swarm, model, max_blocks)
    for other in swarm.members.values():
        for envelope in other.replica.missing_for(new.replica.state_vector(), max_bytes=1 << 20):
            new.replica.apply(envelope)
    swarm.members[name] = new
    run = new.run = asyncio.create_task(new.planning.run())
    try:
        yield new
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        new.is_live = False
        await new.server.aclose()
        new.home.close()


@pytest.fixture
def model(tmp_path: Path) -> LocalModel:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    return LocalModel("tiny", open_checkpoint(path, cache_dir=tmp_path), Engines("fp32", 1))


@pytest.fixture(autouse=True)
def equal_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured here in earnest would differ from run to run."""

    def profile(
        model: LocalModel, config: NodeConfig, peer_id: str, _: Home, *, progress: object
    ) -> DeviceProfile:
        return DeviceProfile(
            peer_id=peer_id,
            model_digest=model.digest,
            engine=model.engine,
            decode_s_per_block=1e-3,
            prefill_s_per_token_per_block=1e-4,
            head_s=1e-3,
            memory_bytes=1 << 30,
            disk_bytes_per_s=1e9,
            max_blocks=config.max_blocks,
        )

    monkeypatch.setattr("covey.node.planning.device_profile", profile)


@pytest.fixture(autouse=True)
def inline_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual time would run away while a thread works."""

    async def inline(job: Callable[..., object], *arguments: object) -> object:
        return job(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", inline)


@pytest.fixture
def spoiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The first load of a stage by anybody fails, and is listed here; all others are good."""
    failed: list[object] = []

    def load(*arguments: Any, **options: Any) -> Any:
        if not failed:
            failed.append(arguments)
            raise CorruptModel(tmp_path, "block.0", "expected another hash")
        return load_good(*arguments, **options)

    load_good = LocalModel.load_stage
    monkeypatch.setattr(LocalModel, "load_stage", load)
    return failed


def simulate(scenario: Callable[[], Awaitable[None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(cast("Any", scenario()))


def test_a_machine_that_holds_the_model_serves_it_alone(tmp_path: Path, model: LocalModel) -> None:
    async def scenario() -> None:
        async with member("a", Swarm(tmp_path), model, None) as a:
            await asyncio.sleep(SETTLE_S)
            assert a.spans(model.digest) == {"a": (0, TINY.n_blocks)}

    simulate(scenario)


def test_members_that_need_each_other_agree_on_one_plan(tmp_path: Path, model: LocalModel) -> None:
    async def scenario() -> None:
        swarm = Swarm(tmp_path)
        async with AsyncExitStack() as stack:
            a = await stack.enter_async_context(member("a", swarm, model, 2))
            await asyncio.sleep(SETTLE_S)
            assert a.spans(model.digest) is None
            assert "block" in a.planning.why_not(model.digest)
            b = await stack.enter_async_context(member("b", swarm, model, 3))
            await asyncio.sleep(SETTLE_S)
            spans = a.spans(model.digest)
            assert spans is not None
            assert spans == b.spans(model.digest)
            assert set(spans) == {"a", "b"}
            assert len(a.server.stages) == len(b.server.stages) == 1

    simulate(scenario)


def test_the_others_plan_anew_when_the_proposer_dies(tmp_path: Path, model: LocalModel) -> None:
    async def scenario() -> None:
        swarm = Swarm(tmp_path)
        async with AsyncExitStack() as stack:
            a, b, c = [
                await stack.enter_async_context(member(name, swarm, model, 2)) for name in "abc"
            ]
            await asyncio.sleep(SETTLE_S)
            old = b.planning.route(model.digest)
            assert old is not None
            assert old.plan.proposer == "a"
            a.is_live = False
            await asyncio.sleep(SETTLE_S)
            spans = b.spans(model.digest)
            assert spans is not None
            assert set(spans) == {"b", "c"}
            assert spans == c.spans(model.digest)

    simulate(scenario)


def test_a_better_machine_that_joins_takes_over(tmp_path: Path, model: LocalModel) -> None:
    async def scenario() -> None:
        swarm = Swarm(tmp_path)
        async with AsyncExitStack() as stack:
            a = await stack.enter_async_context(member("a", swarm, model, 2))
            await stack.enter_async_context(member("b", swarm, model, 2))
            await asyncio.sleep(SETTLE_S)
            first = a.planning.route(model.digest)
            assert first is not None
            await stack.enter_async_context(member("c", swarm, model, None))
            await asyncio.sleep(SETTLE_S)
            second = a.planning.route(model.digest)
            assert second is not None
            # One machine without links beats two with a millisecond between them, which go on
            # beside it for when there are many sessions.
            assert second.peers == ("c",)
            assert [len(pipeline.peers) for pipeline in second.plan.pipelines] == [1, 2]
            assert second.epoch == first.epoch + 1

    simulate(scenario)


def test_a_member_whose_file_is_bad_is_planned_around(
    tmp_path: Path, model: LocalModel, spoiled: list[object]
) -> None:
    async def scenario() -> None:
        swarm = Swarm(tmp_path)
        async with AsyncExitStack() as stack:
            everyone = [
                await stack.enter_async_context(member(name, swarm, model, 2)) for name in "abc"
            ]
            await asyncio.sleep(2 * PENDING_S)
            assert spoiled
            views = [each.spans(model.digest) for each in everyone]
            assert views[0] is not None
            assert views[0] == views[1] == views[2]
            assert len(views[0]) == 2

    simulate(scenario)


def test_members_of_another_engine_are_not_mixed_into_a_plan(
    tmp_path: Path, model: LocalModel
) -> None:
    other = LocalModel("tiny", model.checkpoint, Engines("bf16", 1))

    async def scenario() -> None:
        swarm = Swarm(tmp_path)
        async with AsyncExitStack() as stack:
            a = await stack.enter_async_context(member("a", swarm, model, 2))
            b = await stack.enter_async_context(member("b", swarm, other, 2))
            await asyncio.sleep(SETTLE_S)
            assert a.spans(model.digest) is b.spans(model.digest) is None
            c = await stack.enter_async_context(member("c", swarm, other, 2))
            await asyncio.sleep(2 * SETTLE_S)
            spans = c.spans(model.digest)
            assert spans is not None
            assert set(spans) == {"b", "c"}
            assert a.spans(model.digest) is None
            assert "--engine bf16" in a.planning.why_not(model.digest)

    simulate(scenario)


def test_a_bad_load_before_a_good_one_leaves_the_planner_alive(
    tmp_path: Path, model: LocalModel, spoiled: list[object]
) -> None:
    def proposal(codec: str) -> LayerPlan:
        stages = (StagePlan.alone("a", 0, TINY.n_blocks),)
        prediction = Prediction(
            ttft_s=1.0, tpot_s=1.0, throughput_tok_per_s=1.0, memory_bytes=(("a", 1),)
        )
        return make_plan(
            [Pipeline.of(stages, codecs=(codec,) * 2)],
            prediction,
            model_digest=model.digest,
            epoch=1,
            proposer="b",
            engine="fp32",
        )

    async def scenario() -> None:
        swarm = Swarm(tmp_path)
        async with AsyncExitStack() as stack:
            b = await stack.enter_async_context(member("b", swarm, model, 0))
            for record in map(plan_record, map(proposal, ("exact", "fp16"))):
                b.replica.set(record.key, record.to_value())
            a = await stack.enter_async_context(member("a", swarm, model, None))
            await asyncio.sleep(SETTLE_S)
            assert spoiled
            assert a.is_planning

    simulate(scenario)


def test_a_plan_gets_other_codecs_when_its_links_are_others_and_keeps_them_when_they_hover(
    tmp_path: Path, model: LocalModel
) -> None:
    def say(bandwidth: float, *members: Member) -> None:
        for one, other in (members, members[::-1]):
            record = link_record(
                LinkProfile(
                    a=one.peer_id,
                    b=other.peer_id,
                    rtt_s=1e-3,
                    bandwidth_bytes_per_s=bandwidth,
                )
            )
            one.replica.set(record.key, record.to_value())

    async def scenario() -> None:
        swarm = Swarm(tmp_path)
        async with AsyncExitStack() as stack:
            a = await stack.enter_async_context(member("a", swarm, model, 2))
            b = await stack.enter_async_context(member("b", swarm, model, 2))
            await asyncio.sleep(sum(links.SETTLE_S) + SETTLE_S)
            first = a.planning.route(model.digest)
            assert first is not None
            assert set(first.codecs) == {"exact"}
            say(2e4, a, b)
            await asyncio.sleep(SETTLE_S)
            slow = a.planning.route(model.digest)
            assert slow is not None
            assert slow.codecs == ("exact", "int8", "int8")
            assert slow.spans == first.spans  # nobody loads another block
            for factor in (0.8, 1.2, 0.7, 1.3) * 3:
                say(2e4 * factor, a, b)
                await asyncio.sleep(SETTLE_S)
            assert a.planning.route(model.digest) == slow
            say(1e8, a, b)
            await asyncio.sleep(SETTLE_S)
            again = a.planning.route(model.digest)
            assert again is not None
            assert set(again.codecs) == {"exact"}
            assert again.epoch == slow.epoch + 1

    simulate(scenario)


def test_a_node_that_stops_takes_its_word_back(tmp_path: Path, model: LocalModel) -> None:
    async def scenario() -> None:
        swarm = Swarm(tmp_path)
        async with AsyncExitStack() as stack:
            a = await stack.enter_async_context(member("a", swarm, model, 2))
            b = await stack.enter_async_context(member("b", swarm, model, 2))
            await asyncio.sleep(SETTLE_S)
            assert a.spans(model.digest) is not None
            b.planning.withdraw()
            await asyncio.sleep(1.0)
            assert a.spans(model.digest) is None

    simulate(scenario)
