"""Which codec a border's hidden states cross a link in: a pure rule, the same on every member.

A lossy codec has to earn its loss. Each has a price per token, in seconds; what it costs to run is
in it. The codec with the least wire time plus price is chosen, so that fast links stay `exact` and
each slower one loses no more than pays. Two things keep a link that hovers around a threshold from
changing its codec again and again: its bandwidth counts in coarse steps, and a codec in use is left
only where another is better by a margin. Knows no encoding; sizes are those of
`plan.border_bytes_per_token`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .plan import CODECS, border_bytes_per_token
from .profile import LinkProfile, ModelLayout, Workload

#: Finds the link that carries bytes from one peer to another, as `cost.Network.link` does.
FindLink = Callable[[str, str], LinkProfile | None]

REPLY_TOKENS = 128  # that follow a prompt, each a message of its own
MARGIN = 0.5  # of the difference in price: what a change must gain


@dataclass(frozen=True, slots=True)
class _Price:
    loss_s: float  # per token: what has to be saved to make up for the loss
    message_s: float  # per message: encoding and decoding, on a slow device


# Measured losses on SmolLM2 in benchmarks/bench_codecs.py; the times are those of a small board.
_PRICES = {
    "exact": _Price(0.0, 0.0),
    "fp16": _Price(0.2e-3, 10e-6),
    "int8": _Price(0.5e-3, 100e-6),
    "int4": _Price(4e-3, 400e-6),
}


def codec_for(
    layout: ModelLayout, link: LinkProfile | None, request: Workload, *, current: str | None = None
) -> str:
    """The codec of a border that crosses `link`; `exact` where there is none to cross.

    Args:
        layout: of the model; its border is `exact` at `wire_bytes_per_token`.
        link: towards the receiver.
        request: whose prompt and reply cross the border.
        current: the codec in use, if any; it stays unless another is better by a margin.
    """
    if link is None:
        return "exact"
    bytes_per_s = coarse(link.bandwidth_bytes_per_s)
    n_tokens = request.prompt_tokens + REPLY_TOKENS
    messages_per_token = (request.n_chunks + REPLY_TOKENS) / n_tokens
    prices = {
        codec: price.loss_s + price.message_s * messages_per_token
        for codec, price in _PRICES.items()
    }
    costs = {
        codec: border_bytes_per_token(layout, codec) / bytes_per_s + prices[codec]
        for codec in CODECS
    }
    best = min(CODECS, key=lambda codec: costs[codec])  # of equals the one that loses less
    if current is None or current == best:
        return best
    gain = costs[current] - costs[best]
    return best if gain > MARGIN * abs(prices[current] - prices[best]) else current


def codecs_for(
    stages: Sequence[str],
    layout: ModelLayout,
    find_link: FindLink,
    request: Workload,
    *,
    head: str | None = None,
    current: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """One codec per border of a chain whose hubs are `stages`; the head is the first by default."""
    head = stages[0] if head is None else head
    hops = list(pairwise([head, *stages, head]))
    in_use: Sequence[str | None] = [None] * len(hops) if current is None else current
    return tuple(
        codec_for(
            layout,
            None if sender == receiver else find_link(sender, receiver),
            request,
            current=codec,
        )
        for (sender, receiver), codec in zip(hops, in_use, strict=True)
    )


def coarse(bytes_per_s: float) -> float:
    """A bandwidth on a grid of two steps per octave (1 and 1.5 times powers of two), rounded down.

    By the bits of the float, so that every machine rounds alike.
    """
    mantissa, exponent = math.frexp(bytes_per_s)
    return math.ldexp(0.5 if mantissa < 0.75 else 0.75, exponent)
