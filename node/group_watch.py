"""What members of a group find each other to take: the hub its spokes, and each of two the other.

A head sees a group as one stage and cannot tell who in it is slow. But whoever adds partial sums
sees how long after its own each part came. Between two sums a member has taken at least as long as
we did ourselves and its part was late, less the way there and back; its own word counts up to what
our clock allows. Steps of one row only, since those are what profiles are compared by.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence

from covey.partition.cost import Network, block_step_s
from covey.partition.memory import weight_share
from covey.partition.plan import StagePlan
from covey.partition.profile import Workload

from .catalog import Catalog, LocalModel
from .group.all_reduce import MAX_ROUNDS, Round
from .group.codec import encoded_bytes
from .group.forming import SUM_CODECS
from .loading import Held
from .observing import FASTER, MIN_STEPS, Observing
from .planning_state import ModelState

LOOK_S = 2.0
WAY_SLACK = 1.5  # of what the way there and back takes
SUM_SLACK_S = 50e-6


class GroupWatch:
    """Judges the other members of this node's groups; `run` is its one loop."""

    def __init__(
        self,
        own_peer_id: str,
        held: Iterable[Held],
        catalog: Catalog,
        observing: Observing,
        read: Callable[[LocalModel], ModelState],
    ) -> None:
        self._own = own_peer_id
        self._held = held
        self._catalog = catalog
        self._observing = observing
        self._read = read
        self._taken: dict[str, tuple[int, int]] = {}  # the last round, by plan digest

    async def run(self) -> None:
        """Look every few seconds, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """Take in the sums of all groups since the last look."""
        for held in self._held:
            self._look(held)

    def _look(self, held: Held) -> None:
        plan, stage = held.route.plan, held.stage
        model = self._catalog.by_digest(plan.model_digest)
        if model is None or self._own not in stage.peers:
            return
        nbytes = encoded_bytes(SUM_CODECS[stage.sum_codec], model.layout.hidden_size)
        rounds = [one for one in held.rounds if one.nbytes == nbytes and one.algorithm != "ring"]
        last = self._taken.get(held.route.digest, (-1, -1))
        if rounds and _place(rounds[-1]) < last:  # formed anew: it counts from the beginning
            last = (-1, -1)
        rounds = [one for one in rounds if _place(one) > last]
        n_rounds = 2 * stage.span.n_blocks  # of a step
        if len(rounds) < n_rounds * min(MIN_STEPS, MAX_ROUNDS // n_rounds):
            return
        self._taken[held.route.digest] = _place(rounds[-1])
        state, own_rank = self._read(model), stage.peers.index(self._own)
        expected = _expected(stage, model, state)
        if expected is None:
            return
        network = Network(state.links)
        ways_s = [_way_s(network, self._own, peer, nbytes) for peer in stage.peers]
        found = later_than_said(rounds, own_rank, stage.span.n_blocks, expected, ways_s)
        ratios: Mapping[str, float] = {stage.peers[rank]: ratio for rank, ratio in found.items()}
        self._observing.found(model, state, ratios)


def later_than_said(
    rounds: Sequence[Round],
    own_rank: int,
    n_blocks: int,
    expected_s: Sequence[float],
    ways_s: Sequence[float],
) -> dict[int, float]:
    """How many times longer than it should each other rank took, by one of its faster steps.

    Args:
        rounds: of steps of one row, two for each block.
        own_rank: whose clock counts.
        n_blocks: of the group's span.
        expected_s: of each rank's part of one block; 0 where it has none.
        ways_s: to each rank and back.
    """
    n_rounds = 2 * n_blocks
    steps = [rounds[i : i + n_rounds] for i in range(0, len(rounds) - n_rounds + 1, n_rounds)]
    ratios: dict[int, float] = {}
    for rank, seconds in enumerate(expected_s):
        if rank == own_rank or seconds <= 0.0 or not steps:
            continue
        took = sorted(
            sum(_certain_s(one, own_rank, rank, ways_s[rank]) for one in step) for step in steps
        )
        ratios[rank] = took[int(len(took) * FASTER)] / (n_blocks * seconds)
    return ratios


def _certain_s(one: Round, own_rank: int, rank: int, way_s: float) -> float:
    """What a rank certainly took between two sums."""
    most_s = one.busy_s[own_rank] + one.arrived_s[rank]
    late_s = most_s - WAY_SLACK * way_s - SUM_SLACK_S if one.arrived_s[rank] > 0.0 else 0.0
    return max(late_s, min(one.busy_s[rank], most_s), 0.0)


def _expected(stage: StagePlan, model: LocalModel, state: ModelState) -> list[float] | None:
    """By what each member says of itself; None if one says nothing."""
    expected = []
    for member in stage.members:
        device = state.claimed.get(member.peer_id)
        if device is None:
            return None
        share = weight_share(model.layout, member)
        whole_s = block_step_s(device, 1, Workload().depth)
        expected.append(share * whole_s + device.split_s_per_block if share > 0.0 else 0.0)
    return expected


def _way_s(network: Network, own: str, peer: str, nbytes: int) -> float:
    """There and back, with partial sums of one row on both ways."""
    links = (network.link(own, peer), network.link(peer, own))
    wires_s = (nbytes / link.bandwidth_bytes_per_s for link in links if link is not None)
    return network.round_trip_s(own, peer) + sum(wires_s)


def _place(one: Round) -> tuple[int, int]:
    return one.epoch, one.number
