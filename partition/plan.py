"""The plan: which spans of one model run where, as a value that members can agree on.

Knows nothing of speed; figures in it are the proposer's and are never trusted (D8). A plan is not
signed here: it lives in its proposer's document of the store, whose envelope is signed. Invariant:
the stages of each pipeline of a `LayerPlan` cover `[0, n_blocks)` exactly once and in order, and no
peer is in it twice; a value that breaks this cannot be made.

Borders are counted along the life of a token: border 0 leads from the head to stage 0, border i
from stage i-1 to stage i, border n_stages from the last stage back to the head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from .bounds import check_name, check_real, check_whole
from .errors import InvalidPlan
from .profile import MAX_BLOCKS, MAX_BYTES, ModelLayout

PLAN_VERSION = 3
MAX_STAGES = 64
MAX_MEMBERS = 16  # of one tensor-parallel group
MAX_PIPELINES = 16
MAX_EPOCH = 1 << 31  # as a frame carries it
MAX_FIGURE = 1e300
CODECS = ("exact", "fp16", "int8", "int4")  # of hidden states at a border
SUM_CODECS = ("exact", "fp16", "int8")  # of partial sums in a group

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
    """One peer of a stage, and what of each block it holds and computes.

    In a stage of one member, all: both shares are 0 then. In a group, ranges in the order of the
    members: the first has KV heads `[0, kv_heads)`, the next those behind them, and so the MLP's
    columns. A member of a group may hold no heads, or no columns, but not nothing.
    """

    peer_id: str
    kv_heads: int = 0  # with the query heads that read them
    mlp_columns: int = 0
    streamed_blocks: int = 0  # of the span, read from disk for each step; 0: all stay in memory

    def __post_init__(self) -> None:
        """Check every bound."""
        check_name("member.peer_id", self.peer_id)
        check_whole("member.kv_heads", self.kv_heads, 0, 1 << 16)
        check_whole("member.mlp_columns", self.mlp_columns, 0, 1 << 24)
        check_whole("member.streamed_blocks", self.streamed_blocks, 0, MAX_BLOCKS)


@dataclass(frozen=True, slots=True, order=True)
class StagePlan:
    """A span and the members that run it; one member, or a tensor-parallel group."""

    span: Span
    members: tuple[Member, ...]
    hub_idx: int = 0  # the member that borders lead to and from
    sum_codec: str = "fp16"  # of a group's partial sums on the wire; they are added in fp32

    def __post_init__(self) -> None:
        """Check that the shares are such that somebody can hold them, and the hub exists."""
        check_whole("stage.members", len(self.members), 1, MAX_MEMBERS)
        check_whole("stage.hub_idx", self.hub_idx, 0, len(self.members) - 1)
        if self.sum_codec not in SUM_CODECS:
            raise InvalidPlan("stage.sum_codec", f"must be of {', '.join(SUM_CODECS)}")
        for member in self.members:
            check_whole("member.streamed_blocks", member.streamed_blocks, 0, self.span.n_blocks)
            has_share = member.kv_heads > 0 or member.mlp_columns > 0
            if has_share != self.is_group:
                raise InvalidPlan("stage.members", "must have shares in a group, and only there")

    @classmethod
    def alone(cls, peer_id: str, start: int, end: int, *, streamed_blocks: int = 0) -> StagePlan:
        """The stage of one peer that runs the whole of blocks `[start, end)`."""
        return cls(Span(start, end), (Member(peer_id, streamed_blocks=streamed_blocks),))

    @property
    def is_group(self) -> bool:
        """Whether several members share each block."""
        return len(self.members) > 1

    def kv_heads_of(self, idx: int) -> tuple[int, int]:
        """KV heads [start, end) of member `idx` of a group."""
        start = sum(member.kv_heads for member in self.members[:idx])
        return start, start + self.members[idx].kv_heads

    def mlp_columns_of(self, idx: int) -> tuple[int, int]:
        """Columns [start, end) of the MLP of member `idx` of a group."""
        start = sum(member.mlp_columns for member in self.members[:idx])
        return start, start + self.members[idx].mlp_columns

    def check_shares(self, layout: ModelLayout) -> None:
        """Raise `InvalidPlan` unless a group's shares are all of each block of this model."""
        if not self.is_group:
            return
        if not layout.can_split:
            raise InvalidPlan("stage.members", "blocks of this model cannot be split")
        if sum(member.kv_heads for member in self.members) != layout.n_kv_heads:
            raise InvalidPlan("stage.members", f"must hold {layout.n_kv_heads} KV heads in all")
        if sum(member.mlp_columns for member in self.members) != layout.mlp_columns:
            raise InvalidPlan("stage.members", f"must hold {layout.mlp_columns} columns in all")
        if any(member.mlp_columns % layout.mlp_quantum for member in self.members):
            raise InvalidPlan(
                "stage.members", f"must cut the MLP at multiples of {layout.mlp_quantum}"
            )

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
    stall_s: float = 0.0  # of `tpot_s`: waiting for weights that stream from disk
    link_bytes: tuple[tuple[str, str, int], ...] = ()  # (sender, receiver, bytes per token)

    def __post_init__(self) -> None:
        """Check every bound."""
        for field in ("ttft_s", "tpot_s", "throughput_tok_per_s", "stall_s"):
            check_real(f"prediction.{field}", getattr(self, field), 0.0, MAX_FIGURE)
        check_whole("prediction.memory_bytes", len(self.memory_bytes), 1, MAX_STAGES * MAX_MEMBERS)
        for peer_id, n_bytes in self.memory_bytes:
            check_name("prediction.memory_bytes", peer_id)
            check_whole("prediction.memory_bytes", n_bytes, 0, MAX_BYTES * MAX_BLOCKS)
        check_whole("prediction.link_bytes", len(self.link_bytes), 0, 2 * MAX_STAGES * MAX_MEMBERS)
        for sender, receiver, n_bytes in self.link_bytes:
            check_name("prediction.link_bytes", sender)
            check_name("prediction.link_bytes", receiver)
            check_whole("prediction.link_bytes", n_bytes, 0, MAX_BYTES)

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


