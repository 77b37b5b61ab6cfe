"""Why a plan is as fast as it is, how it compares with one machine, and why it was chosen or not.

Short plain sentences and a JSON value with the same facts, for `covey plan`. Promise 3 is kept
here: a plan that is worse than the best single device in anything says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from covey.partition.choose import Prefer, choose, cost
from covey.partition.cost import Network, StageTerm, Terms, price_all, reply_s, shared_sessions
from covey.partition.evaluate import World
from covey.partition.front.search import Candidate, Front
from covey.partition.plan import Prediction
from covey.partition.profile import REPLY_TOKENS

NOTABLE = 0.02  # smaller differences are called equal; profiles are no better than this

BoundKind = Literal["device", "link", "disk", "sessions"]

Names = Mapping[str, str]  # peer id -> what people call the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The part of a plan that limits one objective."""

    objective: Literal["tpot", "throughput"]
    kind: BoundKind
    peers: tuple[str, ...]  # the device or group, hub first; sender and receiver; or every stage
    seconds: float  # per token
    share: float  # of the TPOT, or of the time per token at full throughput
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A plan against the best single device, as ratios; above 1 the plan is better."""

    single: str  # peer id
    ttft: float
    tpot: float
    throughput: float
    worse_in: tuple[str, ...]  # of ttft, tpot, throughput; by more than `NOTABLE`
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Everything there is to say about one candidate."""

    bounds: tuple[Bound, ...]
    comparison: Comparison | None  # None: no single device holds the model
    is_chosen: bool
    verdict: str  # one line

    @property
    def lines(self) -> tuple[str, ...]:
        """The sentences in the order to print them."""
        comparison = (self.comparison.text,) if self.comparison else ()
        return (self.verdict, *(bound.text for bound in self.bounds), *comparison)

    def to_value(self) -> dict[str, Any]:
        """The same as JSON types."""
        return asdict(self)


def explain(
    candidate: Candidate,
    front: Front,
    world: World,
    *,
    prefer: Prefer,
    chosen: Candidate | None = None,
    names: Names | None = None,
) -> Explanation:
    """Explain `candidate`, a point or the best single of the `front` that `world` leads to.

    Args:
        chosen: what is taken; by default what `prefer` takes of the front.

    Raises:
        PartitionError: the candidate cannot be priced with these profiles.
    """
    names = names or {}
    terms = price_all(
        candidate.pipelines,
        world.layout,
        world.devices,
        Network(world.links),
        request=world.request,
    )
    chosen = chosen or choose(front, prefer)
    return Explanation(
        bounds=(_tpot_bound(min(terms, key=reply_s), names), _throughput_bound(terms, names)),
        comparison=compare(candidate, front.best_single, names=names),
        is_chosen=candidate.pipelines == chosen.pipelines,
        verdict=verdict(candidate, chosen, prefer),
    )


def compare(
    candidate: Candidate, single: Candidate | None, *, names: Names | None = None
) -> Comparison | None:
    """`candidate` against the best single device, if there is one."""
    if single is None:
        return None
    plan, alone = candidate.prediction, single.prediction
    ratios = {
        "ttft": alone.ttft_s / plan.ttft_s,
        "tpot": alone.tpot_s / plan.tpot_s,
        "throughput": plan.throughput_tok_per_s / alone.throughput_tok_per_s,
    }
    peer_id = single.stages[0].hub
    return Comparison(
        single=peer_id,
        **ratios,
        worse_in=tuple(name for name, ratio in ratios.items() if ratio < 1 - NOTABLE),
        text=_comparison_text(
            ratios, _name(peer_id, names or {}), candidate.pipelines == single.pipelines
        ),
    )


def verdict(candidate: Candidate, chosen: Candidate, prefer: Prefer) -> str:
    """One line on why `candidate` is or is not the choice for `prefer`."""
    if candidate.pipelines == chosen.pipelines:
        return f"chosen for {prefer}: {_figure_text(chosen.prediction, prefer)}"
    worse = cost(candidate.prediction, prefer) / cost(chosen.prediction, prefer) - 1
    what = _figure_text(candidate.prediction, prefer)
    return f"not chosen for {prefer}: {what}, {worse:.0%} worse than the choice"


