"""The terms of one pipeline, and what follows from them for a prompt, a token and many sessions.

Values only; `cost` makes them. Seconds are on the grid of `speed`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .network import BorderTerm
from .plan import Prediction, Span
from .profile import REPLY_TOKENS, STEP_BATCHES
from .speed import Steps

#: How a stage's weights come: from memory; from disk in time for each block (`tight`), or in time
#: for all of them together (`loose`); or later than they are needed.
Window = Literal["resident", "tight", "loose", "stalled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTerm:
    """What one stage costs; a group's members work, and wait for each other, all the time."""

    peers: tuple[str, ...]  # in rank order
    hub_idx: int
    span: Span
    steps_s: Steps  # a whole step of each of STEP_BATCHES: compute, partial sums, disk
    chunk_s: float  # one prefill chunk, the same way
    sums_s: float  # of `decode_s`: partial sums on their way
    stall_s: float  # of `decode_s`: waiting for the disk
    window: Window
    memory_bytes: tuple[int, ...]  # of each member: weights, KV cache, the head's if it is that
    sum_bytes: int  # of one token, that each spoke sends to the hub, and gets from it

    @property
    def peer_id(self) -> str:
        """The hub."""
        return self.peers[self.hub_idx]

    @property
    def decode_s(self) -> float:
        """A token of one session alone."""
        return self.steps_s[0]

    @property
    def hub_first(self) -> tuple[str, ...]:
        """Every member, the hub before the others."""
        return (self.peer_id, *(peer for peer in self.peers if peer != self.peer_id))


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """One resource of the pipeline and how long each token occupies it."""

    kind: Literal["device", "link", "sessions"]
    peers: tuple[str, ...]  # the device or group, hub first; or sender and receiver; or every stage
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """All terms of one pipeline."""

    head: str
    head_steps_s: Steps  # the head's own work: embedding, norm, logits, sampling
    stages: tuple[StageTerm, ...]
    borders: tuple[BorderTerm, ...]  # [n_stages + 1]
    open_s: float  # until all stages have opened a session and said so, at the same time
    n_chunks: int
    n_sessions: int

    @property
    def head_s(self) -> float:
        """The head's own work for a token of one session alone."""
        return self.head_steps_s[0]

    @property
    def tpot_s(self) -> float:
        """One token of one session alone: every stage, every border, the head."""
        return self.cycle_s(0)

    @property
    def ttft_s(self) -> float:
        """Opening, the first chunk through the pipe, the others behind its slowest part, the way
        back.

        Only the last position of the prompt returns to the head.
        """
        forth = self.borders[:-1]
        first = sum(stage.chunk_s for stage in self.stages) + sum(b.chunk_s for b in forth)
        slowest = max(
            max(stage.chunk_s for stage in self.stages), max(b.chunk_wire_s for b in forth)
        )
        first += self.open_s
        return first + (self.n_chunks - 1) * slowest + self.borders[-1].decode_s + self.head_s

    @property
    def stall_s(self) -> float:
        """Of each token's time, waiting for disks."""
        return sum(stage.stall_s for stage in self.stages)

    def cycle_s(self, batch_idx: int) -> float:
        """Once around for a batch of `STEP_BATCHES[batch_idx]` sessions, nobody in its way."""
        n_sessions = STEP_BATCHES[batch_idx]
        stages = sum(stage.steps_s[batch_idx] for stage in self.stages)
        borders = sum(border.batch_s(n_sessions) for border in self.borders)
        return self.head_steps_s[batch_idx] + stages + borders

    def throughput(self, n_sessions: int) -> float:
        """Tokens per second of so many sessions together; 0 of none."""
        if n_sessions < 1:
            return 0.0
        return 1.0 / self._bottleneck(n_sessions)[0]

    def queue_s(self, n_sessions: int) -> float:
        """Of a token's time among `n_sessions`, what it spends waiting for others'."""
        return max(0.0, n_sessions / self.throughput(n_sessions) - self.tpot_s)

    def busy(self) -> list[Busy]:
        """Every resource a token passes, when sessions go round in the batches that do most.

        The last entry is the limit that n_sessions sets.
        """
        _, batch_idx = self._bottleneck(self.n_sessions)
        everyone = tuple(stage.peer_id for stage in self.stages)
        sessions_s = self.cycle_s(batch_idx) / self.n_sessions
        return [
            *self._resources(batch_idx),
            Busy(kind="sessions", peers=everyone, seconds=sessions_s),
        ]

    def link_bytes(self) -> tuple[tuple[str, str, int], ...]:
        """(sender, receiver, bytes) that each token of a reply puts on a link, by peer ids."""
        total: Counter[tuple[str, str]] = Counter()
        for border in self.borders:
            if border.kind:
                total[border.sender, border.receiver] += border.token_bytes
        for stage in self.stages:
            for spoke in stage.hub_first[1:]:
                total[spoke, stage.peer_id] += stage.sum_bytes
                total[stage.peer_id, spoke] += stage.sum_bytes
        return tuple((*pair, n_bytes) for pair, n_bytes in sorted(total.items()))

    def prediction(self) -> Prediction:
        """The terms as the figures a plan carries."""
        return joint_prediction([self])

    def _bottleneck(self, n_sessions: int) -> tuple[float, int]:
        """Seconds per token, all sessions together, and in which batches they go round.

        A batch passes the busiest resource in that one's time, and comes back no sooner than once
        around; the batch that gives most is taken, of equals the smallest.
        """
        return min(
            (
                max(
                    max(busy.seconds for busy in self._resources(batch_idx)),
                    self.cycle_s(batch_idx) / n_sessions,
                ),
                batch_idx,
            )
            for batch_idx, batch in enumerate(STEP_BATCHES)
            if batch <= n_sessions
        )

    def _resources(self, batch_idx: int) -> list[Busy]:
        """Devices and links, and how long a token of a batch keeps each of them."""
        batch = STEP_BATCHES[batch_idx]
        head_s = self.head_steps_s[batch_idx]
        devices = [
            Busy(
                kind="device",
                peers=stage.hub_first,
                seconds=(stage.steps_s[batch_idx] + head_s * (self.head in stage.peers)) / batch,
            )
            for stage in self.stages
        ]
        if all(self.head not in stage.peers for stage in self.stages):
            devices.append(Busy(kind="device", peers=(self.head,), seconds=head_s / batch))
        links = [
            Busy(kind="link", peers=(b.sender, b.receiver), seconds=b.wire_s)
            for b in self.borders
            if b.kind
        ]
        return [*devices, *links]


