"""The plan: which spans of one model run where, as a value that members can agree on.

Knows nothing of speed; figures in it are the proposer's and are never trusted (D8). A plan is not
signed here: it lives in its proposer's document of the store, whose envelope is signed. Invariant:
the stages of a `LayerPlan` cover `[0, n_blocks)` exactly once and in order, and no peer is in it
twice; a value that breaks this cannot be made.

Borders are counted along the life of a token: border 0 leads from the head to stage 0, border i
from stage i-1 to stage i, border n_stages from the last stage back to the head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import msgspec

from .bounds import check_name, check_real, check_whole
from .errors import InvalidPlan
from .profile import MAX_BLOCKS, MAX_BYTES, ModelLayout

PLAN_VERSION = 2
MAX_STAGES = 64
MAX_MEMBERS = 16  # of one tensor-parallel group
MAX_EPOCH = 1 << 31  # as a frame carries it
MAX_FIGURE = 1e300
CODECS = ("exact", "fp16", "int8")  # of hidden states at a border; see border_bytes_per_token

_ENCODER = msgspec.msgpack.Encoder(order="sorted")


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Blocks `[start, end)`."""

    start: int
    end: int

    def __post_init__(self) -> None:
        """Check every bound."""
        check_whole("span.start", self.start, 0, MAX_BLOCKS - 1)
        check_whole("span.end", self.end, self.start + 1, MAX_BLOCKS)

    @property
    def n_blocks(self) -> int:
        """Blocks in the span, at least one."""
        return self.end - self.start


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """One peer of a stage and the share `num/den` of each block's heads and MLP that it holds."""

    peer_id: str
    num: int = 1
    den: int = 1

    def __post_init__(self) -> None:
        """Check every bound; the share is in lowest terms, so that equal plans are equal bytes."""
        check_name("member.peer_id", self.peer_id)
        check_whole("member.den", self.den, 1, 1 << 16)
        check_whole("member.num", self.num, 1, self.den)
        if Fraction(self.num, self.den).denominator != self.den:
            raise InvalidPlan("member.num", "share must be in lowest terms")

    @property
    def share(self) -> Fraction:
        """`num/den`, in (0, 1]."""
        return Fraction(self.num, self.den)


