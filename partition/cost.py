"""The cost model: what pipelines of stages take per token and per prompt, term by term.

Knows no search and no preference. After ParetoPipe (arXiv:2601.08025, section III: latency is the
sum of stages and transfers, throughput the slowest of them), with propagation, chunked prefill,
batches, the head's own work, groups (see `group`) and weights that stream from disk added. Not
modelled: several borders sharing one network card.

    step of a stage    step_s + n_blocks * seconds of a block, of a batch at its depth; of a group,
                       with both sums of partial sums; not less than the disk takes for what streams
    TPOT               head + stages + borders (latency + wire), of a batch of one
    TTFT               the session opened on all stages, the first chunk through everything, the
                       others behind the slowest part of it
    throughput         of batches of 1, 2, 4, 8, what gives most: a batch per time of the busiest
                       device or link, and all sessions once per time around
    memory             weights + KV cache of all sessions at full context + the head's weights

The head is the hub of the first stage unless `head` says otherwise: any member may ask, a plan
must not depend on which one does, and this is the choice without a border in front.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from .errors import InvalidPlan, PlanInfeasible
from .group import GroupTerm, shares_term
from .memory import (
    block_cap,
    held_bytes,
    kv_bytes_per_block,
    member_bytes,
    stage_bytes,
    streamed_bytes,
    weight_share,
)
from .network import BorderTerm, Network
from .plan import Pipeline, Prediction, StagePlan, border_bytes_per_token, check_stages
from .profile import DeviceProfile, LinkProfile, ModelLayout, Workload
from .speed import (
    GRID_S,
    block_step_s,
    block_steps_s,
    chunk_s_per_block,
    head_step_s,
    head_steps_s,
    on_grid,
    step_overhead_s,
)
from .terms import Busy, StageTerm, Terms, Window, joint_prediction, reply_s, shared_sessions

__all__ = [
    "GRID_S",
    "BorderTerm",
    "Busy",
    "GroupTerm",
    "Network",
    "StageTerm",
    "Terms",
    "block_cap",
    "block_step_s",
    "block_steps_s",
    "chunk_s_per_block",
    "head_step_s",
    "head_steps_s",
    "held_bytes",
    "joint_prediction",
    "kv_bytes_per_block",
    "member_bytes",
    "misfits",
    "on_grid",
    "predict",
    "predict_all",
    "price",
    "price_all",
    "reply_s",
    "shared_sessions",
    "stage_bytes",
    "step_overhead_s",
    "token_bytes_at",
]


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
        PlanInfeasible: a border joins two devices without a measured link, or a hub has none to
            another member of its group.
        InvalidPlan: the stages do not cover the model, a device has no profile, or a group's
            shares are not all of each block.
    """
    check_stages(stages)
    if stages[-1].span.end != layout.n_blocks:
        raise InvalidPlan("plan.stages", f"must cover {layout.n_blocks} blocks")
    head = head or stages[0].hub
    for peer_id in (head, *(peer_id for stage in stages for peer_id in stage.peers)):
        if peer_id not in devices:
            raise InvalidPlan("plan.stages", f"{peer_id} has no profile for this model")
    codecs = codecs or ("exact",) * (len(stages) + 1)
    return Terms(
        head=head,
        head_steps_s=head_steps_s(devices[head]),
        stages=tuple(
            _stage_term(stage, layout, devices, network, request, head) for stage in stages
        ),
        borders=_borders(stages, layout, network, request, head, codecs, index_pattern),
        open_s=max(network.round_trip_s(head, stage.hub) for stage in stages),
        n_chunks=request.n_chunks,
        n_sessions=request.n_sessions,
    )


