"""Devices and links that nobody measured: what a kind of them usually does.

For questions of "what if" only; nothing that runs is ever planned with these.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from covey.partition.network import Network
from covey.partition.profile import (
    BATCHES,
    MAX_SECONDS,
    MIN_SECONDS,
    DeviceProfile,
    LinkProfile,
    ModelLayout,
)

GIB = 1 << 30
USABLE_MEMORY = 0.75  # of a machine's; the rest is its system's
CHUNKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceClass:
    """A kind of computer, by what it does with weights in four bits on its CPU."""

    decode_bytes_per_s: float  # weights read for one token: model bytes x tokens/s
    prefill_bytes_per_s: float  # the same of a prompt: model bytes x prompt tokens/s
    memory_bytes: int
    disk_bytes_per_s: float
    n_cores: int = 4


# Model bytes x tokens/s of llama.cpp on the CPU. pi5: Llama 3.2 3B at 4.7 tokens/s
# (geerlingguy/ai-benchmarks issue 7), prompts of Llama 2 7B at 8.1 (llama.cpp pull request 6928);
# pi4: Qwen 1.8B at 3.1 (aidatatools/ollama-benchmark pull request 9); m1: Llama 2 7B at 14
# (llama.cpp discussion 4167). The others follow from the bandwidth of their memory, at two thirds.
DEVICE_CLASSES = MappingProxyType(
    {
        "pi4": DeviceClass(
            decode_bytes_per_s=3.5e9,
            prefill_bytes_per_s=10e9,
            memory_bytes=4 * GIB,
            disk_bytes_per_s=40e6,
        ),
        "pi5": DeviceClass(
            decode_bytes_per_s=9.5e9,
            prefill_bytes_per_s=31e9,
            memory_bytes=8 * GIB,
            disk_bytes_per_s=90e6,
        ),
        "minipc": DeviceClass(  # Intel N100, one channel of DDR5
            decode_bytes_per_s=22e9,
            prefill_bytes_per_s=90e9,
            memory_bytes=16 * GIB,
            disk_bytes_per_s=1.5e9,
        ),
        "laptop": DeviceClass(  # two channels of DDR4
            decode_bytes_per_s=32e9,
            prefill_bytes_per_s=200e9,
            memory_bytes=16 * GIB,
            disk_bytes_per_s=2e9,
            n_cores=8,
        ),
        "m1": DeviceClass(
            decode_bytes_per_s=54e9,
            prefill_bytes_per_s=250e9,
            memory_bytes=8 * GIB,
            disk_bytes_per_s=2.5e9,
            n_cores=8,
        ),
        "desktop": DeviceClass(  # two channels of DDR5
            decode_bytes_per_s=55e9,
            prefill_bytes_per_s=500e9,
            memory_bytes=32 * GIB,
            disk_bytes_per_s=3e9,
            n_cores=12,
        ),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkClass:
    """A kind of link between two hosts, the same both ways."""

    rtt_s: float
    bandwidth_bytes_per_s: float
    loss: float = 0.0

    def between(self, a: str, b: str) -> tuple[LinkProfile, LinkProfile]:
        """Both directions of it."""
        return tuple(
            LinkProfile(
                a=one,
                b=other,
                rtt_s=self.rtt_s,
                bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
                loss=self.loss,
            )
            for one, other in ((a, b), (b, a))
        )  # type: ignore[return-value]


# Ordinary figures from host to host, each on a link of its own to the router.
LINK_CLASSES = MappingProxyType(
    {
        "lan": LinkClass(rtt_s=0.5e-3, bandwidth_bytes_per_s=115e6),  # gigabit Ethernet
        "wifi": LinkClass(rtt_s=6e-3, bandwidth_bytes_per_s=20e6),
        "bad-wifi": LinkClass(rtt_s=40e-3, bandwidth_bytes_per_s=1.8e6, loss=0.02),
        "wan": LinkClass(rtt_s=28e-3, bandwidth_bytes_per_s=2.4e6),  # two homes, DSL or cable
        "4g": LinkClass(rtt_s=100e-3, bandwidth_bytes_per_s=1.2e6, loss=0.001),
        "tpi-llm": LinkClass(rtt_s=8e-3, bandwidth_bytes_per_s=36e6),  # arXiv:2410.00531
        "paretopipe": LinkClass(rtt_s=400e-3, bandwidth_bytes_per_s=0.6e6),  # arXiv:2601.08025
    }
)
WIRED = LINK_CLASSES["lan"]


def typical_device(
    kind: DeviceClass, peer_id: str, layout: ModelLayout, *, engine: str, step_s: float = 0.0
) -> DeviceProfile:
    """The profile that a machine of a kind would likely have.

    Weights are read once for a token or a batch of them, and each further one of a batch takes
    what a prompt's token takes.

    Args:
        step_s: what a step takes beside its blocks; a measured machine's will do.
    """
    block_bytes = sum(layout.block_bytes) / layout.n_blocks
    decode_s = _bounded(block_bytes / kind.decode_bytes_per_s)
    token_s = _bounded(block_bytes / kind.prefill_bytes_per_s)
    head_bytes = layout.head_bytes or layout.embedding_bytes or 1
    head_s = _bounded(head_bytes / kind.decode_bytes_per_s)
    head_token_s = head_bytes / kind.prefill_bytes_per_s
    return DeviceProfile(
        peer_id=peer_id,
        model_digest=layout.digest,
        engine=engine,
        decode_s_per_block=decode_s,
        prefill_s_per_token_per_block=token_s,
        head_s=head_s,
        memory_bytes=int(USABLE_MEMORY * kind.memory_bytes),
        disk_bytes_per_s=kind.disk_bytes_per_s,
        batch_decode_s_per_block=tuple(
            _bounded(decode_s + (batch - 1) * token_s) for batch in BATCHES
        ),
        batch_head_s=tuple(_bounded(head_s + (batch - 1) * head_token_s) for batch in BATCHES),
        depth_s_per_block=layout.kv_bytes_per_token_per_block / kind.decode_bytes_per_s,
        prefill_s_per_block=tuple(
            (n_tokens, _bounded(max(decode_s, n_tokens * token_s))) for n_tokens in CHUNKS
        ),
        step_s=step_s,
        n_cores=kind.n_cores,
    )


class DirectedLinks:
    """Measured links, with some of them made better or replaced."""

    def __init__(self, links: Iterable[LinkProfile]) -> None:
        self._links = tuple(links)
        self._network = Network(self._links)

    def has(self, a: str, b: str) -> bool:
        """Whether anybody measured the pair."""
        return self._network.link(a, b) is not None

    def is_below(self, kind: LinkClass, a: str, b: str) -> bool:
        """Whether the pair is worth improving to `kind`: it is worse in anything, or unmeasured."""
        found = (self._network.link(a, b), self._network.link(b, a))
        return any(
            link is None
            or link.rtt_s > kind.rtt_s
            or link.bandwidth_bytes_per_s < kind.bandwidth_bytes_per_s
            or link.loss > kind.loss
            for link in found
        )

    def improved(
        self, kind: LinkClass, peer: str, others: Sequence[str]
    ) -> tuple[LinkProfile, ...]:
        """All links, those from `peer` to `others` and back at least as good as `kind`."""
        pairs = [pair for other in others for pair in ((peer, other), (other, peer))]
        kept = [link for link in self._links if (link.a, link.b) not in pairs]
        return (*kept, *(self._better(kind, a, b) for a, b in pairs))

    def _better(self, kind: LinkClass, a: str, b: str) -> LinkProfile:
        link = self._network.link(a, b)
        typical = kind.between(a, b)[0]
        if link is None:
            return typical
        return replace(
            typical,
            rtt_s=min(link.rtt_s, kind.rtt_s),
            bandwidth_bytes_per_s=max(link.bandwidth_bytes_per_s, kind.bandwidth_bytes_per_s),
            loss=min(link.loss, kind.loss),
        )


def _bounded(seconds: float) -> float:
    return min(max(seconds, MIN_SECONDS), MAX_SECONDS)
