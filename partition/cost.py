"""The cost model: what a chain of stages takes per token and per prompt, term by term.

Knows no search and no preference. After ParetoPipe (arXiv:2601.08025, section III: latency is the
sum of stages and transfers, throughput the slowest of them), with propagation, chunked prefill and
the head's own work added. Not modelled: batched decode running faster than one session at a time,
and several borders sharing one network card.

The head is the device of the first stage unless `head` says otherwise: any member may ask, a plan
must not depend on which one does, and this is the choice without a border in front.

Every term is rounded to a grid of 2^-40 s (0.9 ps). Sums of grid values below 8192 s are exact in
a float, so the order of adding them cannot matter and every member computes the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from .errors import InvalidPlan, PlanInfeasible
from .plan import Prediction, Span, StagePlan, border_bytes_per_token, check_stages
from .profile import MAX_BLOCKS, DeviceProfile, LinkKind, LinkProfile, ModelLayout, Workload

GRID_S = 2.0**-40


def on_grid(seconds: float) -> float:
    """Round to a multiple of `GRID_S`."""
    return round(seconds / GRID_S) * GRID_S


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTerm:
    """What one stage costs."""

    peer_id: str
    span: Span
    decode_s: float  # compute of one token
    chunk_s: float  # compute of one prefill chunk
    memory_bytes: int  # weights, KV cache of all sessions, and the head's weights if it is the head


@dataclass(frozen=True, slots=True, kw_only=True)
class BorderTerm:
    """What one border costs; all zero where both sides are one device."""

    sender: str
    receiver: str
    kind: LinkKind | None  # None: no link, sender and receiver are one device
    latency_s: float  # one way, with the expected resends
    wire_s: float  # bytes of one token / bandwidth
    chunk_wire_s: float  # bytes of one prefill chunk / bandwidth

    @property
    def decode_s(self) -> float:
        """From the last byte computed to the last byte received, one token."""
        return self.latency_s + self.wire_s

    @property
    def chunk_s(self) -> float:
        """The same of one prefill chunk."""
        return self.latency_s + self.chunk_wire_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """One resource of the pipeline and how long each token occupies it."""

    kind: Literal["device", "link", "sessions"]
    peers: tuple[str, ...]  # the device; or sender and receiver; or every stage
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """All terms of one candidate."""

    head: str
    head_s: float  # the head's own work per token: embedding, norm, logits, sampling
    stages: tuple[StageTerm, ...]
    borders: tuple[BorderTerm, ...]  # [n_stages + 1]
    n_chunks: int
    n_sessions: int

    @property
    def tpot_s(self) -> float:
        """One token of one session alone: every stage, every border, the head."""
        stages = sum(stage.decode_s for stage in self.stages)
        return self.head_s + stages + sum(border.decode_s for border in self.borders)

    @property
    def ttft_s(self) -> float:
        """The first chunk through the pipe, the others behind its slowest part, the way back.

        Only the last position of the prompt returns to the head.
        """
        forth = self.borders[:-1]
        first = sum(stage.chunk_s for stage in self.stages) + sum(b.chunk_s for b in forth)
        slowest = max(
            max(stage.chunk_s for stage in self.stages), max(b.chunk_wire_s for b in forth)
        )
        return first + (self.n_chunks - 1) * slowest + self.borders[-1].decode_s + self.head_s

    def busy(self) -> list[Busy]:
        """Every resource a token passes; the last entry is the limit that n_sessions sets."""
        devices = {stage.peer_id: stage.decode_s for stage in self.stages}
        devices[self.head] = devices.get(self.head, 0.0) + self.head_s
        links = [
            Busy(kind="link", peers=(b.sender, b.receiver), seconds=b.wire_s)
            for b in self.borders
            if b.kind
        ]
        everyone = tuple(stage.peer_id for stage in self.stages)
        return [
            *(Busy(kind="device", peers=(p,), seconds=s) for p, s in devices.items()),
            *links,
            Busy(kind="sessions", peers=everyone, seconds=self.tpot_s / self.n_sessions),
        ]

    def prediction(self) -> Prediction:
        """The terms as the figures a plan carries."""
        return Prediction(
            ttft_s=self.ttft_s,
            tpot_s=self.tpot_s,
            throughput_tok_per_s=1.0 / max(busy.seconds for busy in self.busy()),
            memory_bytes=tuple((stage.peer_id, stage.memory_bytes) for stage in self.stages),
        )


class Network:
    """The measured links, by direction.

    A direction nobody measured counts as its opposite; a pair without any measurement cannot be
    used. Of several measurements of one direction the worse of each figure counts.
    """

    def __init__(self, links: Iterable[LinkProfile]) -> None:
        measured: dict[tuple[str, str], LinkProfile] = {}
        for link in links:
            known = measured.get((link.a, link.b))
            measured[link.a, link.b] = _worse(known, link) if known else link
        self._links = measured

    def link(self, sender: str, receiver: str) -> LinkProfile | None:
        """The link that carries bytes from `sender` to `receiver`."""
        return self._links.get((sender, receiver)) or self._links.get((receiver, sender))

    def border(
        self, sender: str, receiver: str, *, token_bytes: int, chunk_tokens: float
    ) -> BorderTerm | None:
        """The terms of a border; None when the two cannot reach each other."""
        if sender == receiver:
            return BorderTerm(
                sender=sender, receiver=receiver, kind=None, latency_s=0, wire_s=0, chunk_wire_s=0
            )
        link = self.link(sender, receiver)
        if link is None:
            return None
        # A message that has to be sent again costs about a round trip more.
        per_byte_s = 1.0 / link.bandwidth_bytes_per_s
        return BorderTerm(
            sender=sender,
            receiver=receiver,
            kind=link.kind,
            latency_s=on_grid(link.rtt_s * (0.5 + link.loss)),
            wire_s=on_grid(token_bytes * per_byte_s),
            chunk_wire_s=on_grid(token_bytes * chunk_tokens * per_byte_s),
        )


def _worse(one: LinkProfile, other: LinkProfile) -> LinkProfile:
    return LinkProfile(
        a=one.a,
        b=one.b,
        rtt_s=max(one.rtt_s, other.rtt_s),
        bandwidth_bytes_per_s=min(one.bandwidth_bytes_per_s, other.bandwidth_bytes_per_s),
        kind=max(one.kind, other.kind),  # only to be independent of order; no figure rests on it
        loss=max(one.loss, other.loss),
    )


def decode_s_per_block(device: DeviceProfile) -> float:
    """Seconds per token and block, on the grid."""
    return on_grid(device.decode_s_per_block)


def chunk_s_per_block(device: DeviceProfile, request: Workload) -> float:
    """Seconds per prefill chunk and block, on the grid."""
    return on_grid(device.prefill_s_per_token_per_block * request.chunk_tokens)


def kv_bytes_per_block(layout: ModelLayout, request: Workload) -> int:
    """KV cache of one block for every session at full context."""
    return layout.kv_bytes_per_token_per_block * request.context_tokens * request.n_sessions


def member_bytes(layout: ModelLayout, stage: StagePlan, idx: int) -> int:
    """Memory that the weights of member `idx` of a stage take.

    What streams from disk is not counted, but for the two blocks that are passing through.
    """
    member, span = stage.members[idx], stage.span
    share = 1.0
    if stage.is_group:
        mlp_share = 1.0 - layout.attention_share
        share = (
            layout.attention_share * member.kv_heads / layout.n_kv_heads
            + mlp_share * member.mlp_columns / layout.mlp_columns
        )
    sizes = sorted(layout.block_bytes[span.start : span.end])
    n_held = min(span.n_blocks, span.n_blocks - member.streamed_blocks + 2)
    return math.ceil(sum(sizes[len(sizes) - n_held :]) * share)


def stage_bytes(layout: ModelLayout, span: Span, request: Workload, *, is_head: bool) -> int:
    """Memory that a stage takes: weights, KV cache, and the head's weights if it is the head."""
    weights = sum(layout.block_bytes[span.start : span.end])
    head = layout.embedding_bytes + layout.head_bytes if is_head else 0
    return weights + span.n_blocks * kv_bytes_per_block(layout, request) + head