def joint_prediction(pipelines: Sequence[Terms]) -> Prediction:
    """The figures of pipelines that share no member, for the sessions that each is planned for.

    A lone session takes the pipeline that answers it first. Many are shared out, see
    `shared_sessions`; memory is for all of them in each pipeline, so that one can stand in for
    another.
    """
    soonest = min(pipelines, key=reply_s)
    n_sessions = pipelines[0].n_sessions
    counts = shared_sessions(pipelines, n_sessions)
    link_bytes: Counter[tuple[str, str]] = Counter()
    for terms in pipelines:
        for sender, receiver, n_bytes in terms.link_bytes():
            link_bytes[sender, receiver] += n_bytes
    return Prediction(
        ttft_s=soonest.ttft_s,
        tpot_s=soonest.tpot_s,
        throughput_tok_per_s=sum(
            terms.throughput(count) for terms, count in zip(pipelines, counts, strict=True)
        ),
        memory_bytes=tuple(
            held
            for terms in pipelines
            for stage in terms.stages
            for held in zip(stage.peers, stage.memory_bytes, strict=True)
        ),
        stall_s=soonest.stall_s,
        link_bytes=tuple((*pair, n_bytes) for pair, n_bytes in sorted(link_bytes.items())),
    )


def shared_sessions(pipelines: Sequence[Terms], n_sessions: int) -> tuple[int, ...]:
    """Sessions of each pipeline, in proportion to what it does with all of them, in whole ones."""
    speeds = [terms.throughput(n_sessions) for terms in pipelines]
    exact = [n_sessions * speed / sum(speeds) for speed in speeds]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: n_sessions - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


def reply_s(figures: Terms | Prediction) -> float:
    """Seconds until one session alone has a reply of `REPLY_TOKENS` tokens."""
    return figures.ttft_s + (REPLY_TOKENS - 1) * figures.tpot_s