@dataclass(frozen=True, slots=True, order=True)
class StagePlan:
    """A span and the members that run it; one member, or a tensor-parallel group."""

    span: Span
    members: tuple[Member, ...]
    hub_idx: int = 0  # the member that borders lead to and from

    def __post_init__(self) -> None:
        """Check that the shares add up and the hub exists."""
        check_whole("stage.members", len(self.members), 1, MAX_MEMBERS)
        check_whole("stage.hub_idx", self.hub_idx, 0, len(self.members) - 1)
        if sum(member.share for member in self.members) != 1:
            raise InvalidPlan("stage.members", "shares must add up to one")

    @classmethod
    def alone(cls, peer_id: str, start: int, end: int) -> StagePlan:
        """The stage of one peer that runs the whole of blocks `[start, end)`."""
        return cls(Span(start, end), (Member(peer_id),))

    @property
    def hub(self) -> str:
        """Peer id of the hub."""
        return self.members[self.hub_idx].peer_id

    @property
    def peers(self) -> tuple[str, ...]:
        """Every member's peer id."""
        return tuple(member.peer_id for member in self.members)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a plan should do; lower is better but for the throughput."""

    ttft_s: float  # for the workload's prompt
    tpot_s: float  # one session alone
    throughput_tok_per_s: float  # all sessions together
    memory_bytes: tuple[tuple[str, int], ...]  # (peer id, weights + KV cache), by stage

    def __post_init__(self) -> None:
        """Check every bound."""
        for field in ("ttft_s", "tpot_s", "throughput_tok_per_s"):
            check_real(f"prediction.{field}", getattr(self, field), 0.0, MAX_FIGURE)
        check_whole("prediction.memory_bytes", len(self.memory_bytes), 1, MAX_STAGES * MAX_MEMBERS)
        for peer_id, n_bytes in self.memory_bytes:
            check_name("prediction.memory_bytes", peer_id)
            check_whole("prediction.memory_bytes", n_bytes, 0, MAX_BYTES * MAX_BLOCKS)

    @property
    def objectives(self) -> tuple[float, float, float]:
        """(TTFT, TPOT, minus throughput): what a front minimises."""
        return self.ttft_s, self.tpot_s, -self.throughput_tok_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLimits:
    """What a reader accepts. `None` leaves the question to `activation.valid_proposals`."""

    max_bytes: int = 64 * 1024  # 64 stages of one member take less than 20 KiB
    max_stages: int = MAX_STAGES
    n_blocks: int | None = None
    peers: frozenset[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One way to run one model on some members, in the epoch it was proposed for."""

    model_digest: str
    epoch: int
    stages: tuple[StagePlan, ...]
    codecs: tuple[str, ...]  # [n_stages + 1], one per border
    carries: tuple[bool, ...]  # [n_stages + 1]: does the border carry top-k indices
    engine: str
    prediction: Prediction
    proposer: str
    index_pattern: str | None = None  # one of F and S per block (D13), or None: dense attention
    version: int = PLAN_VERSION

    def __post_init__(self) -> None:
        """Check the invariant of the module and every bound."""
        if self.version != PLAN_VERSION:
            raise InvalidPlan("plan.version", f"only version {PLAN_VERSION} is understood")
        check_name("plan.model_digest", self.model_digest)
        check_name("plan.engine", self.engine)
        check_name("plan.proposer", self.proposer)
        check_whole("plan.epoch", self.epoch, 0, MAX_EPOCH)
        check_stages(self.stages)
        for field in ("codecs", "carries"):
            if len(getattr(self, field)) != len(self.stages) + 1:
                raise InvalidPlan(f"plan.{field}", "must have one entry per border")
        for codec in self.codecs:
            if codec not in CODECS:
                raise InvalidPlan("plan.codecs", f"must be of {', '.join(CODECS)}")
        if self.index_pattern is not None:
            check_index_pattern(self.index_pattern, self.n_blocks)
        if self.carries != carries_of(self.stages, self.index_pattern):
            raise InvalidPlan("plan.carries", "must be true where the next block is Shared")
        if tuple(peer_id for peer_id, _ in self.prediction.memory_bytes) != self.peers:
            raise InvalidPlan("prediction.memory_bytes", "must name the members in stage order")

    @property
    def n_blocks(self) -> int:
        """Blocks of the whole model."""
        return self.stages[-1].span.end

    @property
    def peers(self) -> tuple[str, ...]:
        """Every member's peer id, in stage order."""
        return tuple(peer_id for stage in self.stages for peer_id in stage.peers)

    def stage_of(self, peer_id: str) -> StagePlan | None:
        """The stage that `peer_id` is a member of, if any."""
        for stage in self.stages:
            if peer_id in stage.peers:
                return stage
        return None

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what the plan asks of its members.

        Predicted figures are left out: they change with every profile, and a session's frames
        and `ready` marks must go on naming the same plan.
        """
        fields = {name: getattr(self, name) for name in _IDENTITY}
        return hashlib.sha256(_ENCODER.encode(fields)).hexdigest()

    def encode(self) -> bytes:
        """The one encoding of this plan: msgpack, keys sorted."""
        return _ENCODER.encode(self)

    @classmethod
    def decode(cls, data: bytes, limits: PlanLimits | None = None) -> LayerPlan:
        """Read what `encode` wrote, and nothing else.

        Raises:
            InvalidPlan: too large, not a plan, breaks the invariant or `limits`, or is written
                in another way than `encode` would (so unknown fields are refused too).
        """
        limits = limits or PlanLimits()
        if len(data) > limits.max_bytes:
            raise InvalidPlan("plan", f"must be at most {limits.max_bytes} bytes")
        try:
            plan = _DECODER.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidPlan("plan", f"is not a plan: {error}") from error
        if plan.encode() != data:
            raise InvalidPlan("plan", "is not in canonical form")
        check_whole("plan.stages", len(plan.stages), 1, limits.max_stages)
        if limits.n_blocks is not None and plan.n_blocks != limits.n_blocks:
            raise InvalidPlan("plan.stages", f"must cover {limits.n_blocks} blocks")
        if limits.peers is not None and not limits.peers.issuperset(plan.peers):
            raise InvalidPlan("plan.stages", "name a peer that is not a member")
        return plan


_DECODER = msgspec.msgpack.Decoder(LayerPlan)
_IDENTITY = (
    "version",
    "model_digest",
    "epoch",
    "stages",
    "codecs",
    "index_pattern",
    "engine",
    "proposer",
)


def border_bytes_per_token(layout: ModelLayout, codec: str) -> int:
    """Bytes of one token's hidden states on the wire, without indices.

    int8 is one byte per element and a four-byte scale per row.
    """
    if codec == "fp16":
        return 2 * layout.hidden_size
    if codec == "int8":
        return layout.hidden_size + 4
    if codec == "exact":
        return layout.wire_bytes_per_token
    raise InvalidPlan("codec", f"must be of {', '.join(CODECS)}")


def check_stages(stages: Sequence[StagePlan]) -> None:
    """Raise `InvalidPlan` unless the spans join from block 0 on and no peer is named twice."""
    check_whole("plan.stages", len(stages), 1, MAX_STAGES)
    end = 0
    for stage in stages:
        if stage.span.start != end:
            raise InvalidPlan("plan.stages", f"must cover block {end} next, once and in order")
        end = stage.span.end
    peers = [peer_id for stage in stages for peer_id in stage.peers]
    if len(set(peers)) != len(peers):
        raise InvalidPlan("plan.stages", "must not name a peer twice")


def check_index_pattern(pattern: str, n_blocks: int) -> None:
    """Raise `InvalidPlan` unless there is one F or S per block, and the first is F."""
    if len(pattern) != n_blocks or not pattern.startswith("F") or pattern.strip("FS"):
        raise InvalidPlan("plan.index_pattern", "must be one F or S per block and begin with F")


def carries_of(stages: Sequence[StagePlan], pattern: str | None) -> tuple[bool, ...]:
    """For each border, whether the block behind it is Shared and so needs the indices."""
    starts = [pattern is not None and pattern[stage.span.start] == "S" for stage in stages]
    return (*starts, False)


def make_plan(
    stages: Sequence[StagePlan],
    prediction: Prediction,
    *,
    model_digest: str,
    epoch: int,
    proposer: str,
    engine: str,
    codec: str = "exact",
    index_pattern: str | None = None,
) -> LayerPlan:
    """A plan of a candidate's stages with one codec at every border."""
    stages = tuple(stages)
    check_stages(stages)
    if index_pattern is not None:
        check_index_pattern(index_pattern, stages[-1].span.end)
    return LayerPlan(
        model_digest=model_digest,
        epoch=epoch,
        stages=stages,
        codecs=(codec,) * (len(stages) + 1),
        carries=carries_of(stages, index_pattern),
        engine=engine,
        prediction=prediction,
        proposer=proposer,
        index_pattern=index_pattern,
    )
