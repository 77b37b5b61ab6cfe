"""Small models, devices and links for tests of the planner."""

from __future__ import annotations

from collections.abc import Sequence

from covey.partition.plan import LayerPlan, Pipeline, Prediction, StagePlan, make_plan
from covey.partition.profile import DeviceProfile, LinkProfile, ModelLayout

MODEL = "model"


def layout(
    n_blocks: int = 4,
    *,
    block_bytes: Sequence[int] | None = None,
    head_weights: int = 0,
    kv_bytes: int = 0,
    wire_bytes: int = 1000,
    index_bytes: int = 0,
) -> ModelLayout:
    return ModelLayout(
        digest=MODEL,
        n_blocks=n_blocks,
        hidden_size=500,
        block_bytes=tuple(block_bytes or (100,) * n_blocks),
        embedding_bytes=head_weights,
        head_bytes=0,
        kv_bytes_per_token_per_block=kv_bytes,
        wire_bytes_per_token=wire_bytes,
        index_bytes_per_token=index_bytes,
    )


def device(
    peer_id: str,
    *,
    decode_s: float = 0.01,
    prefill_s: float = 0.001,
    head_s: float = 0.001,
    memory: int = 10_000,
    max_blocks: int | None = None,
) -> DeviceProfile:
    return DeviceProfile(
        peer_id=peer_id,
        model_digest=MODEL,
        engine="fp32",
        decode_s_per_block=decode_s,
        prefill_s_per_token_per_block=prefill_s,
        head_s=head_s,
        memory_bytes=memory,
        disk_bytes_per_s=1e6,
        max_blocks=max_blocks,
    )


def link(a: str, b: str, *, rtt_s: float = 0.002, bandwidth: float = 1e6) -> LinkProfile:
    return LinkProfile(a=a, b=b, rtt_s=rtt_s, bandwidth_bytes_per_s=bandwidth)


def stages(*spans: tuple[str, int, int]) -> tuple[StagePlan, ...]:
    return tuple(StagePlan.alone(*span) for span in spans)


def plan(
    *spans: tuple[str, int, int],
    epoch: int = 1,
    proposer: str | None = None,
    index_pattern: str | None = None,
    tpot_s: float = 1.0,
) -> LayerPlan:
    made = stages(*spans)
    return make_plan(
        [Pipeline.of(made, index_pattern=index_pattern)],
        Prediction(
            ttft_s=1.0,
            tpot_s=tpot_s,
            throughput_tok_per_s=1.0,
            memory_bytes=tuple((stage.hub, 1) for stage in made),
        ),
        model_digest=MODEL,
        epoch=epoch,
        proposer=proposer or made[0].hub,
        engine="fp32",
        index_pattern=index_pattern,
    )
