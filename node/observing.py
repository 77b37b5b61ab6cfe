"""What this node, as the head of sessions, finds the stages of others to take; published for all.

A stage says itself how long it computed, and one that lies about its profile may lie there too. So
what counts is our own clock: the time from sending a step to having it back, less what our own
stages took and what the links take. What is left, the others took, whatever they say of it. Only
what is certain is held against anybody: half as much again for the links and a millisecond or more
are taken off, a wait behind other sessions is believed up to the length of a step, and of the steps
of a session one of the faster counts. Where a step passes several others, time that none of them
owns up to is shared out by their blocks. Groups are left out here: see `group_watch.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from covey.partition.cost import Network, Terms, price
from covey.partition.errors import PartitionError
from covey.partition.observed import MIN_SESSIONS
from covey.partition.profile import MAX_SECONDS, MIN_SECONDS, Workload
from covey.store.errors import RecordMalformed
from covey.store.replica import Replica
from covey.store.schema import MAX_EXPERIENCES, Experience, Seen
from covey.transport.messages import StageTrace

from .catalog import LocalModel
from .planning_state import EXPERIENCE_S, ModelState
from .route import Route

logger = logging.getLogger(__name__)

MIN_STEPS = 8  # of a session that says anything
MAX_STEPS = 256  # of a session that are kept
FASTER = 0.25  # the quantile of a session's steps that counts
LINK_SLACK = 0.5  # of what the links take
SLACK_S = 1e-3  # for both ends' event loops,
SLACK_STEPS = 4  # and so many times what a step costs us beside its blocks: on small boards, more
WEIGHT = 0.5  # of a new session in the moving average
NOTABLE = 0.1  # change of an average that is worth telling everybody
NOTE_EVERY_S = 30.0  # once it rests on a few sessions
FEW_SESSIONS = MIN_SESSIONS + 2


@dataclass(frozen=True, slots=True)
class SeenStep:
    """One decode step of a session that was alone: our clock, and the stages' own words."""

    took_s: float  # from sending it to having it back
    trace: Sequence[StageTrace]


