"""Why a device has no part in a plan: what keeps it out, or what it would cost to let it in.

Pure. What there is no profile of (a member that is away, or has no file of the model) is for the
node to say; this begins where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from covey.partition.choose import Prefer, cost
from covey.partition.codecs import codecs_for
from covey.partition.errors import PartitionError
from covey.partition.evaluate import World, evaluate, is_held
from covey.partition.front.search import Candidate
from covey.partition.memory import block_cap, kv_bytes_per_block
from covey.partition.network import Network
from covey.partition.plan import Pipeline, Span, StagePlan

Reason = Literal["used", "no_blocks", "memory", "no_link", "costs", "no_place"]
Names = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Why, in a word for programs and one or two sentences for people."""

    peer: str
    reason: Reason
    text: str
    with_it: Candidate | None = None  # the best plan found that has it, where there is one
    times_worse: float | None = None  # by the preference, than the plan without it

    def to_value(self) -> dict[str, Any]:
        """The same as JSON types, but for the plan."""
        return {
            "peer_id": self.peer,
            "reason": self.reason,
            "text": self.text,
            "times_worse": self.times_worse,
        }


def why_left_out(
    peer: str,
    chosen: Candidate,
    others: tuple[Candidate, ...],
    world: World,
    *,
    prefer: Prefer,
    names: Names | None = None,
) -> LeftOut:
    """Why `peer`, which has a profile in `world`, is not in `chosen`.

    Args:
        others: points of the front; those with the peer are the best there are.
    """
    called = (names or {}).get(peer, peer[-8:])
    stages = [stage for stage in chosen.stages if peer in stage.peers]
    if stages:
        span = stages[0].span
        text = f"{called} is not left out: it runs blocks {span.start} to {span.end - 1}"
        return LeftOut(peer=peer, reason="used", text=text)
    kept_out = _kept_out(peer, called, world)
    if kept_out is not None:
        return kept_out
    with_it = _best_with(peer, chosen, others, world, prefer)
    if with_it is None:
        text = f"no plan with {called} was found whose members have the memory and the links"
        return LeftOut(peer=peer, reason="no_place", text=text)
    worse = cost(with_it.prediction, prefer) / cost(chosen.prediction, prefer)
    return LeftOut(
        peer=peer,
        reason="costs",
        text=_cost_text(peer, called, chosen, with_it, world, prefer, worse, names or {}),
        with_it=with_it,
        times_worse=worse,
    )


def _kept_out(peer: str, called: str, world: World) -> LeftOut | None:
    device, layout = world.devices[peer], world.layout
    if block_cap(device) == 0:
        text = f"{called} takes no blocks: its owner set --max-blocks 0"
        return LeftOut(peer=peer, reason="no_blocks", text=text)
    needed = min(layout.block_bytes) + kv_bytes_per_block(layout, world.request)
    if device.memory_bytes < needed:
        text = (
            f"{called} has too little memory: one block with its KV cache takes "
            f"{needed / 1e6:.1f} MB, and it gives {device.memory_bytes / 1e6:.1f} MB"
        )
        return LeftOut(peer=peer, reason="memory", text=text)
    network = Network(world.links)
    others = [other for other in world.devices if other != peer]
    is_alone = not any(network.link(peer, other) for other in others)
    holds_all = _is_enough_alone(peer, world)
    if is_alone and others and not holds_all:
        text = f"no link between {called} and another device of this model has been measured"
        return LeftOut(peer=peer, reason="no_link", text=text)
    return None


def _is_enough_alone(peer: str, world: World) -> bool:
    with suppress(PartitionError):
        alone = Pipeline.of([StagePlan.alone(peer, 0, world.layout.n_blocks)])
        return is_held(evaluate([alone], world), world)
    return False


def _best_with(
    peer: str,
    chosen: Candidate,
    others: tuple[Candidate, ...],
    world: World,
    prefer: Prefer,
) -> Candidate | None:
    """The cheapest of the front's points with the peer and of the chosen plan with it put in."""
    found = [point for point in others if any(peer in stage.peers for stage in point.stages)]
    for pipelines in _put_in(peer, chosen, world):
        with suppress(PartitionError):
            made = evaluate(pipelines, world)
            if is_held(made, world):
                found.append(made)
    return min(found, key=lambda one: (cost(one.prediction, prefer), one.pipelines), default=None)


