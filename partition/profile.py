"""What the planner knows: the layout of a model, and what devices and links were measured to do.

Values only; who measures them and where they are published is not known here. Every field is
bounds-checked when the value is made, so whatever holds one of these can compute with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import msgspec

from .bounds import check_name, check_real, check_whole
from .errors import InvalidPlan

MAX_BLOCKS = 1024
MAX_BYTES = 1 << 50  # of one block or one device: a pebibyte, far above anything edge-sized
MAX_SECONDS = 1e4  # of one block or head step: hours per token is not a device, it is a mistake
MIN_SECONDS = 1e-12
MAX_RTT_S = 600.0
MAX_LOSS = 0.95

BATCHES = (2, 4, 8)  # sessions of one decode step, beside one, that devices are measured with
STEP_BATCHES = (1, *BATCHES)

REPLY_TOKENS = 128  # a reply of ordinary length, where one figure has to stand for latency

LinkKind = Literal["direct", "mapped", "punched", "webrtc", "relayed", "memory"]


class Value:
    """A frozen dataclass that travels as JSON types; mixin of the three profiles."""

    __slots__ = ()

    def to_value(self) -> dict[str, Any]:
        """The fields as JSON types (tuples become lists)."""
        value: dict[str, Any] = msgspec.to_builtins(self)
        return value

    @classmethod
    def from_value(cls, value: object) -> Self:
        """Rebuild from JSON types; fields of a newer version are ignored.

        Raises:
            InvalidPlan: a field is missing, of another type or out of bounds.
        """
        try:
            return msgspec.convert(value, cls)
        except msgspec.ValidationError as error:
            raise InvalidPlan(cls.__name__, str(error)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLayout(Value):
    """What a model weighs: resident bytes of its blocks, and bytes per token."""

    digest: str  # of the manifest
    n_blocks: int
    hidden_size: int
    block_bytes: tuple[int, ...]  # [n_blocks], resident, so after any repacking
    embedding_bytes: int  # on the head
    head_bytes: int  # final norm and output head; 0 where it is tied to the embedding
    kv_bytes_per_token_per_block: int
    wire_bytes_per_token: int  # hidden states of one token across a border, codec `exact`
    # What a tensor-parallel group can share out; without KV heads here a block cannot be split.
    n_kv_heads: int = 0  # each goes with its query heads
    mlp_columns: int = 0  # width of the MLP
    mlp_quantum: int = 32  # columns that must stay together: a block of the quantisation
    attention_share: float = 0.25  # of a block's bytes; the rest is the MLP's
    index_bytes_per_token: int = 0  # top-k indices that a border in front of a Shared block carries

    def __post_init__(self) -> None:
        """Check every bound."""
        check_name("layout.digest", self.digest)
        check_whole("layout.n_blocks", self.n_blocks, 1, MAX_BLOCKS)
        check_whole("layout.hidden_size", self.hidden_size, 1, 1 << 20)
        if len(self.block_bytes) != self.n_blocks:
            raise InvalidPlan("layout.block_bytes", f"must have {self.n_blocks} entries")
        for n_bytes in self.block_bytes:
            check_whole("layout.block_bytes", n_bytes, 1, MAX_BYTES)
        check_whole("layout.embedding_bytes", self.embedding_bytes, 0, MAX_BYTES)
        check_whole("layout.head_bytes", self.head_bytes, 0, MAX_BYTES)
        for field in (
            "kv_bytes_per_token_per_block",
            "wire_bytes_per_token",
            "index_bytes_per_token",
        ):
            check_whole(f"layout.{field}", getattr(self, field), 0, 1 << 30)
        check_whole("layout.n_kv_heads", self.n_kv_heads, 0, 1 << 16)
        check_whole("layout.mlp_columns", self.mlp_columns, 0, 1 << 24)
        check_whole("layout.mlp_quantum", self.mlp_quantum, 1, 1 << 16)
        check_real("layout.attention_share", self.attention_share, 0.0, 1.0)

    @property
    def can_split(self) -> bool:
        """Whether a group can share out its blocks."""
        return self.n_kv_heads > 0 and self.mlp_columns >= self.mlp_quantum


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile(Value):
    """What one member was measured to do with one model on one engine, and what it gives."""

    peer_id: str
    model_digest: str
    engine: str
    decode_s_per_block: float  # one token through one block, batch of one
    prefill_s_per_token_per_block: float
    head_s: float  # embedding, final norm, logits and sampling of one token
    memory_bytes: int  # budget for weights and KV cache together
    disk_bytes_per_s: float
    max_blocks: int | None = None  # the owner's cap; 0 means: a head only
    measured_at: float = 0.0  # Unix seconds, for people; the planner does not look at it
    # What a profile of a newer node says as well; without, the figures above stand for these.
    batch_decode_s_per_block: tuple[float, ...] = ()  # a whole batch, of each of BATCHES
    batch_head_s: tuple[float, ...] = ()  # the same for the head's own work
    depth_s_per_block: float = 0.0  # what each position of context adds to a token, in one block
    prefill_s_per_block: tuple[tuple[int, float], ...] = ()  # (tokens of a chunk, seconds), rising
    step_s: float = 0.0  # of each step beside its blocks: framing, changes of thread
    split_s_per_block: float = 0.0  # what running a block as two halves adds, the all-reduce apart
    n_cores: int = 1  # that the engine uses
    busy_share: float = 0.0  # of them, in use by others
    version: int = 0  # counts what this node published of this model

    def __post_init__(self) -> None:
        """Check every bound."""
        check_name("device.peer_id", self.peer_id)
        check_name("device.model_digest", self.model_digest)
        check_name("device.engine", self.engine)
        for field in ("decode_s_per_block", "prefill_s_per_token_per_block", "head_s"):
            check_real(f"device.{field}", getattr(self, field), MIN_SECONDS, MAX_SECONDS)
        check_whole("device.memory_bytes", self.memory_bytes, 0, MAX_BYTES)
        check_real("device.disk_bytes_per_s", self.disk_bytes_per_s, 1.0, 1e15)
        if self.max_blocks is not None:
            check_whole("device.max_blocks", self.max_blocks, 0, 1 << 30)
        check_real("device.measured_at", self.measured_at, 0.0, 1e12)
        for field in ("batch_decode_s_per_block", "batch_head_s"):
            if len(getattr(self, field)) not in (0, len(BATCHES)):
                raise InvalidPlan(f"device.{field}", f"must have {len(BATCHES)} entries or none")
            for seconds in getattr(self, field):
                check_real(f"device.{field}", seconds, MIN_SECONDS, MAX_SECONDS)
        for field in ("depth_s_per_block", "step_s", "split_s_per_block"):
            check_real(f"device.{field}", getattr(self, field), 0.0, MAX_SECONDS)
        self._check_chunks()
        check_whole("device.n_cores", self.n_cores, 1, 1 << 16)
        check_real("device.busy_share", self.busy_share, 0.0, 1.0)
        check_whole("device.version", self.version, 0, 1 << 31)

    def _check_chunks(self) -> None:
        field = "device.prefill_s_per_block"
        check_whole(field, len(self.prefill_s_per_block), 0, 16)
        before = 0
        for n_tokens, seconds in self.prefill_s_per_block:
            check_whole(field, n_tokens, before + 1, 1 << 16)
            check_real(field, seconds, MIN_SECONDS, MAX_SECONDS)
            before = n_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkProfile(Value):
    """What the link from `a` to `b` was measured to do, by `a`."""

    a: str
    b: str
    rtt_s: float
    bandwidth_bytes_per_s: float
    kind: LinkKind = "direct"
    loss: float = 0.0  # share of packets

    def __post_init__(self) -> None:
        """Check every bound."""
        check_name("link.a", self.a)
        check_name("link.b", self.b)
        if self.a == self.b:
            raise InvalidPlan("link.b", "must be another peer than link.a")
        check_real("link.rtt_s", self.rtt_s, 0.0, MAX_RTT_S)
        check_real("link.bandwidth_bytes_per_s", self.bandwidth_bytes_per_s, 1.0, 1e15)
        check_real("link.loss", self.loss, 0.0, MAX_LOSS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload(Value):
    """The use that a plan is made for."""

    prompt_tokens: int = 128
    context_tokens: int = 2048  # per session; what the KV cache must have room for
    n_sessions: int = 4  # in flight at once; memory is planned for all of them
    prefill_chunk: int = 128  # tokens; chunks of one prompt overlap across stages

    def __post_init__(self) -> None:
        """Check every bound."""
        check_whole("workload.prompt_tokens", self.prompt_tokens, 1, 1 << 24)
        check_whole("workload.context_tokens", self.context_tokens, 1, 1 << 24)
        check_whole("workload.n_sessions", self.n_sessions, 1, 4096)
        check_whole("workload.prefill_chunk", self.prefill_chunk, 1, 1 << 16)

    @property
    def n_chunks(self) -> int:
        """Chunks that the prompt is cut into."""
        return -(-self.prompt_tokens // self.prefill_chunk)

    @property
    def depth(self) -> int:
        """Positions that a token of an ordinary reply looks back on, on average."""
        return self.prompt_tokens + REPLY_TOKENS // 2

    @property
    def chunk_tokens(self) -> float:
        """Mean tokens per chunk, so that all chunks together cost what the prompt costs."""
        return self.prompt_tokens / self.n_chunks