class Observing:
    """Keeps this node's experiences in the replica.

    Args:
        replica: where they are published.
        own_peer_id: this node.
        read: what the replica says of a model now.
        clock: seconds, monotonic.
        unix_clock: seconds since 1970, for those who read.
    """

    def __init__(
        self,
        replica: Replica,
        own_peer_id: str,
        read: Callable[[LocalModel], ModelState],
        *,
        clock: Callable[[], float],
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self._replica = replica
        self._own = own_peer_id
        self._read = read
        self._clock = clock
        self._unix_clock = unix_clock
        self._seen: dict[str, dict[str, Seen]] = {}  # by model and peer: the averages of now
        self._published: dict[str, Experience] = {}
        self._noted_at: dict[str, float] = {}

    def saw(
        self, model: LocalModel, route: Route, prompt_tokens: int, steps: Sequence[SeenStep]
    ) -> None:
        """A session has ended: learn from its steps."""
        if len(steps) < MIN_STEPS or set(route.peers) <= {self._own}:
            return
        state = self._read(model)
        try:
            terms = price(
                route.stages,
                model.layout,
                state.claimed,
                Network(state.links),
                request=Workload(prompt_tokens=prompt_tokens, n_sessions=1),
                head=self._own,
                codecs=route.codecs,
            )
        except PartitionError as error:
            logger.debug("a session says nothing of its members: %s", error)
            return
        slack_s = SLACK_S + SLACK_STEPS * state.claimed[self._own].step_s
        self.found(model, state, slower_than_said(terms, self._own, steps, slack_s))

    def found(self, model: LocalModel, state: ModelState, ratios: Mapping[str, float]) -> None:
        """A session, or a while in a group, has shown how many times slower than said some are."""
        if not ratios:
            return
        averages = self._averages(model.digest)
        for peer_id, ratio in ratios.items():
            decode_s = ratio * state.claimed[peer_id].decode_s_per_block
            self._add(averages, peer_id, min(max(decode_s, MIN_SECONDS), MAX_SECONDS))
        self._publish(model.digest, averages)

    def _averages(self, digest: str) -> dict[str, Seen]:
        """Those of a model that are not too old, at first what an earlier life has published."""
        if digest not in self._seen:
            value = self._replica.get(self._own, f"{Experience.prefix}{digest}")
            try:
                self._seen[digest] = dict(Experience.from_value(value).peers)
            except RecordMalformed:  # none, as a rule
                self._seen[digest] = {}
        oldest = self._unix_clock() - EXPERIENCE_S
        averages = {peer: seen for peer, seen in self._seen[digest].items() if seen.at > oldest}
        self._seen[digest] = averages
        return averages

    def _add(self, averages: dict[str, Seen], peer_id: str, decode_s: float) -> None:
        known = averages.pop(peer_id, None)  # so that the last one in the dict is the newest
        now = self._unix_clock()
        if known is None:
            averages[peer_id] = Seen(decode_s_per_block=decode_s, n_sessions=1, at=now)
            return
        average = known.decode_s_per_block
        averages[peer_id] = Seen(
            decode_s_per_block=average + WEIGHT * (decode_s - average),
            n_sessions=min(known.n_sessions + 1, 1 << 31),
            at=now,
        )

    def _publish(self, digest: str, averages: Mapping[str, Seen]) -> None:
        newest = dict(list(averages.items())[-MAX_EXPERIENCES:])
        record, now = Experience(model=digest, peers=newest), self._clock()
        known = self._published.get(digest)
        if known is not None:
            is_early = any(0 < seen.n_sessions <= FEW_SESSIONS for seen in newest.values())
            is_due = is_early or now - self._noted_at[digest] > NOTE_EVERY_S
            if not (is_due and _is_news(known, record)):
                return
        self._published[digest], self._noted_at[digest] = record, now
        self._replica.set(record.key, record.to_value())


def slower_than_said(
    terms: Terms, own: str, steps: Sequence[SeenStep], slack_s: float = SLACK_S
) -> dict[str, float]:
    """How many times longer than it says each other member certainly took; groups are left out.

    Args:
        terms: of the pipeline with `own` as its head, by what its members say of themselves.
        own: the head, whose clock and whose own stages are believed.
        steps: of single tokens, one in flight at a time.
        slack_s: of each step, that nobody is blamed for.
    """
    links_s = sum(border.decode_s for border in terms.borders)
    off_s = links_s * (1.0 + LINK_SLACK) + slack_s
    theirs = {
        idx: stage
        for idx, stage in enumerate(terms.stages)
        if stage.peer_id != own and len(stage.peers) == 1
    }
    n_blocks = sum(stage.span.n_blocks for stage in terms.stages if stage.peer_id != own)
    ratios: dict[str, list[float]] = {stage.peer_id: [] for stage in theirs.values()}
    for step in steps:
        left_s = step.took_s - off_s
        for stage, word in zip(terms.stages, step.trace, strict=True):
            waited_s = word.queue_us / 1e6
            if stage.peer_id != own:
                waited_s = min(waited_s, stage.decode_s)
            left_s -= word.compute_us / 1e6 + waited_s
        for idx, stage in theirs.items():
            share = stage.span.n_blocks / n_blocks
            took_s = step.trace[idx].compute_us / 1e6 + max(0.0, left_s) * share
            ratios[stage.peer_id].append(took_s / stage.decode_s)
    return {peer: sorted(found)[int(len(found) * FASTER)] for peer, found in ratios.items()}


def _is_news(known: Experience, record: Experience) -> bool:
    """Whether it says something else than before, or the same of what it says too long ago."""
    if known.peers.keys() != record.peers.keys():
        return True
    for peer_id, seen in record.peers.items():
        before = known.peers[peer_id]
        change = abs(seen.decode_s_per_block / before.decode_s_per_block - 1.0)
        is_known = min(seen.n_sessions, FEW_SESSIONS) == min(before.n_sessions, FEW_SESSIONS)
        if change > NOTABLE or not is_known or seen.at - before.at > EXPERIENCE_S / 4:
            return True
    return False