def _put_in(peer: str, chosen: Candidate, world: World) -> Iterator[tuple[Pipeline, ...]]:
    """Alone; as a replica beside the others; in place of a stage; or with some blocks of one."""
    network = Network(world.links)
    alone = Pipeline.of([StagePlan.alone(peer, 0, world.layout.n_blocks)])
    yield (alone,)
    if len(chosen.pipelines) < world.scope.max_pipelines:
        yield (*chosen.pipelines, alone)
    for idx, pipeline in enumerate(chosen.pipelines):
        for stages in _stages_with(peer, pipeline):
            hubs = [stage.hub for stage in stages]
            codecs = codecs_for(hubs, world.layout, network.link, world.request)
            with suppress(PartitionError):
                made = Pipeline.of(stages, codecs=codecs)
                yield (*chosen.pipelines[:idx], made, *chosen.pipelines[idx + 1 :])


def _stages_with(peer: str, pipeline: Pipeline) -> Iterator[tuple[StagePlan, ...]]:
    stages = pipeline.stages
    for idx, stage in enumerate(stages):
        before, after = stages[:idx], stages[idx + 1 :]
        start, end = stage.span.start, stage.span.end
        yield (*before, StagePlan.alone(peer, start, end), *after)
        for n_blocks in sorted({1, stage.span.n_blocks // 4, stage.span.n_blocks // 2}):
            if 0 < n_blocks < stage.span.n_blocks:
                cut = start + n_blocks
                yield (*before, StagePlan.alone(peer, start, cut), _from(stage, cut, end), *after)
                cut = end - n_blocks
                yield (*before, _from(stage, start, cut), StagePlan.alone(peer, cut, end), *after)


def _from(stage: StagePlan, start: int, end: int) -> StagePlan:
    return StagePlan(Span(start, end), stage.members, stage.hub_idx, stage.sum_codec)


def _cost_text(
    peer: str,
    called: str,
    chosen: Candidate,
    with_it: Candidate,
    world: World,
    prefer: Prefer,
    worse: float,
    names: Names,
) -> str:
    plan, now = with_it.prediction, chosen.prediction
    stages = " > ".join(
        f"{names.get(stage.hub, stage.hub[-8:])} {stage.span.start}-{stage.span.end}"
        for stage in with_it.stages
    )
    if worse <= 1.0:
        first = f"{called} is as good as what is chosen for {prefer}, which was found first"
    else:
        first = (
            f"with {called} the best plan found for {prefer} ({stages}) is {worse - 1:.0%} worse: "
            f"a token takes {_ms(plan.tpot_s)} instead of {_ms(now.tpot_s)}, the first "
            f"{_ms(plan.ttft_s)} instead of {_ms(now.ttft_s)}, all sessions get "
            f"{plan.throughput_tok_per_s:.3g} instead of {now.throughput_tok_per_s:.3g} tokens/s"
        )
    return f"{first}; {_what_it_costs(peer, called, chosen, world)}"


def _what_it_costs(peer: str, called: str, chosen: Candidate, world: World) -> str:
    """Where the time goes: its own pace against the plan's, and its fastest link."""
    own_s = world.devices[peer].decode_s_per_block
    used = [world.devices[member] for stage in chosen.stages for member in stage.peers]
    pace_s = sum(device.decode_s_per_block for device in used) / len(used)
    network = Network(world.links)
    links = [network.link(peer, device.peer_id) for device in used if device.peer_id != peer]
    rtts = [link.rtt_s for link in links if link is not None]
    pace = f"a block takes {called} {_ms(own_s)}, the plan's devices {_ms(pace_s)}"
    if not rtts:
        return f"{pace}, and no link to them has been measured"
    return f"{pace}, and a round trip to the nearest of them {_ms(min(rtts))}"


def _ms(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
