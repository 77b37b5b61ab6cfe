"""What a running node answers to its API and its commands; the other side of `service.py`.

Each method is a few lines: it finds the part of the node that knows, and puts what that says into
the form of the seam. Nothing is decided here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from covey.transport.errors import TransportError

from .doctor import doctor_facts, ping_facts
from .errors import InvalidRequest, MemberUnreachable
from .facts import member_facts, model_entries, status_facts
from .membership import save_invites
from .pins import next_pin, pipelines_value, read_pipelines, why_infeasible
from .plan_facts import named, plan_facts
from .plan_questions import question_of
from .service import Event, GenerationRequest, ModelEntry, PlanQuery

if TYPE_CHECKING:
    from .runtime import Node


class Desk:
    """Implements `service.Service` for one node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def models(self) -> Sequence[ModelEntry]:
        """See `Service.models`."""
        return model_entries(self._node)

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """See `Service.generate`."""
        return self._node.generator.generate(request)

    def status(self) -> dict[str, Any]:
        """See `Service.status`."""
        return status_facts(self._node)

    async def plan(self, query: PlanQuery) -> dict[str, Any]:
        """See `Service.plan`."""
        node = self._node
        outlook = await node.planning.outlook(node.catalog.by_name(query.model))
        question = question_of(node, outlook, query)
        return await asyncio.to_thread(plan_facts, outlook, question)

    def pin_plan(self, model: str, plan: Mapping[str, Any]) -> dict[str, Any]:
        """See `Service.pin_plan`."""
        node = self._node
        local = node.catalog.by_name(model)
        world = node.planning.world(local)
        pipelines = read_pipelines(plan, world, node.members.find)
        why_not = why_infeasible(pipelines, world)
        names = {peer: card.name for peer, card in node.views.members().items()}
        if why_not is not None:
            raise InvalidRequest("plan", named(why_not, names))
        pin = next_pin(node.views, local.digest, pipelines, at=time.time())
        node.replica.set(pin.key, pin.to_value())
        return {"model": local.name, **pipelines_value(pipelines, names)}

    def unpin_plan(self, model: str) -> dict[str, Any]:
        """See `Service.unpin_plan`."""
        node = self._node
        local = node.catalog.by_name(model)
        newest = node.views.newest_pin(local.digest)
        was_pinned = newest is not None and newest.record.plan is not None
        if was_pinned:
            pin = next_pin(node.views, local.digest, None, at=time.time())
            node.replica.set(pin.key, pin.to_value())
        return {"model": local.name, "was_pinned": was_pinned}

    def invite(self, *, ttl_s: float, uses: int) -> str:
        """See `Service.invite`."""
        invite = self._node.invites.issue(
            swarm=self._node.swarm.id,
            inviter=self._node.peer_id,
            addresses=(*self._node.reach.mapped_addresses, *self._node.mesh.addresses),
            valid_s=ttl_s,
            uses=uses,
            unix_time=time.time(),
        )
        save_invites(self._node.home, self._node.invites)
        return str(invite)

    def members_facts(self) -> dict[str, Any]:
        """See `Service.members_facts`."""
        return member_facts(self._node)

    def remove_member(self, member: str, *, with_invited: bool) -> dict[str, Any]:
        """See `Service.remove_member`."""
        removals = self._node.epochs.remove(member, with_invited=with_invited)
        return {"removed": [{"peer_id": said.member, "name": said.name} for said in removals]}

    def allow_member(self, member: str) -> dict[str, Any]:
        """See `Service.allow_member`."""
        delegation = self._node.members.allow(member)
        name = self._node.members.name_of(delegation.member)
        return {"allowed": {"peer_id": delegation.member, "name": name}}

    async def doctor(self) -> dict[str, Any]:
        """See `Service.doctor`."""
        others = sorted(self._node.live_peers() - {self._node.peer_id})
        names = {peer_id: self._node.members.name_of(peer_id) for peer_id in others}
        return await doctor_facts(self._node.reach, self._node.mesh, names)

    async def ping(self, member: str, *, count: int) -> dict[str, Any]:
        """See `Service.ping`."""
        peer_id = self._node.members.find(member)
        try:
            peer = await self._node.mesh.peer(peer_id)
            return await ping_facts(peer, self._node.members.name_of(peer_id), count=count)
        except TransportError as error:
            raise MemberUnreachable(str(error)) from error

    def request_stop(self) -> None:
        """See `Service.request_stop`."""
        self._node.request_stop()
