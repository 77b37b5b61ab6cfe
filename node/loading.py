"""What this node holds of the plans in use: loads its stages and shards, and says when they serve.

A stage that one peer runs alone serves once it is loaded. Of a group every member loads its shard
and says ready; the hub only once the group is formed, since sessions come to it. A group that broke
is taken out of service and formed anew as long as the plan is wanted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from covey.partition.memory import member_bytes
from covey.partition.network import Network, one_way_s
from covey.partition.plan import LayerPlan, Member, StagePlan
from covey.partition.profile import DeviceProfile, LinkProfile
from covey.store.replica import Replica
from covey.store.schema import Ready
from covey.transport.errors import ErrorCode, TransportError
from covey.transport.lane.opening import Lanes
from covey.transport.messages import MAX_TOKENS
from covey.transport.tasks import Tasks

from .catalog import LocalModel
from .engine.errors import EngineError
from .engine.lease import LeaseTable
from .engine.shard import Shard, Slice
from .engine.stage import Stage
from .errors import NodeError
from .group.all_reduce import GroupLink, Round
from .group.forming import Formed, Groups, form_on
from .group.spoke import Spoke
from .group.stage import GroupStage
from .model.errors import ModelError
from .planning_state import ModelState
from .route import Route
from .serving import LEASE_TTL_S, LoadedStage, StageServer
from .switch import Switch
from .worker import Worker

logger = logging.getLogger(__name__)

Role = Literal["alone", "hub", "spoke"]

FORM_SOON_S = 1.0  # then our word that the group serves is taken back
FORM_AGAIN_S = 0.5  # between attempts to form a group
DRAINED_S = 0.05  # between looks whether sessions of groups have ended
FORM_ANEW_S = 4.0  # within a step, whose sessions wait for it


class Host(Protocol):
    """What loading needs of the node it runs in."""

    peer_id: str
    replica: Replica
    server: StageServer
    switch: Switch
    lanes: Lanes
    loader: Worker


@dataclass(slots=True, eq=False)
class Held:
    """This node's part of one plan."""

    route: Route
    stage_idx: int
    member: Member
    kv_bytes: int
    engine: Stage | Shard | None = None  # what computes here, once it is loaded
    group: GroupStage | None = None  # of a hub
    spoke: Spoke | None = None
    forming: asyncio.Task[None] | None = field(default=None)
    is_serving: bool = False

    @property
    def stage(self) -> StagePlan:
        """The stage of the plan."""
        return self.route.stages[self.stage_idx]

    @property
    def rounds(self) -> Sequence[Round]:
        """The last sums of the group that were added up here; none where there is no group."""
        member = self.group or self.spoke
        return () if member is None else member.rounds

    @property
    def role(self) -> Role:
        """What this node is in it."""
        if not self.stage.is_group:
            return "alone"
        return "hub" if self.stage.hub == self.member.peer_id else "spoke"

    @property
    def stall_s(self) -> float:
        """Seconds that steps have waited for the disk, in all."""
        stall_s: float = getattr(self.engine, "stall_s", 0.0)  # of engines that can stream
        return stall_s

    @property
    def sum_wait_s(self) -> float:
        """Seconds that steps have waited for the other members of the group, in all."""
        part = self.group or self.spoke
        return part.sum_wait_s if part is not None else 0.0


