"""Which point of a front to take, and how two plans compare in one number.

One number per preference, in seconds, lower is better: `latency` is how long one session alone
waits for an ordinary reply, `throughput` how long the swarm takes for a token when it is full,
`balanced` the geometric mean of the two, so that a tenth less of either counts alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from .cost import predict_all, reply_s
from .errors import PartitionError
from .plan import LayerPlan, Prediction
from .profile import REPLY_TOKENS, DeviceProfile, LinkProfile, ModelLayout
from .search import Candidate, Front

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


def choose(front: Front, prefer: Prefer = "balanced") -> Candidate:
    """The point of the front with the lowest cost; the same on every node.

    Of equal ones the first in the front's own order is taken.
    """
    return min(front.points, key=lambda point: cost(point.prediction, prefer))


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