def token_bytes_at(
    layout: ModelLayout, block_idx: int, *, codec: str, index_pattern: str | None
) -> int:
    """Bytes per token of the border in front of `block_idx` (n_blocks: of the way back)."""
    needs_indices = (
        index_pattern is not None
        and block_idx < layout.n_blocks
        and index_pattern[block_idx] == "S"
    )
    indices = layout.index_bytes_per_token if needs_indices else 0
    return border_bytes_per_token(layout, codec) + indices


def price(
    stages: Sequence[StagePlan],
    layout: ModelLayout,
    devices: Mapping[str, DeviceProfile],
    network: Network,
    *,
    request: Workload,
    head: str | None = None,
    codecs: Sequence[str] | None = None,
    index_pattern: str | None = None,
) -> Terms:
    """Every term of `stages`; `codecs` is one per border, `exact` when not given.

    Raises:
        PlanInfeasible: a border joins two devices without a measured link.
        InvalidPlan: the stages do not cover the model, a device has no profile, or a stage is a
            tensor-parallel group, which this model cannot price.
    """
    check_stages(stages)
    if stages[-1].span.end != layout.n_blocks:
        raise InvalidPlan("plan.stages", f"must cover {layout.n_blocks} blocks")
    if any(len(stage.members) > 1 for stage in stages):
        raise InvalidPlan("plan.stages", "tensor-parallel groups have no cost model")
    head = head or stages[0].hub
    for peer_id in (head, *(stage.hub for stage in stages)):
        if peer_id not in devices:
            raise InvalidPlan("plan.stages", f"{peer_id} has no profile for this model")
    codecs = codecs or ("exact",) * (len(stages) + 1)
    return Terms(
        head=head,
        head_s=on_grid(devices[head].head_s),
        stages=tuple(
            _stage_term(stage, layout, devices[stage.hub], request, is_head=stage.hub == head)
            for stage in stages
        ),
        borders=_borders(stages, layout, network, request, head, codecs, index_pattern),
        n_chunks=request.n_chunks,
        n_sessions=request.n_sessions,
    )