class Loading:
    """The parts of plans in this node's memory.

    Args:
        node: that holds them.
        on_spoilt: told of a model whose file is not what it was: it cannot be served from here.
    """

    def __init__(self, node: Host, on_spoilt: Callable[[LocalModel], None]) -> None:
        self._node = node
        self._on_spoilt = on_spoilt
        self.groups = Groups(node.switch, lambda: node.lanes)
        self._held: dict[str, Held] = {}  # by plan digest
        self._failed: set[str] = set()  # plans whose stage could not be loaded here
        self._links: Sequence[LinkProfile] = ()  # as measured by all members
        self._is_withdrawn = False
        self._tasks = Tasks()

    def __iter__(self) -> Iterator[Held]:
        """Every part, whether it serves or not."""
        return iter(list(self._held.values()))

    async def step(
        self,
        model: LocalModel,
        wanted: Sequence[LayerPlan],
        state: ModelState,
        device: DeviceProfile | None,
    ) -> None:
        """Hold what is wanted of a model's plans and nothing else; what is in use stays.

        Without `device`, the model is not offered from here, and nothing new is loaded.
        """
        self._links = state.links
        keep = {plan.digest for plan in wanted}
        for digest, held in list(self._held.items()):
            is_ours = held.route.plan.model_digest == model.digest
            if is_ours and digest not in keep and not self._is_in_use(held):
                await self._unload(held)
        for plan in wanted:
            known = self._held.get(plan.digest)
            if known is None and plan.digest not in self._failed and device is not None:
                await self._load(model, plan, device)
            elif (
                known is not None
                and known.is_serving
                and self._node.peer_id not in state.ready[plan.digest]
            ):
                self._say_ready(known)

    async def drained(self) -> None:
        """Until no group needs a shard of ours for a session; the caller sets a deadline."""
        while any(held.spoke is not None and held.spoke.is_in_use for held in self):  # noqa: ASYNC110
            await asyncio.sleep(DRAINED_S)  # spokes hear of the end on threads of their own

    def withdraw(self) -> None:
        """Take back our word that parts are ready: the node is stopping."""
        self._is_withdrawn = True
        replica, own = self._node.replica, self._node.peer_id
        for author, key, _ in list(replica.items(Ready.prefix)):
            if author == own:
                replica.delete(key)

    def peer_lost(self, peer_id: str) -> None:
        """Groups that cannot go on without a peer end here and now."""
        self.groups.peer_lost(peer_id)
        for held in self:
            if held.group is not None and peer_id in held.stage.peers and not held.group.is_broken:
                held.group.give_up(f"{peer_id[-8:]} was lost")
                self._broken(held)

    async def aclose(self) -> None:
        """End the groups; the stages are the server's business."""
        await self._tasks.aclose()
        for held in self:
            if held.group is not None:
                held.group.give_up("this node is stopping")
        await self.groups.aclose()

    # --- loading and unloading --------------------------------------------------------------------

    async def _load(self, model: LocalModel, plan: LayerPlan, device: DeviceProfile) -> None:
        digest = plan.digest
        try:
            route = Route.for_member(plan, self._node.peer_id)
            stage_idx = route.stage_of(self._node.peer_id)
            stage = route.stages[stage_idx]
            idx = stage.peers.index(self._node.peer_id)
            weights = member_bytes(model.layout, stage, idx)
            kv_bytes = max(device.memory_bytes - weights - self._taken_bytes(), 0)
            held = Held(route, stage_idx, stage.members[idx], kv_bytes)
            logger.info("loading blocks %d to %d of %s", *route.spans[stage_idx], model.name)
            if stage.is_group:
                await self._load_shard(model, held, idx)
            else:
                await self._load_stage(model, held)
        except (NodeError, EngineError) as error:
            logger.warning("a plan cannot run here: %s", error)
            self._failed.add(digest)
        except (ModelError, OSError):
            # Its file is not what it was: stop offering the model, so that others plan anew.
            logger.exception("%s cannot be served from here", model.name)
            self._failed.add(digest)
            self._on_spoilt(model)

    async def _load_stage(self, model: LocalModel, held: Held) -> None:
        span = held.route.spans[held.stage_idx]

        def load() -> Stage:
            return model.load_stage(
                span,
                verify=True,
                kv_bytes=held.kv_bytes,
                streamed_blocks=held.member.streamed_blocks,
            )

        engine = held.engine = (await self._node.loader.run(load)).value
        if not self._is_withdrawn:
            self._held[held.route.digest] = held
            self._serve(held, engine, held.kv_bytes)

    async def _load_shard(self, model: LocalModel, held: Held, idx: int) -> None:
        stage, digest = held.stage, held.route.digest
        span = held.route.spans[held.stage_idx]
        cut = Slice(stage.kv_heads_of(idx), stage.mlp_columns_of(idx))

        def load() -> Shard:
            return model.load_shard(
                span,
                cut,
                verify=True,
                kv_bytes=held.kv_bytes,
                streamed_blocks=held.member.streamed_blocks,
            )

        shard = held.engine = (await self._node.loader.run(load)).value
        if self._is_withdrawn:
            return
        self._held[digest] = held
        if idx == stage.hub_idx:
            self._lead(held, shard)
            return
        held.spoke = Spoke(shard)
        kv_tokens = _kv_tokens(shard, held.kv_bytes)
        self.groups.add(digest, stage, held.stage_idx, held.spoke, kv_tokens=kv_tokens)
        held.is_serving = True
        self._say_ready(held)

    async def _unload(self, held: Held) -> None:
        digest = held.route.digest
        del self._held[digest]
        if held.forming is not None:
            held.forming.cancel()
        self._node.server.remove(digest)
        if held.group is not None:
            held.group.give_up("its plan is over")
        self._unsay_ready(held)
        await self.groups.remove(digest)

    def _is_in_use(self, held: Held) -> bool:
        if held.spoke is not None:
            return held.spoke.is_in_use
        return self._node.server.sessions_of(held.route.digest) > 0

    def _taken_bytes(self) -> int:
        """Memory that all parts take now."""
        taken = sum(stage.taken_bytes for stage in self._node.server.stages.values())
        for held in self:
            if held.spoke is not None:
                taken += held.spoke.shard.weight_bytes + held.spoke.leased_bytes
            elif held.group is not None and not held.is_serving:
                taken += held.group.weight_bytes
        return taken

    # --- groups, at their hub ---------------------------------------------------------------------

    def _lead(self, held: Held, shard: Shard) -> None:
        loop = asyncio.get_running_loop()

        async def form() -> Formed:
            return await self._form(held)

        def on_broken() -> None:
            loop.call_soon_threadsafe(self._broken, held)

        group = GroupStage(shard, lambda: form_on(loop, form, FORM_ANEW_S), on_broken)
        held.group = group
        held.forming = self._tasks.spawn(self._form_until_it_serves(held, group), "form a group")

    async def _form(self, held: Held) -> Formed:
        link = group_link(held.stage, self._links)
        return await self.groups.form(held.stage, held.route.digest, held.stage_idx, link)

    async def _form_until_it_serves(self, held: Held, group: GroupStage) -> None:
        formed: Formed | None = None
        while formed is None:
            forming = self._tasks.spawn(self._form(held), "form a group once")
            try:
                await asyncio.wait({forming}, timeout=FORM_SOON_S)
                if not forming.done():
                    self._unsay_ready(held)
                formed = await forming
            except TransportError as error:
                logger.info("a group is not formed yet: %s", error)
                self._unsay_ready(held)
                await asyncio.sleep(FORM_AGAIN_S)
            finally:
                forming.cancel()
        group.use(formed.reduce)
        n_tokens = min(_kv_tokens(group.shard, held.kv_bytes), formed.kv_tokens)
        self._serve(held, group, n_tokens * group.kv_bytes_per_token)

    def _broken(self, held: Held) -> None:
        """End its sessions and form it anew; our word stands unless that fails, or takes long."""
        if not held.is_serving or self._held.get(held.route.digest) is not held:
            return
        held.is_serving = False
        self._node.server.remove(held.route.digest, ErrorCode.PEER_LOST)
        if held.group is not None:
            forming = self._form_until_it_serves(held, held.group)
            held.forming = self._tasks.spawn(forming, "form a group")

    # --- serving ----------------------------------------------------------------------------------

    def _serve(self, held: Held, engine: Stage, kv_bytes: int) -> LoadedStage:
        leases = LeaseTable(
            bytes_per_token=engine.kv_bytes_per_token, capacity_bytes=kv_bytes, ttl_s=LEASE_TTL_S
        )
        stage = self._node.server.add(held.route, held.stage_idx, engine, leases)
        held.is_serving = True
        self._say_ready(held)
        return stage

    def _say_ready(self, held: Held) -> None:
        if self._is_withdrawn:
            return
        ready = _ready(held, at=time.time())
        self._node.replica.set(ready.key, ready.to_value())

    def _unsay_ready(self, held: Held) -> None:
        ready = _ready(held, at=0.0)
        if self._node.replica.get(self._node.peer_id, ready.key) is not None:
            self._node.replica.delete(ready.key)


def _ready(held: Held, *, at: float) -> Ready:
    place = held.route.place_in_plan(held.stage_idx)
    return Ready(plan_digest=held.route.digest, stage_idx=place, at=at)


def group_link(stage: StagePlan, links: Sequence[LinkProfile]) -> GroupLink | None:
    """What lies between the members that send each other parts, the worst; None if unknown."""
    network, peers = Network(links), stage.peers
    pairs = {*zip(peers, (*peers[1:], peers[0]), strict=True)}
    pairs |= {(peer, stage.hub) for peer in peers if peer != stage.hub}
    pairs |= {(receiver, sender) for sender, receiver in pairs}
    known = [link for pair in sorted(pairs) if (link := network.link(*pair)) is not None]
    if len(known) < len(pairs):
        return None
    return GroupLink(
        latency_s=max(map(one_way_s, known)),
        bytes_per_s=min(link.bandwidth_bytes_per_s for link in known),
    )


def _kv_tokens(shard: Shard, kv_bytes: int) -> int:
    """Positions that a shard has room for."""
    per_token = shard.kv_bytes_per_token
    return min(kv_bytes // per_token, MAX_TOKENS) if per_token else MAX_TOKENS
