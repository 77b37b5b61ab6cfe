"""A group in one process: a hub's stage, and spokes on threads of their own, on lanes in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from covey.node.engine.shard import Shard
from covey.node.group.all_reduce import AllReduce
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
    n_formed: int = 0
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
        if self.n_formed and not self.may_form:
            raise GroupBroken("a member is gone")
        self.n_formed += 1
        meshes = memory_mesh(len(self.shards))
        for rank, spoke in self.spokes.items():
            spoke.serve(self._reduce(rank, {self.hub_idx: meshes[rank][self.hub_idx]}))
        return self._reduce(self.hub_idx, meshes[self.hub_idx])

    def _reduce(self, rank: int, lanes: Mapping[int, Lane]) -> AllReduce:
        wrapped = {other: self.wrap(rank, lane) for other, lane in lanes.items()}
        return AllReduce(
            rank,
            self.hub_idx,
            wrapped,
            self.codec,
            n_members=len(self.shards),
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
        del group.stage  # it and the group know each other: lanes free their files at once