def _figure_text(prediction: Prediction, prefer: Prefer) -> str:
    value = cost(prediction, prefer)
    if prefer == "latency":
        return f"a reply of {REPLY_TOKENS} tokens takes {_seconds(value * REPLY_TOKENS)}"
    if prefer == "throughput":
        return f"{prediction.throughput_tok_per_s:.3g} tokens/s for all sessions"
    return f"{_seconds(value)} as the mean of a token alone and one of all sessions"


def _tpot_bound(terms: Terms, names: Names) -> Bound:
    parts = [part for stage in terms.stages for part in _stage_parts(stage, names)]
    parts.append(
        (terms.head_s, "device", (terms.head,), f"{_name(terms.head, names)} computes the logits")
    )
    parts += [
        (
            border.decode_s,
            "link",
            (border.sender, border.receiver),
            f"the {border.kind} link {_pair(border.sender, border.receiver, names)} carries it",
        )
        for border in terms.borders
        if border.kind
    ]
    seconds, kind, peers, text = max(parts, key=lambda part: part[0])
    return Bound(
        objective="tpot",
        kind=kind,
        peers=peers,
        seconds=seconds,
        share=seconds / terms.tpot_s,
        text=f"most of a token's {_seconds(terms.tpot_s)}: {text} in {_seconds(seconds)}",
    )


def _stage_parts(
    stage: StageTerm, names: Names
) -> list[tuple[float, BoundKind, tuple[str, ...], str]]:
    """What a stage's time goes into: compute, partial sums on their way, waiting for a disk."""
    blocks = f"blocks {stage.span.start} to {stage.span.end - 1}"
    who = " and ".join(_name(peer, names) for peer in stage.hub_first)
    computes = "computes" if len(stage.peers) == 1 else "compute"
    computed_s = stage.decode_s - stage.sums_s - stage.stall_s
    parts: list[tuple[float, BoundKind, tuple[str, ...], str]] = [
        (computed_s, "device", stage.hub_first, f"{who} {computes} {blocks}")
    ]
    if len(stage.peers) > 1:
        text = f"the links between {who} carry the partial sums of {blocks}"
        parts.append((stage.sums_s, "link", stage.hub_first, text))
    if stage.stall_s > 0:
        text = f"{who} waits for the weights of {blocks} to come from disk"
        parts.append((stage.stall_s, "disk", stage.hub_first, text))
    return parts


def _throughput_bound(pipelines: Sequence[Terms], names: Names) -> Bound:
    """What limits all sessions together; of several pipelines, what limits the fastest."""
    counts = shared_sessions(pipelines, pipelines[0].n_sessions)
    terms, n_sessions = max(
        zip(pipelines, counts, strict=True), key=lambda pair: pair[0].throughput(pair[1])
    )
    busiest = max(replace(terms, n_sessions=n_sessions).busy(), key=lambda busy: busy.seconds)
    if busiest.kind == "sessions":
        text = f"throughput is limited by {n_sessions} sessions in flight; more would add"
    elif busiest.kind == "link":
        sender, receiver = busiest.peers
        text = f"throughput is limited by the bandwidth {_pair(sender, receiver, names)}"
    else:
        who = " and ".join(_name(peer, names) for peer in busiest.peers)
        text = f"throughput is limited by {who}"
    return Bound(
        objective="throughput",
        kind=busiest.kind,
        peers=busiest.peers,
        seconds=busiest.seconds,
        share=1.0,
        text=f"{text}, {_seconds(busiest.seconds)} per token",
    )


def _comparison_text(ratios: Mapping[str, float], single: str, is_single: bool) -> str:
    if is_single:
        return f"this is the best single machine, {single}"
    words = {"ttft": "first token", "tpot": "each token", "throughput": "all sessions together"}
    better = [f"{words[name]} {ratio:.2f}x as fast" for name, ratio in ratios.items()]
    worse = [words[name] for name, ratio in ratios.items() if ratio < 1 - NOTABLE]
    warning = f"; WORSE in {' and '.join(worse)}" if worse else ""
    return f"against {single} alone: {', '.join(better)}{warning}"


def _pair(sender: str, receiver: str, names: Names) -> str:
    return f"from {_name(sender, names)} to {_name(receiver, names)}"


def _name(peer_id: str, names: Names) -> str:
    return names.get(peer_id, peer_id[-8:])


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
