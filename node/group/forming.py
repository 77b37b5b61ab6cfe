"""How the members of a group find together: the hub asks them over their links, then opens lanes.

A lane's purpose names plan, stage and the hub's call, so that none is taken for another's. Whoever
is asked again leaves the lanes of before: the hub has lost them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, get_args

from covey.node.errors import ConfigError
from covey.node.switch import Switch, UnexpectedMessage
from covey.partition.allreduce import MAX_DIRECT
from covey.partition.plan import StagePlan
from covey.transport.errors import ErrorCode, RefusedByPeer, TransportError
from covey.transport.lane.lane import Lane, LaneKind
from covey.transport.lane.opening import ALL_KINDS, Lanes
from covey.transport.messages import GroupJoined, JoinGroup
from covey.transport.tasks import Tasks

from .all_reduce import AllReduce, GroupLink
from .codec import SumCodec
from .errors import GroupBroken
from .spoke import Spoke

logger = logging.getLogger(__name__)

KINDS_VARIABLE = "COVEY_LANES"  # names the ways that lanes may take, with commas; all by default
ASK_S = 10.0  # for one answer; the member may have to end a step first
SUM_S = 20.0  # how much later than others a member may be: a chunk of a prompt on a slow device

SUM_CODECS: dict[str, SumCodec] = {name: name for name in get_args(SumCodec)}


def lane_kinds() -> tuple[LaneKind, ...]:
    """The ways that lanes of this process may take. Raises ConfigError."""
    text = os.environ.get(KINDS_VARIABLE, "")
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in ALL_KINDS:
            raise ConfigError(f"{KINDS_VARIABLE}: {name!r} is none of {', '.join(ALL_KINDS)}")
    return cast("tuple[LaneKind, ...]", tuple(names)) or ALL_KINDS


@dataclass(frozen=True, slots=True)
class Formed:
    """A group at its hub."""

    reduce: AllReduce
    kv_tokens: int  # positions that the spokes have room for, the least of them


@dataclass(slots=True, eq=False)
class _Member:
    """A stage of which this node is a spoke."""

    stage: StagePlan
    stage_idx: int
    kv_tokens: int
    spoke: Spoke
    joining: asyncio.Task[None] | None = field(default=None)


class Groups:
    """The groups that this node is a member of; all on the event loop."""

    def __init__(self, switch: Switch, lanes: Callable[[], Lanes]) -> None:
        self._switch = switch
        self._lanes = lanes
        self._members: dict[str, _Member] = {}  # by plan digest
        self._tasks = Tasks()
        switch.on_request(JoinGroup, self._asked)

    async def form(
        self, stage: StagePlan, plan: str, stage_idx: int, link: GroupLink | None = None
    ) -> Formed:
        """Call the spokes of a stage together; this node is its hub.

        Args:
            stage: to be formed.
            plan: digest of its plan.
            stage_idx: its place in its pipeline.
            link: what lies between its members, if that is known: large sums may go round a ring.

        Raises:
            TransportError: one of them cannot be reached, is not ready or gets no lane.
        """
        call = secrets.token_bytes(16)
        has_ring = link is not None and len(stage.members) > MAX_DIRECT
        request = JoinGroup(plan=plan, stage_idx=stage_idx, call=call, has_ring=has_ring)
        spokes = [peer for peer in stage.peers if peer != stage.hub]
        answers = await asyncio.gather(
            *(self._switch.request(peer, request, timeout_s=ASK_S) for peer in spokes)
        )
        room = []
        for answer in answers:
            if not isinstance(answer, GroupJoined):
                raise UnexpectedMessage(f"a member answers with a {type(answer).__name__}")
            room.append(answer.kv_tokens)
        opened = await _all_or_none(
            [self._lanes().open(peer, _purpose(request)) for peer in spokes]
        )
        ranks = [stage.peers.index(peer) for peer in spokes]
        lanes = dict(zip(ranks, opened, strict=True))
        reduce = _all_reduce(stage, stage.hub_idx, lanes, link if has_ring else None)
        logger.info("a group of %d is formed", len(stage.members))
        return Formed(reduce, min(room))

    def add(
        self, plan: str, stage: StagePlan, stage_idx: int, spoke: Spoke, *, kv_tokens: int
    ) -> None:
        """From now on take part in a stage when its hub calls."""
        self._members[plan] = _Member(stage, stage_idx, kv_tokens, spoke)

    async def remove(self, plan: str) -> None:
        """Leave a stage."""
        member = self._members.pop(plan, None)
        if member is not None:
            if member.joining is not None:
                member.joining.cancel()
            await asyncio.to_thread(member.spoke.stop)

    def peer_lost(self, peer_id: str) -> None:
        """Its groups hear no more of it."""
        for member in self._members.values():
            if member.stage.hub == peer_id:
                member.spoke.close()

    async def aclose(self) -> None:
        """Leave all of them."""
        await self._tasks.aclose()
        for plan in list(self._members):
            await self.remove(plan)

    def _asked(self, hub: str, request: JoinGroup) -> Coroutine[Any, Any, GroupJoined]:
        member = self._members.get(request.plan)
        if member is None:
            raise RefusedByPeer(ErrorCode.NOT_READY)
        if member.stage.hub != hub or member.stage_idx != request.stage_idx:
            raise RefusedByPeer(ErrorCode.NOT_A_MEMBER)
        if member.joining is not None:
            member.joining.cancel()
        member.spoke.close()
        member.joining = self._tasks.spawn(self._join(member, hub, request), "join a group")
        return _answered(GroupJoined(kv_tokens=member.kv_tokens))

    async def _join(self, member: _Member, hub: str, request: JoinGroup) -> None:
        stage = member.stage
        rank = stage.peers.index(self._switch.own_peer_id)
        lane, around = await asyncio.gather(
            self._lanes().accept(hub, _purpose(request)), self._ring(stage, rank, request)
        )
        reduce = _all_reduce(stage, rank, {stage.hub_idx: lane, **(around or {})})
        try:
            await asyncio.to_thread(member.spoke.serve, reduce, has_ring=around is not None)
        except BaseException:
            reduce.close()
            raise

    async def _ring(
        self, stage: StagePlan, rank: int, request: JoinGroup
    ) -> Mapping[int, Lane] | None:
        """Lanes to the ranks next to ours, the hub's left out; None if they cannot be had."""
        n_members = len(stage.members)
        before, behind = ((rank + step) % n_members for step in (-1, 1))
        if not request.has_ring or n_members <= MAX_DIRECT:
            return {}
        opening: dict[int, Coroutine[Any, Any, Lane]] = {}
        if behind != stage.hub_idx:
            opening[behind] = self._lanes().open(stage.peers[behind], _purpose(request))
        if before != stage.hub_idx:
            opening[before] = self._lanes().accept(stage.peers[before], _purpose(request))
        try:
            opened = await _all_or_none(list(opening.values()))
        except TransportError as error:
            logger.info("a group has no ring: %s", error)
            return None
        return dict(zip(opening, opened, strict=True))


