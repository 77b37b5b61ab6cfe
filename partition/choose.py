"""Which point of a front to take, and how two plans compare in one number.

One number per preference, in seconds, lower is better: `latency` is how long one session alone
waits for an ordinary reply, `throughput` how long the swarm takes for a token when it is full,
`balanced` the geometric mean of the two, so that a tenth less of either counts alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from .bounds import check_real
from .cost import predict_all, reply_s
from .errors import PartitionError
from .front.search import Candidate, Front
from .plan import MAX_FIGURE, LayerPlan, Prediction
from .profile import REPLY_TOKENS, DeviceProfile, LinkProfile, ModelLayout

Prefer = Literal["latency", "throughput", "balanced"]

SCORE_STEP = 1.05  # scores within 5 % are equal, so that noise in profiles decides nothing (D8)


def cost(prediction: Prediction, prefer: Prefer) -> float:
    """Seconds that stand for a whole prediction under a preference."""
    latency = reply_s(prediction) / REPLY_TOKENS
    full = 1.0 / prediction.throughput_tok_per_s
    if prefer == "latency":
        return latency
    if prefer == "throughput":
        return full
    return math.sqrt(latency * full)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What somebody asks of a plan; None asks nothing."""

    max_ttft_s: float | None = None
    min_throughput: float | None = None  # tokens per second, all sessions together

    def __post_init__(self) -> None:
        """Check every bound."""
        for field in ("max_ttft_s", "min_throughput"):
            if getattr(self, field) is not None:
                check_real(f"limits.{field}", getattr(self, field), 0.0, MAX_FIGURE)

    def excess(self, prediction: Prediction) -> float:
        """By which factor a prediction misses the limit that it misses most; 1 if it meets all."""
        worst = 1.0
        if self.max_ttft_s is not None and prediction.ttft_s > self.max_ttft_s:
            worst = _ratio(prediction.ttft_s, self.max_ttft_s)
        given = prediction.throughput_tok_per_s
        if self.min_throughput is not None and given < self.min_throughput:
            worst = max(worst, _ratio(self.min_throughput, given))
        return worst


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A point of a front, and what it does not do."""

    candidate: Candidate
    unmet: tuple[str, ...]  # a line for each limit that no point of the front meets with the others

    @property
    def is_met(self) -> bool:
        """Whether it is within all limits."""
        return not self.unmet


def choose(front: Front, prefer: Prefer = "balanced") -> Candidate:
    """The point of the front with the lowest cost; the same on every node.

    Of equal ones the first in the front's own order is taken.
    """
    return min(front.points, key=lambda point: cost(point.prediction, prefer))


def choose_within(front: Front, prefer: Prefer, limits: Limits) -> Choice:
    """The point of lowest cost among those within the limits.

    Where none is, the one that comes nearest, and in what it falls short.
    """
    best = min(
        front.points,
        key=lambda point: (limits.excess(point.prediction), cost(point.prediction, prefer)),
    )
    return Choice(candidate=best, unmet=_unmet(front, best.prediction, limits))


def _unmet(front: Front, best: Prediction, limits: Limits) -> tuple[str, ...]:
    lines = []
    if limits.max_ttft_s is not None and best.ttft_s > limits.max_ttft_s:
        soonest = min(point.prediction.ttft_s for point in front.points)
        lines.append(
            f"no plan within the limits begins to answer within {limits.max_ttft_s:.3g} s: "
            f"this one takes {best.ttft_s:.3g} s, the soonest {soonest:.3g} s"
        )
    if limits.min_throughput is not None and best.throughput_tok_per_s < limits.min_throughput:
        most = max(point.prediction.throughput_tok_per_s for point in front.points)
        lines.append(
            f"no plan within the limits does {limits.min_throughput:.3g} tokens/s: this one does "
            f"{best.throughput_tok_per_s:.3g}, the most is {most:.3g}"
        )
    return tuple(lines)


def _ratio(more: float, less: float) -> float:
    return more / less if less > 0.0 else math.inf


def priced(
    plan: LayerPlan,
    layout: ModelLayout,
    devices: Mapping[str, DeviceProfile],
    links: Iterable[LinkProfile],
) -> Prediction | None:
    """What a plan should do by the profiles of now; None if they do not say.

    None too for a plan whose blocks are not the model's.
    """
    try:
        return predict_all(
            plan.pipelines,
            layout,
            devices.values(),
            links,
            index_pattern=plan.index_pattern,
        )
    except PartitionError:
        return None


def score(
    plan: LayerPlan,
    layout: ModelLayout,
    devices: Iterable[DeviceProfile],
    links: Iterable[LinkProfile],
    prefer: Prefer = "balanced",
) -> float:
    """A plan's cost for the default `Workload`, on a logarithmic grid of 5 %; lower is better.

    Computed by each reader from the published profiles and never from what a proposer claims.
    Infinite, so worst, for a plan that they cannot price.
    """
    prediction = priced(plan, layout, {device.peer_id: device for device in devices}, links)
    if prediction is None:
        return math.inf
    return rounded(cost(prediction, prefer))


def rounded(seconds: float) -> float:
    """The nearest power of `SCORE_STEP`."""
    return SCORE_STEP ** round(math.log(seconds) / math.log(SCORE_STEP))
