"""A group in one process: a hub's stage, and spokes on threads of their own, on lanes in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from covey.node.engine.shard import Shard
from covey.node.group.all_reduce import AllReduce, GroupLink
from covey.node.group.codec import SumCodec
from covey.node.group.errors import GroupBroken
from covey.node.group.spoke import Spoke
from covey.node.group.stage import GroupStage
from covey.transport.lane.lane import Lane

from .lanes import memory_mesh

#: What stands between a member (its rank) and its lane, for faults.
Wrap = Callable[[int, Lane], Lane]


@dataclass(slots=True)
class MemoryGroup:
    """The members of a group; `stage` is what the hub serves."""

    shards: Sequence[Shard]
    codec: SumCodec = "exact"
    hub_idx: int = 0
    timeout_s: float = 10.0
    wrap: Wrap = lambda _, lane: lane
    may_form: bool = True
    link: GroupLink | None = None  # of a ring
    without_ring: Collection[int] = ()  # ranks that lack a lane of it
    reduces: list[AllReduce] = field(default_factory=list)  # the hub's, one for each forming
    lanes: list[Lane] = field(default_factory=list)  # all of them, used or not
    spokes: dict[int, Spoke] = field(default_factory=dict)
    stage: GroupStage = field(init=False)
    is_over: bool = False

    def __post_init__(self) -> None:
        self.spokes = {
            rank: Spoke(shard) for rank, shard in enumerate(self.shards) if rank != self.hub_idx
        }
        self.stage = GroupStage(self.shards[self.hub_idx], self.form, self._broke)
        self.stage.use(self.form())

    def form(self) -> AllReduce:
        """New lanes for all; the hub's end of the sums."""
        if self.reduces and not self.may_form:
            raise GroupBroken("a member is gone")
        meshes = memory_mesh(len(self.shards))
        self.lanes += [lane for mesh in meshes for lane in mesh.values()]
        for rank, spoke in self.spokes.items():
            has_ring = self.link is not None and rank not in self.without_ring
            lanes = meshes[rank] if has_ring else {self.hub_idx: meshes[rank][self.hub_idx]}
            spoke.serve(self._reduce(rank, lanes), has_ring=has_ring or self.link is None)
        self.reduces.append(self._reduce(self.hub_idx, meshes[self.hub_idx]))
        return self.reduces[-1]

    def _reduce(self, rank: int, lanes: Mapping[int, Lane]) -> AllReduce:
        wrapped = {other: self.wrap(rank, lane) for other, lane in lanes.items()}
        return AllReduce(
            rank,
            self.hub_idx,
            wrapped,
            self.codec,
            n_members=len(self.shards),
            link=self.link if rank == self.hub_idx else None,
            timeout_s=self.timeout_s,
        )

    def _broke(self) -> None:
        self.is_over = True


@contextmanager
def memory_group(shards: Sequence[Shard], **options: object) -> Iterator[MemoryGroup]:
    """A group that serves; its threads have ended afterwards."""
    group = MemoryGroup(shards, **options)  # type: ignore[arg-type]
    try:
        yield group
    finally:
        group.stage.give_up("the test is over")
        for spoke in group.spokes.values():
            spoke.stop()
        group.reduces.clear()
        group.lanes.clear()
        del group.stage  # it and the group know each other: lanes free their files at once
