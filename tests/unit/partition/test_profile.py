"""Profiles: what is refused, and that the rest survives the journey."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from covey.partition.cost import predict
from covey.partition.errors import InvalidPlan
from covey.partition.plan import StagePlan
from covey.partition.profile import DeviceProfile, LinkProfile, ModelLayout, Workload
from support.plans import device, layout, link


@pytest.mark.parametrize("value", [layout(3), device("a", max_blocks=0), link("a", "b")])
def test_a_profile_survives_json(value: ModelLayout | DeviceProfile | LinkProfile) -> None:
    assert type(value).from_value(json.loads(json.dumps(value.to_value()))) == value


def test_fields_of_a_newer_version_are_ignored() -> None:
    assert LinkProfile.from_value({**link("a", "b").to_value(), "jitter_s": 1}) == link("a", "b")


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("decode_s_per_block", math.nan),
        ("decode_s_per_block", math.inf),
        ("decode_s_per_block", 0.0),
        ("decode_s_per_block", "0.1"),
        ("prefill_s_per_token_per_block", -1.0),
        ("head_s", 1e300),
        ("memory_bytes", -1),
        ("memory_bytes", 1 << 70),
        ("memory_bytes", True),
        ("max_blocks", -1),
        ("peer_id", ""),
        ("peer_id", "x" * 129),
        ("peer_id", "two words"),
        ("peer_id", "\u0430"),
        ("disk_bytes_per_s", 0.0),
        ("measured_at", -1.0),
        ("measured_at", math.nan),
        ("batch_decode_s_per_block", [0.1, 0.2]),
        ("batch_decode_s_per_block", [0.1, 0.2, math.nan]),
        ("batch_head_s", [0.1, 0.2, -0.3]),
        ("batch_head_s", [0.1, 0.2, 0.0]),
        ("depth_s_per_block", -1e-9),
        ("depth_s_per_block", math.inf),
        ("prefill_s_per_block", [[16, 0.1], [16, 0.2]]),
        ("prefill_s_per_block", [[64, 0.1], [16, 0.2]]),
        ("prefill_s_per_block", [[0, 0.1]]),
        ("prefill_s_per_block", [[16, math.nan]]),
        ("prefill_s_per_block", [[n, 0.1] for n in range(1, 18)]),
        ("step_s", -1.0),
        ("split_s_per_block", math.nan),
        ("n_cores", 0),
        ("busy_share", 1.1),
        ("busy_share", math.nan),
        ("version", -1),
    ],
)
def test_a_device_out_of_bounds_is_refused(field: str, wrong: object) -> None:
    with pytest.raises(InvalidPlan):
        DeviceProfile.from_value({**device("a").to_value(), field: wrong})


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("b", "a"),
        ("kind", "pigeon"),
        ("loss", 1.0),
        ("rtt_s", -1.0),
        ("rtt_s", math.nan),
        ("loss", -0.1),
        ("bandwidth_bytes_per_s", 0.0),
        ("bandwidth_bytes_per_s", -1.0),
        ("bandwidth_bytes_per_s", math.nan),
        ("bandwidth_bytes_per_s", math.inf),
    ],
)
def test_a_link_out_of_bounds_is_refused(field: str, wrong: object) -> None:
    with pytest.raises(InvalidPlan):
        LinkProfile.from_value({**link("a", "b").to_value(), field: wrong})


@pytest.mark.parametrize(
    ("field", "wrong"),
    [("n_blocks", 0), ("n_blocks", 5), ("block_bytes", [0] * 4), ("block_bytes", "1111")],
)
def test_a_layout_out_of_bounds_is_refused(field: str, wrong: object) -> None:
    with pytest.raises(InvalidPlan):
        ModelLayout.from_value({**layout(4).to_value(), field: wrong})


@pytest.mark.parametrize("measured_at", [0.0, 1e11])
def test_a_profile_from_long_ago_or_from_the_future_plans_like_any_other(
    measured_at: float,
) -> None:
    dated = replace(device("a"), measured_at=measured_at)
    alone = [StagePlan.alone("a", 0, 4)]
    assert predict(alone, layout(4), [dated], []) == predict(alone, layout(4), [device("a")], [])


@pytest.mark.parametrize("value", [None, [], "text", {}, {"a": 1}])
def test_what_is_no_profile_is_refused(value: Any) -> None:
    with pytest.raises(InvalidPlan):
        DeviceProfile.from_value(value)


def test_chunks_of_a_prompt_add_up_to_the_prompt() -> None:
    request = Workload(prompt_tokens=300, prefill_chunk=128)
    assert (request.n_chunks, request.n_chunks * request.chunk_tokens) == (3, 300)