def price_all(
    pipelines: Sequence[Pipeline],
    layout: ModelLayout,
    devices: Mapping[str, DeviceProfile],
    network: Network,
    *,
    request: Workload,
    head: str | None = None,
    index_pattern: str | None = None,
) -> tuple[Terms, ...]:
    """`price` of each of the pipelines; `joint_prediction` makes one of them.

    Raises:
        PlanInfeasible, InvalidPlan: as `price`.
    """
    return tuple(
        price(
            pipeline.stages,
            layout,
            devices,
            network,
            request=request,
            head=head,
            codecs=pipeline.codecs,
            index_pattern=index_pattern,
        )
        for pipeline in pipelines
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


def predict_all(
    pipelines: Sequence[Pipeline],
    layout: ModelLayout,
    devices: Iterable[DeviceProfile],
    links: Iterable[LinkProfile],
    *,
    request: Workload | None = None,
    head: str | None = None,
    index_pattern: str | None = None,
) -> Prediction:
    """What one or several pipelines, in their codecs, should do together.

    Raises:
        PlanInfeasible, InvalidPlan: as `price`.
    """
    terms = price_all(
        pipelines,
        layout,
        {device.peer_id: device for device in devices},
        Network(links),
        request=request or Workload(),
        head=head,
        index_pattern=index_pattern,
    )
    return joint_prediction(terms)


def misfits(terms: Terms, devices: Mapping[str, DeviceProfile]) -> tuple[str, ...]:
    """Peers whose stage is above what their profile gives, in memory or in blocks."""
    return tuple(
        peer_id
        for stage in terms.stages
        for peer_id, n_bytes in zip(stage.peers, stage.memory_bytes, strict=True)
        if n_bytes > devices[peer_id].memory_bytes
        or stage.span.n_blocks > block_cap(devices[peer_id])
    )


def _stage_term(
    stage: StagePlan,
    layout: ModelLayout,
    devices: Mapping[str, DeviceProfile],
    network: Network,
    request: Workload,
    head: str,
) -> StageTerm:
    members = [devices[peer_id] for peer_id in stage.peers]
    block = _block_term(stage, layout, members, network, request)
    n_blocks = stage.span.n_blocks
    overhead_s = max(step_overhead_s(device) for device in members)
    computed = tuple(overhead_s + n_blocks * seconds for seconds in block.decode_s)
    chunk_s = overhead_s + n_blocks * block.chunk_s
    read_s = max(
        on_grid(streamed_bytes(layout, stage, idx) / device.disk_bytes_per_s)
        for idx, device in enumerate(members)
    )
    return StageTerm(
        peers=stage.peers,
        hub_idx=stage.hub_idx,
        span=stage.span,
        steps_s=tuple(max(seconds, read_s) for seconds in computed),
        chunk_s=max(chunk_s, read_s),
        sums_s=n_blocks * (block.decode_s[0] - block.compute_s),
        stall_s=max(0.0, read_s - computed[0]),
        window=_window(stage, layout, members, block.decode_s[0], read_s > computed[0]),
        memory_bytes=tuple(
            held_bytes(layout, stage, idx, request, is_head=peer_id == head)
            for idx, peer_id in enumerate(stage.peers)
        ),
        sum_bytes=n_blocks * block.token_bytes,
    )


def _block_term(
    stage: StagePlan,
    layout: ModelLayout,
    members: Sequence[DeviceProfile],
    network: Network,
    request: Workload,
) -> GroupTerm:
    """What one block of the stage takes; of one device, a group of itself."""
    if not stage.is_group:
        steps_s = block_steps_s(members[0], request)
        return GroupTerm(
            members=stage.members,
            hub_idx=0,
            sum_codec=stage.sum_codec,
            decode_s=steps_s,
            chunk_s=chunk_s_per_block(members[0], request),
            compute_s=steps_s[0],
        )
    stage.check_shares(layout)
    term = shares_term(
        layout,
        members,
        network,
        request,
        members=stage.members,
        hub_idx=stage.hub_idx,
        sum_codec=stage.sum_codec,
    )
    if term is None:
        raise PlanInfeasible(f"no measured link joins {stage.hub} and another of its group")
    return term


def _window(
    stage: StagePlan,
    layout: ModelLayout,
    members: Sequence[DeviceProfile],
    block_s: float,
    is_late: bool,
) -> Window:
    """Whether reading keeps up: for each block by itself, or for the whole step (TPI-LLM's tight
    and loose condition, arXiv:2410.00531 section 3.4, for blocks read whole)."""
    if not any(member.streamed_blocks for member in stage.members):
        return "resident"
    if is_late:
        return "stalled"
    largest = max(layout.block_bytes[stage.span.start : stage.span.end])
    slowest_s = max(
        largest
        * (weight_share(layout, member) if stage.is_group else 1.0)
        / device.disk_bytes_per_s
        for member, device in zip(stage.members, members, strict=True)
        if member.streamed_blocks
    )
    return "tight" if slowest_s <= block_s else "loose"


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