@dataclass(frozen=True, slots=True, order=True)
class Pipeline:
    """A chain of stages over the whole model, and what crosses its borders."""

    stages: tuple[StagePlan, ...]
    codecs: tuple[str, ...]  # [n_stages + 1], one per border
    carries: tuple[bool, ...]  # [n_stages + 1]: does the border carry top-k indices

    def __post_init__(self) -> None:
        """Check the invariant of the module and every bound."""
        check_stages(self.stages)
        for field in ("codecs", "carries"):
            if len(getattr(self, field)) != len(self.stages) + 1:
                raise InvalidPlan(f"plan.{field}", "must have one entry per border")
        for codec in self.codecs:
            if codec not in CODECS:
                raise InvalidPlan("plan.codecs", f"must be of {', '.join(CODECS)}")

    @classmethod
    def of(
        cls,
        stages: Sequence[StagePlan],
        *,
        codecs: Sequence[str] | None = None,
        index_pattern: str | None = None,
    ) -> Pipeline:
        """A chain with the carries that `index_pattern` asks for; codecs are `exact` by default."""
        check_stages(stages)
        if index_pattern is not None:
            check_index_pattern(index_pattern, stages[-1].span.end)
        codecs = ("exact",) * (len(stages) + 1) if codecs is None else codecs
        return cls(tuple(stages), tuple(codecs), carries_of(stages, index_pattern))

    @property
    def n_blocks(self) -> int:
        """Blocks of the whole model."""
        return self.stages[-1].span.end

    @property
    def peers(self) -> tuple[str, ...]:
        """Every member's peer id, in stage order."""
        return tuple(peer_id for stage in self.stages for peer_id in stage.peers)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One way to run one model on some members, in the epoch it was proposed for.

    Of several pipelines, which share no member, a session runs on one.
    """

    model_digest: str
    epoch: int
    pipelines: tuple[Pipeline, ...]
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
        check_whole("plan.pipelines", len(self.pipelines), 1, MAX_PIPELINES)
        check_pipelines(self.pipelines)
        if self.index_pattern is not None:
            check_index_pattern(self.index_pattern, self.n_blocks)
        for pipeline in self.pipelines:
            if pipeline.carries != carries_of(pipeline.stages, self.index_pattern):
                raise InvalidPlan("plan.carries", "must be true where the next block is Shared")
        if tuple(peer_id for peer_id, _ in self.prediction.memory_bytes) != self.peers:
            raise InvalidPlan("prediction.memory_bytes", "must name the members in stage order")

    @property
    def n_blocks(self) -> int:
        """Blocks of the whole model."""
        return self.pipelines[0].n_blocks

    @property
    def stages(self) -> tuple[StagePlan, ...]:
        """The stages of all pipelines, one pipeline after the other."""
        return tuple(stage for pipeline in self.pipelines for stage in pipeline.stages)

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
    "pipelines",
    "index_pattern",
    "engine",
    "proposer",
)


def border_bytes_per_token(layout: ModelLayout, codec: str) -> int:
    """Bytes of one token's hidden states on the wire, without indices.

    int8 and int4 have an fp16 scale per group of 32; int4 keeps one value in 64 as it is, with a
    two-byte place.
    """
    n_groups = -(-layout.hidden_size // 32)
    if codec == "fp16":
        return 2 * layout.hidden_size
    if codec == "int8":
        return layout.hidden_size + 2 * n_groups
    if codec == "int4":
        return -(-layout.hidden_size // 2) + 2 * n_groups + 4 * -(-layout.hidden_size // 64)
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


def check_pipelines(pipelines: Sequence[Pipeline]) -> None:
    """Raise `InvalidPlan` unless they run one model and share no member."""
    if len({pipeline.n_blocks for pipeline in pipelines}) != 1:
        raise InvalidPlan("plan.pipelines", "must cover the same blocks")
    peers = [peer_id for pipeline in pipelines for peer_id in pipeline.peers]
    if len(set(peers)) != len(peers):
        raise InvalidPlan("plan.pipelines", "must not name a peer twice")


def check_index_pattern(pattern: str, n_blocks: int) -> None:
    """Raise `InvalidPlan` unless there is one F or S per block, and the first is F."""
    if len(pattern) != n_blocks or not pattern.startswith("F") or pattern.strip("FS"):
        raise InvalidPlan("plan.index_pattern", "must be one F or S per block and begin with F")


def carries_of(stages: Sequence[StagePlan], pattern: str | None) -> tuple[bool, ...]:
    """For each border, whether the block behind it is Shared and so needs the indices."""
    starts = [pattern is not None and pattern[stage.span.start] == "S" for stage in stages]
    return (*starts, False)


def make_plan(
    pipelines: Sequence[Pipeline],
    prediction: Prediction,
    *,
    model_digest: str,
    epoch: int,
    proposer: str,
    engine: str,
    index_pattern: str | None = None,
) -> LayerPlan:
    """A plan of a candidate's pipelines."""
    return LayerPlan(
        model_digest=model_digest,
        epoch=epoch,
        pipelines=tuple(pipelines),
        engine=engine,
        prediction=prediction,
        proposer=proposer,
        index_pattern=index_pattern,
    )
