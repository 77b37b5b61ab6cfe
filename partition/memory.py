"""What a stage takes of its members' memory, and what they give; bytes, no seconds."""

from __future__ import annotations

import math

from .plan import Member, Span, StagePlan
from .profile import MAX_BLOCKS, DeviceProfile, ModelLayout, Workload

WINDOW_BLOCKS = 2  # of those that stream: one is computed with while the next one is read


def block_cap(device: DeviceProfile) -> int:
    """Blocks that the device's owner lets it run."""
    return MAX_BLOCKS if device.max_blocks is None else device.max_blocks


def head_bytes(layout: ModelLayout) -> int:
    """Weights that the head needs beside its blocks."""
    return layout.embedding_bytes + layout.head_bytes


def kv_bytes_per_block(layout: ModelLayout, request: Workload, member: Member | None = None) -> int:
    """KV cache of one block for every session at full context; only the part of a group's member,
    where one is given."""
    n_bytes = layout.kv_bytes_per_token_per_block * request.context_tokens * request.n_sessions
    if member is None:
        return n_bytes
    return -(-n_bytes * member.kv_heads // max(layout.n_kv_heads, 1))


def weight_share(layout: ModelLayout, member: Member) -> float:
    """Part of each block's weights that a member of a group holds."""
    heads = member.kv_heads / max(layout.n_kv_heads, 1)
    columns = member.mlp_columns / max(layout.mlp_columns, 1)
    return layout.attention_share * heads + (1.0 - layout.attention_share) * columns


def member_bytes(layout: ModelLayout, stage: StagePlan, idx: int) -> int:
    """Memory that the weights of member `idx` of a stage take.

    What streams from disk is not counted, but for the two blocks that are passing through.
    """
    member, span = stage.members[idx], stage.span
    share = weight_share(layout, member) if stage.is_group else 1.0
    sizes = layout.block_bytes[span.start : span.end]
    if member.streamed_blocks:
        n_held = min(span.n_blocks, span.n_blocks - member.streamed_blocks + WINDOW_BLOCKS)
        sizes = tuple(sorted(sizes)[span.n_blocks - n_held :])
    return math.ceil(sum(sizes) * share)


def streamed_bytes(layout: ModelLayout, stage: StagePlan, idx: int) -> int:
    """Bytes that member `idx` of a stage reads from disk for each step.

    Which blocks stream is the member's own business: the largest are counted.
    """
    member, span = stage.members[idx], stage.span
    if not member.streamed_blocks:
        return 0
    share = weight_share(layout, member) if stage.is_group else 1.0
    sizes = sorted(layout.block_bytes[span.start : span.end])
    return math.ceil(sum(sizes[span.n_blocks - member.streamed_blocks :]) * share)


def held_bytes(
    layout: ModelLayout, stage: StagePlan, idx: int, request: Workload, *, is_head: bool
) -> int:
    """Peak memory of member `idx`: weights, KV cache of all sessions, the head's if it is that."""
    member = stage.members[idx]
    kv_bytes = kv_bytes_per_block(layout, request, member if stage.is_group else None)
    head = head_bytes(layout) if is_head else 0
    return member_bytes(layout, stage, idx) + stage.span.n_blocks * kv_bytes + head


def stage_bytes(layout: ModelLayout, span: Span, request: Workload, *, is_head: bool) -> int:
    """What one device alone takes for `span`, everything resident; as `held_bytes`."""
    weights = sum(layout.block_bytes[span.start : span.end])
    head = head_bytes(layout) if is_head else 0
    return weights + span.n_blocks * kv_bytes_per_block(layout, request) + head