async def _answered(answer: GroupJoined) -> GroupJoined:
    return answer


async def _all_or_none(opening: Sequence[Coroutine[Any, Any, Lane]]) -> list[Lane]:
    """Every lane; when one cannot be had, the others are closed. Raises TransportError."""
    found = await asyncio.gather(*opening, return_exceptions=True)
    lanes = [one for one in found if not isinstance(one, BaseException)]
    for one in found:
        if isinstance(one, BaseException):
            for lane in lanes:
                lane.close()
            raise one
    return lanes


def _all_reduce(
    stage: StagePlan, rank: int, lanes: Mapping[int, Lane], link: GroupLink | None = None
) -> AllReduce:
    return AllReduce(
        rank,
        stage.hub_idx,
        lanes,
        SUM_CODECS[stage.sum_codec],
        n_members=len(stage.members),
        link=link,
        timeout_s=SUM_S,
    )


def _purpose(request: JoinGroup) -> bytes:
    return b"covey group %s %d " % (request.plan.encode(), request.stage_idx) + request.call


def form_on(
    loop: asyncio.AbstractEventLoop,
    forming: Callable[[], Coroutine[Any, Any, Formed]],
    limit_s: float,
) -> AllReduce:
    """Form a group anew from the thread that computes. Raises GroupBroken."""
    future = asyncio.run_coroutine_threadsafe(forming(), loop)
    try:
        return future.result(limit_s).reduce
    except TimeoutError as error:
        future.cancel()
        raise GroupBroken("it could not be formed anew in time") from error
    except TransportError as error:
        raise GroupBroken(f"it could not be formed anew: {error}") from error