def predict(
    stages: Sequence[StagePlan],
    layout: ModelLayout,
    devices: Iterable[DeviceProfile],
    links: Iterable[LinkProfile],
    *,
    head: str | None = None,
    prompt_tokens: int = 128,
    context_tokens: int = 2048,
    prefill_chunk: int = 128,
    n_sessions: int = 4,
) -> Prediction:
    """What `stages` should do; memory is reported and not judged (see `misfits`).

    Raises:
        PlanInfeasible, InvalidPlan: as `price`.
    """
    request = Workload(
        prompt_tokens=prompt_tokens,
        context_tokens=context_tokens,
        n_sessions=n_sessions,
        prefill_chunk=prefill_chunk,
    )
    by_peer = {device.peer_id: device for device in devices}
    return price(stages, layout, by_peer, Network(links), request=request, head=head).prediction()


def block_cap(device: DeviceProfile) -> int:
    """Blocks that the device's owner lets it run."""
    return MAX_BLOCKS if device.max_blocks is None else device.max_blocks


def misfits(terms: Terms, devices: Mapping[str, DeviceProfile]) -> tuple[str, ...]:
    """Peers whose stage is above what their profile gives, in memory or in blocks."""
    return tuple(
        stage.peer_id
        for stage in terms.stages
        if stage.memory_bytes > devices[stage.peer_id].memory_bytes
        or stage.span.n_blocks > block_cap(devices[stage.peer_id])
    )


def _stage_term(
    stage: StagePlan,
    layout: ModelLayout,
    device: DeviceProfile,
    request: Workload,
    *,
    is_head: bool,
) -> StageTerm:
    n_blocks = stage.span.n_blocks
    return StageTerm(
        peer_id=stage.hub,
        span=stage.span,
        decode_s=n_blocks * decode_s_per_block(device),
        chunk_s=n_blocks * chunk_s_per_block(device, request),
        memory_bytes=stage_bytes(layout, stage.span, request, is_head=is_head),
    )


def _borders(
    stages: Sequence[StagePlan],
    layout: ModelLayout,
    network: Network,
    request: Workload,
    head: str,
    codecs: Sequence[str],
    index_pattern: str | None,
) -> tuple[BorderTerm, ...]:
    hubs = [head, *(stage.hub for stage in stages), head]
    cuts = [*(stage.span.start for stage in stages), layout.n_blocks]
    borders = []
    hops = zip(pairwise(hubs), cuts, codecs, strict=True)
    for (sender, receiver), block_idx, codec in hops:
        border = network.border(
            sender,
            receiver,
            token_bytes=token_bytes_at(layout, block_idx, codec=codec, index_pattern=index_pattern),
            chunk_tokens=request.chunk_tokens,
        )
        if border is None:
            raise PlanInfeasible(f"no measured link joins {sender} and {receiver}")
        borders.append(border)
    return tuple(borders)
