"""The Pareto front of one model over the devices at hand: which of them, which spans, what order.

Exact for households (up to `EXACT_DEVICES` devices) by label setting, see `labels`; beyond, or
when a question proves too hard, a beam search of fixed width, and `Front.exact` says so. Effort is
counted in labels and never in seconds, and devices are taken in order of peer id, so that every
member gets the same front from the same profiles, in whatever order they arrived.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .cost import Network, price, reply_s
from .dominance import front_of
from .errors import InvalidPlan
from .instance import build_instance, span_ends
from .labels import Chain, LabelSearch
from .plan import (
    Pipeline,
    Prediction,
    StagePlan,
    border_bytes_per_token,
    check_index_pattern,
)
from .profile import DeviceProfile, LinkProfile, ModelLayout, Workload
from .shortfall import infeasible, reserved, why_no_single

EXACT_DEVICES = 12
BEAM_WIDTHS = (512, 4096)  # labels per number of stages; the second run where the first cut off
MAX_DEVICES = 60  # considered at all, the fastest first; a set of devices is a 64-bit number
MAX_LABELS = 6_000_000  # made before an exact search is given up: about 5 s on one x86 core


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Pipelines that would run the model, and what they should do."""

    pipelines: tuple[Pipeline, ...]
    prediction: Prediction

    @property
    def stages(self) -> tuple[StagePlan, ...]:
        """The stages of all pipelines, one pipeline after the other."""
        return tuple(stage for pipeline in self.pipelines for stage in pipeline.stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """What there is to choose from."""

    points: tuple[Candidate, ...]  # none dominates another; by TTFT, then TPOT, then stages
    best_single: Candidate | None  # the one device that would answer soonest on its own
    no_single_because: str | None  # one line, where there is no such device
    exact: bool  # False: a bounded search; there may be better plans


def pareto_front(
    layout: ModelLayout,
    devices: Iterable[DeviceProfile],
    links: Iterable[LinkProfile],
    *,
    request: Workload | None = None,
    head: str | None = None,
    codec: str = "exact",
    index_pattern: str | None = None,
) -> Front:
    """Every plan that is not beaten in all of TTFT, TPOT and throughput.

    Args:
        layout: the model.
        devices: profiles for this model, at most one per peer.
        links: in any order and direction, see `Network`.
        request: what the plan is for; memory for it is a hard limit.
        head: peer that embeds and samples; the first stage's device if not given.
        codec: of every border between two devices.
        index_pattern: F or S per block, when top-k indices are shared between blocks.

    Raises:
        PlanInfeasible: no chain of linked devices holds the model.
        InvalidPlan: a profile is of another model, doubled, or missing for `head`.
    """
    request = request or Workload()
    border_bytes_per_token(layout, codec)  # refuses unknown codecs before any work is done
    if index_pattern is not None:
        check_index_pattern(index_pattern, layout.n_blocks)
    ordered, everyone = _considered(layout, devices, head)
    if not ordered:
        raise infeasible(layout, ordered, request, head)
    network = Network(links)
    instance = build_instance(
        layout,
        ordered,
        network,
        request=request,
        head=head,
        codec=codec,
        index_pattern=index_pattern,
    )
    search = LabelSearch(instance)
    widths = (*BEAM_WIDTHS, MAX_LABELS) if len(ordered) <= EXACT_DEVICES else BEAM_WIDTHS
    exact = any(search.run(width=width, max_labels=MAX_LABELS) for width in widths)
    by_peer = {device.peer_id: device for device in ordered}

    def candidate(stages: tuple[StagePlan, ...]) -> Candidate:
        codecs = (codec,) * (len(stages) + 1)
        pipeline = Pipeline.of(stages, codecs=codecs, index_pattern=index_pattern)
        terms = price(
            stages,
            layout,
            by_peer,
            network,
            request=request,
            head=head,
            codecs=codecs,
            index_pattern=index_pattern,
        )
        return Candidate(pipelines=(pipeline,), prediction=terms.prediction())

    found = [candidate(_stages_of(chain, ordered)) for _, chain in search.front]
    if not found:
        raise infeasible(layout, ordered, request, head)
    singles = [
        candidate((StagePlan.alone(device.peer_id, 0, layout.n_blocks),))
        for device in ordered
        if _holds_all(layout, device, request, head)
        and (head is None or device.peer_id == head or network.link(head, device.peer_id))
    ]
    return Front(
        points=_best(found),
        best_single=min(
            singles, key=lambda one: (reply_s(one.prediction), one.stages), default=None
        ),
        no_single_because=None if singles else why_no_single(layout, ordered, request, head),
        exact=exact and everyone,
    )


def _best(found: list[Candidate]) -> tuple[Candidate, ...]:
    """The front of `found`; of equal predictions the one with fewer stages, then peer ids."""
    found = sorted(found, key=lambda one: (one.prediction.objectives, len(one.stages), one.stages))
    return tuple(found[i] for i in front_of([one.prediction.objectives for one in found]))


def _considered(
    layout: ModelLayout, devices: Iterable[DeviceProfile], head: str | None
) -> tuple[list[DeviceProfile], bool]:
    """The devices in order of peer id, and whether these are all that were given."""
    given = list(devices)
    if len({device.peer_id for device in given}) != len(given):
        raise InvalidPlan("devices", "must have one profile per peer")
    if any(device.model_digest != layout.digest for device in given):
        raise InvalidPlan("devices", "must be profiles of the model to plan for")
    if head is not None and all(device.peer_id != head for device in given):
        raise InvalidPlan("head", f"{head} has no profile for this model")
    fastest = sorted(
        given, key=lambda one: (one.peer_id != head, one.decode_s_per_block, one.peer_id)
    )
    considered = sorted(fastest[:MAX_DEVICES], key=lambda one: one.peer_id)
    return considered, len(given) <= MAX_DEVICES


def _stages_of(chain: Chain, devices: Sequence[DeviceProfile]) -> tuple[StagePlan, ...]:
    starts = (0, *(end for _, end in chain))
    return tuple(
        StagePlan.alone(devices[device_idx].peer_id, start, end)
        for start, (device_idx, end) in zip(starts, chain, strict=False)
    )


def _holds_all(
    layout: ModelLayout, device: DeviceProfile, request: Workload, head: str | None
) -> bool:
    head_weights = reserved(layout, device, head)
    return span_ends(layout, device, request, reserved=head_weights)[0] == layout.n_blocks
