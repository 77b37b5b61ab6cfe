"""What one world leads to: its front, or what a plan that is given should do in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .balance import rebalanced
from .codecs import codecs_for
from .cost import predict_all
from .errors import PartitionError
from .front.search import Candidate, Front, pareto_front
from .memory import block_cap
from .network import Network
from .plan import Pipeline
from .profile import DeviceProfile, LinkProfile, ModelLayout, Workload
from .scope import EVERYTHING, Scope


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What there is to plan with, and for what."""

    layout: ModelLayout
    devices: Mapping[str, DeviceProfile]
    links: tuple[LinkProfile, ...]
    request: Workload
    scope: Scope = EVERYTHING


def evaluate(pipelines: Sequence[Pipeline], world: World) -> Candidate:
    """Pipelines with what they should do by the profiles of `world`.

    Raises:
        PartitionError: the profiles do not say.
    """
    prediction = predict_all(
        pipelines, world.layout, world.devices.values(), world.links, request=world.request
    )
    return Candidate(pipelines=tuple(pipelines), prediction=prediction)


def is_held(candidate: Candidate, world: World) -> bool:
    """Whether every member has the memory for its part, KV cache included, and takes its blocks."""
    memory_fits = all(
        n_bytes <= world.devices[peer_id].memory_bytes
        for peer_id, n_bytes in candidate.prediction.memory_bytes
    )
    return memory_fits and all(
        stage.span.n_blocks <= block_cap(world.devices[peer_id])
        for stage in candidate.stages
        for peer_id in stage.peers
    )


def front_or_reason(world: World) -> Front | PartitionError:
    """The front, or why there is none: both are worth remembering."""
    try:
        return pareto_front(
            world.layout,
            world.devices.values(),
            world.links,
            request=world.request,
            scope=world.scope,
        )
    except PartitionError as error:
        return error


def adjusted(pipelines: Sequence[Pipeline], world: World) -> Candidate | None:
    """Pipelines that run, with other codecs and shares where links or members ask for them by now.

    Members and spans stay, so little has to be loaded. None where all is as it should be, where the
    profiles do not say what the new ones would do, and where a member has no memory for more.
    """
    network = Network(world.links)
    renewed = tuple(_adjusted(pipeline, world, network) for pipeline in pipelines)
    if renewed == tuple(pipelines):
        return None
    try:
        candidate = evaluate(renewed, world)
    except PartitionError:
        return None
    return candidate if is_held(candidate, world) else None


def _adjusted(pipeline: Pipeline, world: World, network: Network) -> Pipeline:
    codecs = codecs_for(
        [stage.hub for stage in pipeline.stages],
        world.layout,
        network.link,
        world.request,
        current=pipeline.codecs,
    )
    recoded = replace(pipeline, codecs=codecs)
    return rebalanced(recoded, world.layout, world.devices, network, world.request)
