"""Every plan there is for a small question, priced one by one: what a search is held against.

Shares nothing with the search but the cost model. Every order of units that share no device (one
alone, or up to four with any of them as the hub and the shares of `group_term`), cut everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, permutations, product
from random import Random

from covey.partition.codecs import codecs_for
from covey.partition.cost import Network, Terms, held_bytes, joint_prediction, misfits, price
from covey.partition.errors import PlanInfeasible
from covey.partition.front.search import Front, pareto_front
from covey.partition.group import group_term
from covey.partition.plan import Member, Span, StagePlan
from covey.partition.profile import DeviceProfile, LinkProfile, ModelLayout, Workload
from covey.partition.scope import Scope

MAX_MEMBERS = 4

Objectives = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a plan is asked for."""

    layout: ModelLayout
    devices: tuple[DeviceProfile, ...]
    links: tuple[LinkProfile, ...]
    request: Workload
    head: str | None = None
    index_pattern: str | None = None

    def front(self, scope: Scope) -> Front:
        """The search's answer."""
        return pareto_front(
            self.layout,
            self.devices,
            self.links,
            request=self.request,
            head=self.head,
            index_pattern=self.index_pattern,
            scope=scope,
        )


@dataclass(frozen=True, slots=True)
class _Unit:
    members: tuple[Member, ...]
    hub_idx: int

    @property
    def peers(self) -> frozenset[str]:
        return frozenset(member.peer_id for member in self.members)

    def stage(self, start: int, end: int) -> StagePlan:
        return StagePlan(Span(start, end), self.members, self.hub_idx)


def every_pipeline(question: Question) -> Iterator[tuple[StagePlan, ...]]:
    """All of them, those that do not fit among them."""
    n_blocks, units = question.layout.n_blocks, _units(question)
    for n_stages in range(1, min(len(question.devices), n_blocks) + 1):
        for order in permutations(units, n_stages):
            peers = [peer for unit in order for peer in unit.peers]
            if len(set(peers)) != len(peers):
                continue
            for cuts in combinations(range(1, n_blocks), n_stages - 1):
                spans = zip(order, (0, *cuts), (*cuts, n_blocks), strict=True)
                yield tuple(unit.stage(start, end) for unit, start, end in spans)


def brute_force(question: Question, *, may_stream: bool = False) -> list[Objectives]:
    """What the pipelines that fit do, but for those that another beats; sorted.

    With `may_stream`, where none fits, those that do with the fewest blocks on disk.
    """
    found = _all_that_fit(question, streams=False)
    if not found and may_stream:
        found = _all_that_fit(question, streams=True)
    return sorted(point for point in found if not any(_beats(other, point) for other in found))


def side_by_side(question: Question, *, max_pipelines: int = 4) -> list[Objectives]:
    """What pipelines that share no device do together: all of them that are worth having alone with
    the devices that they have, in all ways. Without a head of its own and without disks."""
    by_peers: dict[frozenset[str], list[Terms]] = {}
    for terms in _fitting(question, streams=False):
        peers = frozenset(peer for stage in terms.stages for peer in stage.peers)
        by_peers.setdefault(peers, []).append(terms)
    parts = {peers: _worth_having(found) for peers, found in by_peers.items()}
    found: set[Objectives] = set()
    for n_pipelines in range(1, max_pipelines + 1):
        for sets in combinations(sorted(parts, key=sorted), n_pipelines):
            if len(frozenset().union(*sets)) == sum(map(len, sets)):
                for together in product(*(parts[peers] for peers in sets)):
                    found.add(joint_prediction(together).objectives)
    return sorted(point for point in found if not any(_beats(other, point) for other in found))


def _worth_having(found: list[Terms]) -> list[Terms]:
    points = {id(terms): terms.prediction().objectives for terms in found}
    return [
        terms
        for terms in found
        if not any(_beats(points[id(other)], points[id(terms)]) for other in found)
    ]


def _all_that_fit(question: Question, *, streams: bool) -> set[Objectives]:
    return {terms.prediction().objectives for terms in _fitting(question, streams=streams)}


def _fitting(question: Question, *, streams: bool) -> Iterator[Terms]:
    devices = {one.peer_id: one for one in question.devices}
    network = Network(question.links)
    for pipeline in every_pipeline(question):
        stages = _streaming(pipeline, question, devices) if streams else pipeline
        hubs = [stage.hub for stage in stages]
        codecs = codecs_for(
            hubs, question.layout, network.link, question.request, head=question.head
        )
        try:
            terms = price(
                stages,
                question.layout,
                devices,
                network,
                request=question.request,
                head=question.head,
                codecs=codecs,
                index_pattern=question.index_pattern,
            )
        except PlanInfeasible:
            continue
        if not misfits(terms, devices):
            yield terms


