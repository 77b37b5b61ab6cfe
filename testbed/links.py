"""What a cable does to packets, as data, and the presets that labs call by name.

A figure is for one cable and one way. Two hosts that talk cross two cables, one up and one down:
each host's own, or its router's. How a link is made is the business of `testbed.cables`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One direction of a cable."""

    delay_ms: float = 0.0
    jitter_ms: float = 0.0  # standard deviation of the delay; packets keep their order
    loss: float = 0.0  # share of packets, 0 to 1
    mbit_per_s: float | None = None  # None: as fast as the machine can

    def __post_init__(self) -> None:
        if min(self.delay_ms, self.jitter_ms) < 0 or not 0 <= self.loss <= 1:
            raise ValueError(f"{self}: delays are not negative, loss is a share")
        if self.mbit_per_s is not None and self.mbit_per_s <= 0:
            raise ValueError(f"{self}: a rate is above 0")

    @property
    def needs_small_packets(self) -> bool:
        """Whether bundles of packets, which the kernel makes to save time, would show.

        Loss would take a bundle as one packet, and a slow link would send it as one burst.
        """
        return self.loss > 0 or (self.mbit_per_s is not None and self.mbit_per_s < 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Both directions of a cable, as its owner sees it: `up` is what it sends."""

    up: Way
    down: Way

    @property
    def rtt_ms(self) -> float:
        """What the cable adds to a round trip, on average."""
        return self.up.delay_ms + self.down.delay_ms

    def slower(self, *, delay_ms: float = 0.0, loss: float | None = None) -> Link:
        """The same with that much more delay each way, and perhaps another loss."""
        ways = [
            replace(way, delay_ms=way.delay_ms + delay_ms, loss=way.loss if loss is None else loss)
            for way in (self.up, self.down)
        ]
        return Link(up=ways[0], down=ways[1])


def both_ways(
    *,
    delay_ms: float = 0.0,
    jitter_ms: float = 0.0,
    loss: float = 0.0,
    mbit_per_s: float | None = None,
) -> Link:
    """A link that is the same up and down."""
    way = Way(delay_ms=delay_ms, jitter_ms=jitter_ms, loss=loss, mbit_per_s=mbit_per_s)
    return Link(up=way, down=way)


# Ordinary figures for what each is called, not measurements of one product.
PRESETS = MappingProxyType(
    {
        "ethernet": both_ways(delay_ms=0.1, mbit_per_s=1000),
        "good-wifi": both_ways(delay_ms=1.5, jitter_ms=0.5, mbit_per_s=200),
        "bad-wifi": both_ways(delay_ms=10, jitter_ms=5, loss=0.02, mbit_per_s=15),
        # Cable or DSL: a fifth of the rate upwards.
        "uplink": Link(
            up=Way(delay_ms=7, jitter_ms=0.5, mbit_per_s=20),
            down=Way(delay_ms=7, jitter_ms=0.5, mbit_per_s=100),
        ),
        "4g": Link(
            up=Way(delay_ms=25, jitter_ms=5, loss=0.001, mbit_per_s=10),
            down=Way(delay_ms=25, jitter_ms=5, loss=0.001, mbit_per_s=40),
        ),
        # Geostationary: 36,000 km up and as many down, each way.
        "satellite": Link(
            up=Way(delay_ms=280, jitter_ms=5, mbit_per_s=5),
            down=Way(delay_ms=280, jitter_ms=5, mbit_per_s=50),
        ),
        # arXiv:2410.00531: device, gateway, core, gateway, device are four links of 1 ms; a cable
        # here stands for two of them, so one way from host to host takes 4 ms.
        "tpi-llm": both_ways(delay_ms=2, mbit_per_s=300),
        # arXiv:2601.08025: 200 ms one way from host to host.
        "paretopipe": both_ways(delay_ms=100, mbit_per_s=5),
    }
)
