"""The Pareto front of one model over the devices at hand: which of them, which spans, what order.

Exact for households (up to `EXACT_DEVICES` devices), see `exact`; beyond, or when a question proves
too hard, a bounded search, and `Front.gap` says how much better a plan could be at most. Effort is
counted in what is looked at and never in seconds, and devices are taken in order of peer id, so
that every member gets the same front from the same profiles, in whatever order they arrived.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from covey.partition.advice.shortfall import infeasible, why_no_single
from covey.partition.codecs import codecs_for
from covey.partition.cost import Network, Terms, joint_prediction, price, reply_s
from covey.partition.errors import InvalidPlan
from covey.partition.plan import Member, Pipeline, Prediction, Span, StagePlan, check_index_pattern
from covey.partition.profile import DeviceProfile, LinkProfile, ModelLayout, Workload
from covey.partition.scope import Scope

from .bounded import search_bounded
from .chains import Chain, Found
from .dominance import front_of
from .exact import search_exact
from .instance import Instance, build_instance
from .relaxation import relative_gap
from .replicas import side_by_side
from .rooms import Resident, Streaming

EXACT_DEVICES = 12
MAX_DEVICES = 64  # considered at all, the fastest first; a set of devices is a 64-bit number
MAX_EFFORT = 20_000_000  # boxes and labels before an exact search is given up: some 20 s


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
    #: How much less, as a share, the best balanced cost could be at most: of any plan of the
    #: devices and groups that were looked at, which is all where the front is exact.
    gap: float = 0.0


def pareto_front(
    layout: ModelLayout,
    devices: Iterable[DeviceProfile],
    links: Iterable[LinkProfile],
    *,
    request: Workload | None = None,
    head: str | None = None,
    index_pattern: str | None = None,
    scope: Scope | None = None,
) -> Front:
    """Every plan that is not beaten in all of TTFT, TPOT and throughput.

    Args:
        layout: the model.
        devices: profiles for this model, at most one per peer.
        links: in any order and direction, see `Network`; each border gets its link's codec.
        request: what the plan is for; memory for it is a hard limit.
        head: peer that embeds and samples; the first stage's hub if not given.
        index_pattern: F or S per block, when top-k indices are shared between blocks.
        scope: what plans may be made of.

    Raises:
        PlanInfeasible: no chain of linked devices holds the model.
        InvalidPlan: a profile is of another model, doubled, or missing for `head`.
    """
    request, scope = request or Workload(), scope or Scope()
    if index_pattern is not None:
        check_index_pattern(index_pattern, layout.n_blocks)
    ordered, everyone = _considered(layout, devices, head)
    if not ordered:
        raise infeasible(layout, ordered, request, head, may_stream=scope.may_stream)
    question = _Question(layout, ordered, Network(links), request, head, index_pattern)
    instance, found, exact = question.searched(scope)
    if not found.front:
        raise infeasible(layout, ordered, request, head, may_stream=scope.may_stream)
    points = question.points(instance, found, scope)
    singles = question.singles(streams=instance.read_s is not None)
    return Front(
        points=_best(points),
        best_single=min(
            singles, key=lambda one: (reply_s(one.prediction), one.stages), default=None
        ),
        no_single_because=None if singles else why_no_single(layout, ordered, request, head),
        exact=exact and everyone and instance.has_all_groups,
        gap=0.0 if exact else relative_gap(instance, found),
    )


def _search(instance: Instance, found: Found) -> bool:
    """Fill `found`; whether all of the front is in it."""
    if not instance.units:
        return False
    is_small = instance.n_devices <= EXACT_DEVICES
    if is_small and search_exact(instance, found, max_effort=MAX_EFFORT):
        return True
    search_bounded(instance, found)
    return False


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked, with the devices in order."""

    layout: ModelLayout
    devices: Sequence[DeviceProfile]
    network: Network
    request: Workload
    head: str | None
    index_pattern: str | None

    def points(self, instance: Instance, found: Found, scope: Scope) -> list[Candidate]:
        """The pipelines that were found, and those that may do more side by side."""
        chains = [chain for _, chain in found.front]
        together: list[tuple[Chain, ...]] = [(chain,) for chain in chains]
        if self.head is None and instance.read_s is None:
            sets = side_by_side(instance, chains, max_pipelines=scope.max_pipelines)
            together += dict.fromkeys(tuple(sorted(each)) for each in sets if each)
        priced = {
            chain: self.priced(self.stages_of(chain, instance))
            for chain in dict.fromkeys(chain for each in together for chain in each)
        }
        return [_candidate([priced[chain] for chain in each]) for each in together]

    def priced(self, stages: tuple[StagePlan, ...]) -> tuple[Pipeline, Terms]:
        """The pipeline of some stages, in the codecs of its links, and what it costs."""
        codecs = codecs_for(
            [stage.hub for stage in stages],
            self.layout,
            self.network.link,
            self.request,
            head=self.head,
        )
        terms = price(
            stages,
            self.layout,
            {device.peer_id: device for device in self.devices},
            self.network,
            request=self.request,
            head=self.head,
            codecs=codecs,
            index_pattern=self.index_pattern,
        )
        return Pipeline.of(stages, codecs=codecs, index_pattern=self.index_pattern), terms

    def searched(self, scope: Scope) -> tuple[Instance, Found, bool]:
        """Everything in memory; or, where no plan is that way, with what must from disk."""
        instance, found, exact = self._searched(scope, streams=False)
        if not found.front and scope.may_stream:
            return self._searched(scope, streams=True)
        return instance, found, exact

    def _searched(self, scope: Scope, *, streams: bool) -> tuple[Instance, Found, bool]:
        instance = build_instance(
            self.layout,
            self.devices,
            self.network,
            request=self.request,
            head=self.head,
            index_pattern=self.index_pattern,
            max_members=scope.max_members,
            streams=streams,
        )
        found = Found(instance)
        return instance, found, _search(instance, found)

    def stages_of(self, chain: Chain, instance: Instance) -> tuple[StagePlan, ...]:
        """A chain with its members, their shares, and how much of them streams."""
        stages, start = [], 0
        head = self.devices[chain.head].peer_id
        streaming = (
            Streaming(self.layout, self.request, head) if instance.read_s is not None else None
        )
        for number, n_blocks in zip(chain.units, chain.n_blocks, strict=True):
            unit, span = instance.units[number], Span(start, start + n_blocks)
            streamed = None
            if streaming is not None:
                devices = [self.devices[idx] for idx in unit.devices]
                streamed = streaming.streamed(unit.members, devices, span)
            stages.append(unit.stage(span, streamed))
            start = span.end
        return tuple(stages)

    def singles(self, *, streams: bool) -> list[Candidate]:
        """Each device that can run the model on its own."""
        rooms = (Streaming if streams else Resident)(self.layout, self.request, self.head)
        found = []
        for device in self.devices:
            members, whole = (Member(device.peer_id),), Span(0, self.layout.n_blocks)
            is_linked = self.head in (None, device.peer_id) or self.network.link(
                self.head or "", device.peer_id
            )
            if is_linked and rooms.of(members, [device], 0).head_ends[0] == whole.end:
                streamed: tuple[int, ...] = (0,)
                if streams:
                    streaming = Streaming(self.layout, self.request, self.head or device.peer_id)
                    streamed = streaming.streamed(members, [device], whole)
                alone = StagePlan.alone(device.peer_id, 0, whole.end, streamed_blocks=streamed[0])
                found.append(_candidate([self.priced((alone,))]))
        return found


def _candidate(priced: Sequence[tuple[Pipeline, Terms]]) -> Candidate:
    """Pipelines side by side, the one that answers soonest first."""
    ordered = sorted(priced, key=lambda one: (reply_s(one[1]), one[0]))
    return Candidate(
        pipelines=tuple(pipeline for pipeline, _ in ordered),
        prediction=joint_prediction([terms for _, terms in ordered]),
    )


def _best(found: list[Candidate]) -> tuple[Candidate, ...]:
    """The front of `found`; of equal predictions the one with fewer pipelines, then stages, then by
    peer ids."""
    found = sorted(
        found,
        key=lambda one: (
            one.prediction.objectives,
            len(one.pipelines),
            len(one.stages),
            one.pipelines,
        ),
    )
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
