"""Keeps every local model's plan in step with the swarm: measure, propose, load, say ready.

There is no leader. Whoever should propose follows from who is alive; which plan is active follows
from what is replicated (`partition/activation.py`); this module only acts on the two answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from covey.partition.activation import (
    active_plan,
    highest_active_epoch,
    priced,
    should_propose,
    should_replace,
    valid_proposals,
)
from covey.partition.choose import choose
from covey.partition.cost import predict_all
from covey.partition.errors import PartitionError
from covey.partition.evaluate import World, adjusted, front_or_reason
from covey.partition.front.search import Candidate, Front
from covey.partition.plan import LayerPlan, make_plan
from covey.partition.profile import DeviceProfile, Workload
from covey.store.replica import Replica
from covey.store.schema import ProfileRecord
from covey.store.views import Views
from covey.transport.lane.opening import Lanes
from covey.transport.mesh import Mesh
from covey.transport.peer import Peer

from .catalog import Catalog, LocalModel
from .config import NodeConfig
from .engine.tensors import options_for
from .home import Home
from .links import LinkMeter
from .loading import Loading
from .pins import pinned
from .planning_state import (
    ModelState,
    Outlook,
    device_record,
    plan_record,
    read_state,
    world_of,
)
from .profiling import device_profile
from .refining import Refining
from .route import Route, UnsupportedPlan, routes_of
from .serving import StageServer
from .switch import Switch
from .worker import Worker

logger = logging.getLogger(__name__)

STEP_S = 0.5  # between looks when nothing wakes us
MAX_LOADED = 2  # plans of one model at once: the active one and its successor


class Host(Protocol):
    """What planning needs of the node it runs in."""

    peer_id: str
    config: NodeConfig
    home: Home
    catalog: Catalog
    mesh: Mesh
    replica: Replica
    views: Views
    server: StageServer
    switch: Switch
    lanes: Lanes
    loader: Worker
    clock: Callable[[], float]

    def live_peers(self) -> frozenset[str]:
        """Members heard of lately, this one included."""


class Planning:
    """The plans of this node's models; `run` is its one loop."""

    def __init__(self, node: Host) -> None:
        self._node = node
        self._meter = LinkMeter(
            node.mesh, node.replica, node.peer_id, self._could_share_a_plan, node.clock
        )
        self.measured_share = 0.0  # of the figures of this device that are there, for people
        self._devices: dict[str, DeviceProfile] = {}  # this node's own, by model digest
        self._refining = Refining(
            self._devices, node.server.timings, self._publish_profiles, node.clock
        )
        self._routes: dict[str, tuple[Route, ...]] = {}  # of the active plan, by model digest
        self._reasons: dict[str, str] = {}  # why a model has no route
        self.loading = Loading(node, self._spoilt)
        self._uncovered_since: dict[str, float] = {}  # by model digest
        self._fronts: dict[str, tuple[World, Front | PartitionError]] = {}
        self._first_seen: dict[str, float] = {}  # when a proposal came, by plan digest
        self._woken = asyncio.Event()
        self._is_withdrawn = False
        node.replica.subscribe(lambda _author, _keys: self._woken.set())

    def routes(self, model_digest: str) -> tuple[Route, ...]:
        """The pipelines of a model's active plan; none if it has no plan."""
        return self._routes.get(model_digest, ())

    def route(self, model_digest: str) -> Route | None:
        """The first pipeline of a model's active plan, if it has one."""
        return next(iter(self.routes(model_digest)), None)

    def why_not(self, model_digest: str) -> str:
        """Why a model has no active plan, in a phrase."""
        if self._node.catalog.by_digest(model_digest) is None:
            return "its file is not on this machine; give it with --model"
        return self._reasons.get(model_digest, "the devices are being measured")

    def wake(self) -> None:
        """Look again soon: something changed."""
        self._woken.set()

    def link_up(self, peer: Peer) -> None:
        """A link came up: there may be something to measure."""
        self._meter.link_up(peer.peer_id)
        self.wake()

    def withdraw(self) -> None:
        """Take back our word that stages are ready: the node is stopping."""
        self._is_withdrawn = True
        self.loading.withdraw()

    async def outlook(self, model: LocalModel) -> Outlook:
        """What is known of a model now, and the front over it."""
        state = self.state(model)
        world = self.world(model, state)
        return Outlook(
            model=model,
            state=state,
            world=world,
            front=await self._front(model, world),
            active=self.route(model.digest),
            why_not=self.why_not(model.digest),
            pinned=pinned(state.pin, world),
        )

    def state(self, model: LocalModel) -> ModelState:
        """What the replica says of a model now."""
        n_blocks = model.checkpoint.config.n_blocks
        return read_state(self._node.views, model.digest, n_blocks, unix_time=time.time())

    def world(self, model: LocalModel, state: ModelState | None = None) -> World:
        """What a plan could be made of now."""
        workload = Workload(context_tokens=self._node.config.context_tokens)
        return world_of(model, state or self.state(model), self._node.live_peers(), workload)

    async def run(self) -> None:
        """Measure, then plan until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._meter.run())
            group.create_task(self._refining.run())
            group.create_task(self._plan_for_ever())

    async def _plan_for_ever(self) -> None:
        await self._publish_devices()
        while True:
            for model in self._node.catalog:
                await self._step(model)
            try:
                async with asyncio.timeout(STEP_S):
                    await self._woken.wait()
            except TimeoutError:
                continue
            self._woken.clear()

    def _could_share_a_plan(self) -> frozenset[str]:
        """The live members that offer a model of ours: links to others are never planned with.

        Nobody until this device is measured: a probe and that would spoil each other.
        """
        models = {model.digest for model in self._node.catalog}
        if not models:
            return frozenset()
        profiles = self._node.replica.items(f"{ProfileRecord.prefix}device")
        offering = {
            author
            for author, _, value in profiles
            if isinstance(offered := value.get("value"), dict) and models & offered.keys()
        }
        if self._node.peer_id not in offering:
            return frozenset()
        return self._node.live_peers() & offering

    async def _publish_devices(self) -> None:
        node, models = self._node, list(self._node.catalog)
        for idx, model in enumerate(models):
            manifest = model.manifest()
            node.replica.set(manifest.key, manifest.to_value())
            progress = partial(self._measured, idx, len(models))
            measure = partial(
                device_profile, model, node.config, node.peer_id, node.home, progress=progress
            )
            device = (await node.loader.run(measure)).value
            known = self.state(model).claimed.get(node.peer_id)  # what an earlier life published
            version = 1 if known is None else known.version + 1
            self._devices[model.digest] = replace(device, version=version)
        self.measured_share = 1.0
        self._publish_profiles()

    def _measured(self, n_done: int, n_models: int, share: float) -> None:
        """On the loader's thread."""
        self.measured_share = (n_done + share) / n_models

    def _publish_profiles(self) -> None:
        record, replica = device_record(self._devices), self._node.replica
        if self._devices or replica.get(self._node.peer_id, record.key) is not None:
            replica.set(record.key, record.to_value())

    async def _step(self, model: LocalModel) -> None:
        if self._is_withdrawn:
            return
        state = self.state(model)
        live = self._node.live_peers()
        valid = valid_proposals(state.plans, model.layout, state.devices, state.ready)
        active = active_plan(valid, state.ready, live, model.layout, state.devices, state.links)
        self._set_route(model, active, state)
        await self._load_and_unload(model, valid, state, active, live)
        if should_propose(
            self._node.peer_id,
            live,
            pending_for_s=self._pending_for_s(valid, active, live),
            uncovered_for_s=self._uncovered_for_s(model, active),
        ):
            await self._propose(model, state, active, live)

    def _pending_for_s(
        self, valid: Sequence[LayerPlan], active: LayerPlan | None, live: frozenset[str]
    ) -> float | None:
        """How long the newest proposal that could become active has been on its way."""
        now = self._node.clock()
        epoch = active.epoch if active is not None else 0
        pending = [p.digest for p in valid if p.epoch > epoch and live.issuperset(p.peers)]
        since = [self._first_seen.setdefault(digest, now) for digest in pending]
        return now - max(since) if since else None

    def _uncovered_for_s(self, model: LocalModel, active: LayerPlan | None) -> float | None:
        if active is not None:
            self._uncovered_since.pop(model.digest, None)
            return None
        now = self._node.clock()
        return now - self._uncovered_since.setdefault(model.digest, now)

    def _set_route(self, model: LocalModel, active: LayerPlan | None, state: ModelState) -> None:
        known = self.route(model.digest)
        if active is None:
            if self._routes.pop(model.digest, None) is not None:
                logger.warning("%s has no plan now", model.name)
            return
        if known is not None and known.digest == active.digest:
            return
        try:
            routes = routes_of(active)
        except UnsupportedPlan as error:
            self._reasons[model.digest] = str(error)
            return
        engine = routes[0].engine
        if engine != model.engine:
            self._reasons[model.digest] = (
                f"the swarm runs it on {engine}: start this node {options_for(engine)}"
            )
            self._routes.pop(model.digest, None)
            return
        spans = [route.spans for route in routes]
        logger.info("plan of %s is active: %s", model.name, spans)
        self._routes[model.digest] = self._timed(routes, model, state)

    def _timed(
        self, routes: tuple[Route, ...], model: LocalModel, state: ModelState
    ) -> tuple[Route, ...]:
        """The routes with what a token takes on each, asked for here; as they are if unknown."""
        if len(routes) == 1:
            return routes
        try:
            predictions = [
                predict_all(
                    [route.plan.pipelines[route.pipeline_idx]],
                    model.layout,
                    state.devices.values(),
                    state.links,
                    head=self._node.peer_id,
                )
                for route in routes
            ]
        except PartitionError:  # this node has no profile, or no link to one of them
            return routes
        return tuple(
            replace(route, token_s=prediction.tpot_s)
            for route, prediction in zip(routes, predictions, strict=True)
        )

    async def _load_and_unload(
        self,
        model: LocalModel,
        valid: list[LayerPlan],
        state: ModelState,
        active: LayerPlan | None,
        live: frozenset[str],
    ) -> None:
        own, epoch = self._node.peer_id, active.epoch if active is not None else 0
        wanted = [
            plan
            for plan in valid
            if plan.epoch >= epoch and live.issuperset(plan.peers) and own in plan.peers
        ][:MAX_LOADED]
        await self.loading.step(model, wanted, state, self._devices.get(model.digest))

    def _spoilt(self, model: LocalModel) -> None:
        """Stop offering a model, so that others plan anew."""
        self._devices.pop(model.digest, None)
        self._publish_profiles()

    async def _propose(
        self,
        model: LocalModel,
        state: ModelState,
        active: LayerPlan | None,
        live: frozenset[str],
    ) -> None:
        node, world = self._node, self.world(model, state)
        pin = pinned(state.pin, world)
        wanted = None if pin is None else pin.candidate
        best: Candidate | None = wanted
        if best is None:
            front = await self._front(model, world)
            if isinstance(front, PartitionError):
                if active is None:
                    self._reasons[model.digest] = str(front)
                return
            best = choose(front, node.config.prefer)
        if active is None:
            self._reasons[model.digest] = "its members are loading their blocks"
        elif wanted is not None:
            if active.pipelines == wanted.pipelines:
                return
        else:
            active_now = priced(active, model.layout, state.devices, state.links)
            if not should_replace(active_now, best.prediction, node.config.prefer):
                best = adjusted(active.pipelines, world)
                if best is None:
                    return
        epoch = highest_active_epoch(state.plans, state.ready) + 1
        plan = _plan_of(model, best, epoch, node.peer_id)
        if any(known.digest == plan.digest for known in state.plans):
            return
        logger.info("proposing a plan of %d stages for %s", len(plan.stages), model.name)
        self._clean_up_own(model, plan.epoch)
        record = plan_record(plan)
        node.replica.set(record.key, record.to_value())

    async def _front(self, model: LocalModel, world: World) -> Front | PartitionError:
        """The front by the profiles of now, or why there is none; searched when they change."""
        known = self._fronts.get(model.digest)
        if known is None or known[0] != world:
            # Seconds for a dozen devices: not on the loop.
            front = await asyncio.to_thread(front_or_reason, world)
            known = self._fronts[model.digest] = (world, front)
        return known[1]

    def _clean_up_own(self, model: LocalModel, epoch: int) -> None:
        """Drop our proposals that a new one of `epoch` makes pointless."""
        for record in self._node.views.plans(model.digest):
            is_old = record.epoch < epoch - 1 or record.epoch == epoch
            if record.proposer == self._node.peer_id and is_old:
                self._node.replica.delete(record.key)


def _plan_of(model: LocalModel, best: Candidate, epoch: int, proposer: str) -> LayerPlan:
    return make_plan(
        best.pipelines,
        best.prediction,
        model_digest=model.digest,
        epoch=epoch,
        proposer=proposer,
        engine=model.engine,
    )
