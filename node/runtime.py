"""One running node: builds every part, starts them in order, and stops them in order.

The order of stopping is written in `Node._stop` and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any

from covey.store.awareness import Awareness
from covey.store.disk import Disk
from covey.store.replica import Replica
from covey.store.schema import Ready, Revocation
from covey.store.views import Views
from covey.transport.control import ControlPlane
from covey.transport.errors import LinkClosed, PeerLeft, TransportError
from covey.transport.frame import Frame
from covey.transport.identity import Identity, verify
from covey.transport.lane.opening import Lanes
from covey.transport.membership import Swarm
from covey.transport.mesh import Mesh
from covey.transport.messages import Forward, JoinRequest, MembershipNotice, Welcome
from covey.transport.peer import Peer
from covey.transport.reach import Reach

from .api.server import ApiServer
from .catalog import Catalog, LocalModel
from .config import NodeConfig
from .control import Control
from .desk import Desk
from .discovery import Discovery
from .engines import Engines
from .epochs import Epochs
from .errors import NotReady, RemovedFromSwarm
from .facts import own_card, relays_on_offer
from .generation import Generator
from .gossip import Gossip
from .group.forming import lane_kinds
from .group_watch import GroupWatch
from .home import Home
from .members import Members
from .membership import (
    Membership,
    enter,
    entry_of,
    load_invites,
    make_welcome,
    save_invites,
    save_keyring,
    save_removal,
)
from .observing import Observing
from .pipeline import Pipelines
from .planning import Planning
from .route import Route
from .serving import StageServer
from .switch import Switch
from .worker import Worker

logger = logging.getLogger(__name__)

EXPIRE_S = 1.0  # between looks at leases that ran out


class Node:
    """A running node; made by `running_node`. What it answers to the API is `desk.py`."""

    def __init__(self, config: NodeConfig, home: Home, identity: Identity, entry: Membership):
        self.config = config
        self.home = home
        self.identity = identity
        self.peer_id = identity.peer_id
        self.started_at = time.time()
        self.stop_requested = asyncio.Event()
        self.engines = Engines(
            config.engine, config.threads, quantize=config.quantize, speed=config.speed
        )
        self.catalog = Catalog.open(config.models, self.engines)
        self.worker = Worker("covey-engine")
        self.loader = Worker("covey-loader")
        self.invites = load_invites(home)
        self._disk = Disk(home.store)
        self.replica = Replica(
            self.peer_id,
            swarm=entry.swarm.id,
            sign=identity.sign,
            verify=verify,
            is_member=self._is_allowed,
            disk=self._disk,
            started_ms=int(self.started_at * 1000),
        )
        self.views = Views(self.replica)
        self.awareness = Awareness(
            self.peer_id,
            swarm=entry.swarm.id,
            sign=identity.sign,
            verify=verify,
            is_member=self._is_allowed,
            started_ms=int(self.started_at * 1000),
        )
        clock = asyncio.get_running_loop().time
        self.clock = clock
        self.switch = Switch(self.peer_id, lambda peer_id: self.mesh.peer(peer_id))
        self.server = StageServer(self.switch, self.worker, clock, self._hold)
        self.pipelines = Pipelines(self.switch)
        self.switch.on_message(Forward, self._take_forward)
        self.mesh = Mesh(
            identity,
            entry.swarm,
            listen=[(config.host, config.port)],
            invites=self.invites,
            is_allowed=self._is_allowed,
            handler=self._receive,
            on_up=self._link_up,
            on_down=self._link_down,
            welcome=self._welcome,
        )
        self.members = Members(
            identity,
            swarm=entry.swarm.id,
            founder=entry.swarm.founder,
            replica=self.replica,
            views=self.views,
            awareness=self.awareness,
            mesh=self.mesh,
            on_removed=self._member_removed,
            on_standing=lambda: self.epochs.look(),
        )
        self.lanes = Lanes(self.mesh, kinds=lane_kinds())
        rng = random.Random(secrets.randbits(64))  # noqa: S311  spreads load, guards nothing
        self.epochs = Epochs(
            identity,
            entry.keyring,
            members=self.members,
            mesh=self.mesh,
            switch=self.switch,
            save=lambda keyring: save_keyring(home, keyring),
            on_new_secret=self._secret_changed,
            clock=clock,
            rng=rng,
        )
        self.removed: RemovedFromSwarm | None = None  # this node itself
        self.reach: Reach  # made when the mesh listens
        self.switch.on_message(
            MembershipNotice, lambda _, notice, __: self.members.take_notice(notice.statements)
        )
        self.gossip = Gossip(
            self.mesh,
            self.switch,
            self.replica,
            self.awareness,
            clock,
            rng,
            watched=self._plan_partners,
            state=lambda: {"epoch": self.swarm.epoch},
        )
        self.control = Control(self._make_control, on_new=self._control_replaced, rng=rng)
        self.discovery = Discovery(
            control=self.control.plane,
            mesh=self.mesh,
            views=self.views,
            home=home,
            swarm=entry.swarm.id,
            own_peer_id=self.peer_id,
            known=entry.known,
            is_allowed=self._is_allowed,
            live=self.live_peers,
            rng=rng,
            on_failed=self.epochs.dial_failed,
        )
        self.planning = Planning(self)
        self.observing = Observing(self.replica, self.peer_id, self.planning.state, clock=clock)
        self.group_watch = GroupWatch(
            self.peer_id, self.planning.loading, self.catalog, self.observing, self.planning.state
        )
        self.generator = Generator(
            find_route=self._find_route,
            hold=self._hold,
            pipelines=self.pipelines,
            worker=self.worker,
            context_tokens=config.context_tokens,
            max_sessions=config.max_sessions,
            observe=self.observing.saw,
            timings=self.server.timings,
        )
        self._known = entry.known
        self.desk = Desk(self)
        self.api: ApiServer | None = None

    def request_stop(self) -> None:
        """Let `wait` return."""
        self.stop_requested.set()

    # --- life --------------------------------------------------------------------------------

    async def _start(self, stack: AsyncExitStack) -> None:
        self._take_back_promises()
        await stack.enter_async_context(self.mesh)
        self.reach = Reach(
            self.mesh,
            self.swarm,
            on_change=self._reach_changed,
            relays_for_others=self.config.relay,
            maps_ports=self.config.map_port,
        )
        await stack.enter_async_context(self.reach)
        for member in self._known:
            self.mesh.learn(member.peer_id, member.addresses)
        await self.control.start()
        stack.push_async_callback(self.control.aclose)
        self._publish_card()
        control_key = secrets.token_urlsafe(32)
        config = self.config
        self.api = ApiServer(
            self.desk, config.api_host, config.api_port, config.api_key, control_key
        )
        await self.api.start()
        self.home.publish_api(self.api.url, control_key)
        self._loops = asyncio.create_task(self._run_loops(), name="node loops")
        self._loops.add_done_callback(lambda _: self.stop_requested.set())

    def _take_back_promises(self) -> None:
        """A node that was killed said that stages are ready; in this life none is loaded yet."""
        with self.replica.edit() as edit:
            for author, key, _ in self.replica.items(Ready.prefix):
                if author == self.peer_id:
                    edit.delete(key)

    async def _run_loops(self) -> None:
        async with asyncio.TaskGroup() as group:
            for loop in (
                self.gossip.run,
                self.discovery.run,
                self.planning.run,
                self.group_watch.run,
                self.epochs.run,
                self.control.run,
                self._expire,
            ):
                group.create_task(loop(), name=loop.__qualname__)

    async def wait(self) -> None:
        """Until somebody asks the node to stop.

        Raises:
            RemovedFromSwarm: it is no member any more.
            ExceptionGroup: one of its loops failed, which is a bug.
        """
        await self.stop_requested.wait()
        if self.removed is not None:
            raise self.removed
        if self._loops.done():
            self._loops.result()

    async def _stop(self) -> None:
        """Refuse new work, take back what we promised, finish or end sessions, say goodbye."""
        give_up_at = self.clock() + self.config.grace_s  # one grace for what we ask and serve
        self.generator.refuse_new()
        self.server.refuse_new()
        self.planning.withdraw()
        if self.api is not None:
            await self.api.stop(self.config.grace_s)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(give_up_at):
                await self.server.drained()
                await self.planning.loading.drained()
        await self.pipelines.aclose()
        await self.server.aclose()
        await self.planning.loading.aclose()
        await self.lanes.aclose()
        await self.discovery.aclose()
        await self.epochs.aclose()
        await self.gossip.aclose()
        await self.switch.aclose()
        self._loops.cancel()
        await asyncio.wait({self._loops})

    def _release(self) -> None:
        """Let go of threads and files; after this the process may end."""
        self.worker.close()
        self.loader.close()
        self._disk.close()

    def _publish_card(self) -> None:
        card = own_card(self)
        self.replica.set(card.key, card.to_value())

    def _reach_changed(self) -> None:
        """What others must know to reach us is something else now."""
        self.discovery.update_reach(
            is_reachable=self.reach.is_reachable,
            relays=self.reach.relays,
            mapped=self.reach.mapped_addresses,
        )
        self._publish_card()

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(EXPIRE_S)
            self.server.expire()
            self.reach.see(relays_on_offer(self))
            self.members.saw(self.live_peers(), unix_time=time.time())

    def _make_control(self) -> ControlPlane:
        return ControlPlane(
            private_key=self.identity.seed,
            psk=self.swarm.libp2p_psk,
            swarm=self.swarm.id,
            listen=(self.config.host,),
            mdns=self.config.mdns,
        )

    def _secret_changed(self, swarm: Swarm) -> None:
        """Hand the new secret to all that has keys of its own; the mesh has it already."""
        logger.info("keys of epoch %d are in use", swarm.epoch)
        self.reach.use_swarm(swarm)
        self.control.follow()

    def _control_replaced(self, plane: ControlPlane) -> None:
        self.discovery.use_control(plane)
        self._publish_card()

    # --- links -------------------------------------------------------------------------------

    @property
    def swarm(self) -> Swarm:
        """The swarm, with the secret that this node uses now."""
        return self.epochs.swarm

    def live_peers(self) -> frozenset[str]:
        """Members heard of lately, ourselves included."""
        heard = filter(self._is_allowed, self.awareness.live(self.clock()))
        return frozenset({self.peer_id, *heard})

    def _plan_partners(self) -> set[str]:
        """Those who hold another part of a plan that we hold a part of."""
        plans = [held.route.plan for held in self.planning.loading]
        return {peer for plan in plans for peer in plan.peers} - {self.peer_id}

    def _is_allowed(self, peer_id: str) -> bool:
        """Every holder of the secret is a member, unless it was removed."""
        return self.members.is_allowed(peer_id)

    def _receive(self, peer: Peer, frame: Frame) -> None:
        if self._is_allowed(peer.peer_id):  # a removed one's link lives for its last words only
            self.switch.receive(peer, frame)

    def _member_removed(self, revocation: Revocation) -> None:
        peer_id = revocation.member
        if peer_id == self.peer_id:
            self.removed = save_removal(self.home, self.members.name_of(revocation.by))
            self.request_stop()
            return
        self.discovery.forget(peer_id)
        self.reach.drop(peer_id)
        self.lanes.drop(peer_id)
        self._peer_lost(peer_id)

    def _link_up(self, peer: Peer) -> None:
        self.gossip.link_up(peer.peer_id)
        self.planning.link_up(peer)
        self.discovery.hurry()

    def _link_down(self, peer_id: str, error: TransportError) -> None:
        logger.info("link down: %s", error, extra={"peer": peer_id[-8:]})
        self.reach.link_down(peer_id)
        self.gossip.link_down(peer_id, is_failure=not isinstance(error, LinkClosed | PeerLeft))
        self._peer_lost(peer_id)

    def _peer_lost(self, peer_id: str) -> None:
        self.planning.loading.peer_lost(peer_id)
        self.server.peer_lost(peer_id)
        self.pipelines.peer_lost(peer_id)
        self.planning.wake()

    def _welcome(self, joiner: str, request: JoinRequest) -> Welcome:
        logger.info("a new member joins", extra={"peer": joiner[-8:]})
        self.mesh.learn(joiner, request.addresses)
        save_invites(self.home, self.invites)
        self.members.admitted(joiner, epoch=self.swarm.epoch)
        return make_welcome(self.swarm, map(entry_of, self.views.members().values()))

    def _take_forward(self, sender: str, message: Forward, tensors: Any) -> None:
        if not self.pipelines.take_return(sender, message, tensors):
            self.server.take_forward(sender, message, tensors)

    @contextmanager
    def _hold(self, peers: Sequence[str]) -> Iterator[None]:
        held = [peer for peer_id in peers if (peer := self.mesh.peers.get(peer_id)) is not None]
        for peer in held:
            peer.hold()
        try:
            yield
        finally:
            for peer in held:
                peer.release()

    def _find_route(self, name: str) -> tuple[LocalModel, Route]:
        model = self.catalog.by_name(name)
        routes = self.planning.routes(model.digest)
        if not routes:
            raise NotReady(name, self.planning.why_not(model.digest))
        return model, self.pipelines.pick(routes, self.mesh.peers.keys() | {self.peer_id})


@asynccontextmanager
async def running_node(
    config: NodeConfig, *, invite: str | None = None, may_found: bool = False
) -> AsyncGenerator[Node, None]:
    """A node from its first port to its last goodbye.

    Raises:
        ConfigError, ModelError, TransportError, StoreError: it could not start; the text says why.
    """
    with Home(config.home) as home:
        identity = Identity.load_or_create(home.identity)
        entry = await enter(home, identity, invite=invite, may_found=may_found)
        node = Node(config, home, identity, entry)
        try:
            async with AsyncExitStack() as stack:
                await node._start(stack)
                stack.push_async_callback(node._stop)
                yield node
        finally:
            node._release()
