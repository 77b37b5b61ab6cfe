"""A plan that is given, not searched for: what it should do, and whether its members hold it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .cost import Network, block_cap, price
from .plan import Pipeline, Prediction
from .profile import DeviceProfile, LinkProfile, ModelLayout, Workload
from .search import Candidate


def evaluate(
    pipelines: Sequence[Pipeline],
    layout: ModelLayout,
    devices: Mapping[str, DeviceProfile],
    links: Iterable[LinkProfile],
    request: Workload,
) -> Candidate:
    """Pipelines with what they should do by these profiles.

    Raises:
        PartitionError: the profiles do not say.
    """
    network = Network(links)
    parts = [
        price(
            pipeline.stages, layout, devices, network, request=request, codecs=pipeline.codecs
        ).prediction()
        for pipeline in pipelines
    ]
    prediction = Prediction(
        ttft_s=min(part.ttft_s for part in parts),
        tpot_s=min(part.tpot_s for part in parts),
        throughput_tok_per_s=sum(part.throughput_tok_per_s for part in parts),
        memory_bytes=tuple(entry for part in parts for entry in part.memory_bytes),
    )
    return Candidate(pipelines=tuple(pipelines), prediction=prediction)


def is_held(candidate: Candidate, devices: Mapping[str, DeviceProfile]) -> bool:
    """Whether every member has the memory for its part, and takes as many blocks."""
    memory_fits = all(
        n_bytes <= devices[peer_id].memory_bytes
        for peer_id, n_bytes in candidate.prediction.memory_bytes
    )
    return memory_fits and all(
        stage.span.n_blocks <= block_cap(devices[peer_id])
        for stage in candidate.stages
        for peer_id in stage.peers
    )
