"""Whether the shares of a group still fit the speed of its members: a pure rule.

Shares were made from the profiles of the day. Where a member has become slower, or turns out so
while serving, its partial sums arrive late, and everybody waits twice in each block. Two sums whose
arrivals are 15 % apart cost 7 % of a block; from there on new shares are worth what it takes to
load them, and no plan as a whole needs to be better by what a change of plan asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .group import group_term, shares_term
from .network import Network
from .plan import Pipeline, StagePlan
from .profile import DeviceProfile, ModelLayout, Workload

MIN_GAIN = 1.07  # of a block's time for one token


def rebalanced(
    pipeline: Pipeline,
    layout: ModelLayout,
    devices: Mapping[str, DeviceProfile],
    network: Network,
    request: Workload,
) -> Pipeline:
    """`pipeline` with new shares for those of its groups that are out of balance.

    The very same value where none is, or where the profiles do not say. Members, hubs and spans
    stay; what a member streams from disk stays too.
    """
    stages = tuple(
        _rebalanced_stage(stage, layout, devices, network, request) for stage in pipeline.stages
    )
    return pipeline if stages == pipeline.stages else replace(pipeline, stages=stages)


def _rebalanced_stage(
    stage: StagePlan,
    layout: ModelLayout,
    devices: Mapping[str, DeviceProfile],
    network: Network,
    request: Workload,
) -> StagePlan:
    if not stage.is_group or not devices.keys() >= set(stage.peers):
        return stage
    profiles = [devices[peer_id] for peer_id in stage.peers]
    now = shares_term(
        layout,
        profiles,
        network,
        request,
        members=stage.members,
        hub_idx=stage.hub_idx,
        sum_codec=stage.sum_codec,
    )
    new = group_term(layout, profiles, network, request, hub=stage.hub, sum_codec=stage.sum_codec)
    if now is None or new is None or now.decode_s[0] < MIN_GAIN * new.decode_s[0]:
        return stage
    members = tuple(
        replace(member, streamed_blocks=old.streamed_blocks)
        for member, old in zip(new.members, stage.members, strict=True)
    )
    return replace(stage, members=members)