def _streaming(
    stages: tuple[StagePlan, ...], question: Question, devices: dict[str, DeviceProfile]
) -> tuple[StagePlan, ...]:
    """The stages with as many blocks of each member on disk as it needs, or all."""
    head = question.head or stages[0].hub
    made = []
    for stage in stages:
        members = list(stage.members)
        for idx, member in enumerate(stage.members):
            for n_blocks in range(stage.span.n_blocks + 1):
                members[idx] = replace(member, streamed_blocks=n_blocks)
                tried = replace(stage, members=tuple(members))
                n_bytes = held_bytes(
                    question.layout, tried, idx, question.request, is_head=member.peer_id == head
                )
                if n_bytes <= devices[member.peer_id].memory_bytes:
                    break
        made.append(replace(stage, members=tuple(members)))
    return tuple(made)


def _beats(one: Objectives, other: Objectives) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _units(question: Question) -> list[_Unit]:
    units = [_Unit((Member(one.peer_id),), 0) for one in question.devices]
    network = Network(question.links)
    for n_members in range(2, MAX_MEMBERS + 1):
        for chosen in combinations(
            sorted(question.devices, key=lambda one: one.peer_id), n_members
        ):
            for hub in chosen:
                term = group_term(
                    question.layout, chosen, network, question.request, hub=hub.peer_id
                )
                if term is not None:
                    units.append(_Unit(term.members, term.hub_idx))
    return units


def random_question(seed: int, *, max_devices: int = 4, max_blocks: int = 8) -> Question:
    """A small question of any kind: scarce memory or plenty, few distinct figures (so that ties
    are common) or none alike, fast links and slow ones, missing ones too."""
    random = Random(seed)  # noqa: S311 - a question to test with
    n_blocks = random.randint(1, max_blocks)
    peers = "abcdefgh"[: random.randint(1, max_devices)]
    model = _random_layout(random, n_blocks)
    devices = tuple(_random_device(random, peer, model, n_blocks) for peer in peers)
    share = random.choice([0.6, 1.0])
    is_fast = random.random() < 0.5
    links = tuple(
        LinkProfile(
            a=a,
            b=b,
            rtt_s=random.choice([0.0, 1e-4, 1e-3, random.uniform(0, 5e-3)])
            if is_fast
            else random.uniform(0, 0.05),
            bandwidth_bytes_per_s=10 ** random.uniform(6, 9)
            if is_fast
            else 10 ** random.uniform(4, 7),
            loss=random.choice([0.0, 0.0, 0.02]),
        )
        for a, b in permutations(peers, 2)
        if random.random() < share
    )
    pattern = None
    if random.random() < 0.25:
        pattern = "F" + "".join(random.choice("FS") for _ in range(n_blocks - 1))
    return Question(
        layout=model,
        devices=devices,
        links=links,
        request=Workload(
            prompt_tokens=random.choice([1, 100, 300, 2000]),
            context_tokens=10,
            n_sessions=random.choice([1, 2, 4, 5, 8, 64]),
        ),
        head=random.choice([None, None, *peers]),
        index_pattern=pattern,
    )


def _random_layout(random: Random, n_blocks: int) -> ModelLayout:
    is_even = random.random() < 0.6
    return ModelLayout(
        digest="model",
        n_blocks=n_blocks,
        hidden_size=512,
        block_bytes=(100,) * n_blocks
        if is_even
        else tuple(random.randint(50, 150) for _ in range(n_blocks)),
        embedding_bytes=random.choice([0, 300]),
        head_bytes=0,
        kv_bytes_per_token_per_block=random.choice([0, 2]),
        wire_bytes_per_token=2048,
        n_kv_heads=random.choice([0, 3, 4, 8]),
        mlp_columns=random.choice([512, 1536]),
        attention_share=random.uniform(0.1, 0.4),
        index_bytes_per_token=700,
    )


def _random_device(random: Random, peer: str, layout: ModelLayout, n_blocks: int) -> DeviceProfile:
    def seconds() -> float:
        return random.choice([0.001, 0.002, 0.0035, 0.01, random.uniform(0.001, 0.03)])

    decode_s, has_batches = seconds(), random.random() < 0.6
    token_s = decode_s * random.uniform(0.1, 0.6)
    head_s = seconds()
    return DeviceProfile(
        peer_id=peer,
        model_digest=layout.digest,
        engine="native",
        decode_s_per_block=decode_s,
        prefill_s_per_token_per_block=token_s,
        head_s=head_s,
        memory_bytes=random.choice([random.randint(50, 3000), 10_000, 10_000]),
        disk_bytes_per_s=10 ** random.uniform(3, 6),
        max_blocks=random.choice([None, None, None, random.randint(0, n_blocks)]),
        batch_decode_s_per_block=tuple(decode_s + n * token_s for n in (1, 3, 7))
        if has_batches
        else (),
        batch_head_s=tuple(head_s * n for n in (1.2, 1.9, 3.1)) if has_batches else (),
        depth_s_per_block=random.choice([0.0, decode_s / 1000]),
        step_s=random.choice([0.0, 0.0005]),
        split_s_per_block=random.choice([0.0, 0.0001]),
    )
