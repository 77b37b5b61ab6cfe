"""Batches, replicas, weights that stream, and what a token puts on each link."""

from __future__ import annotations

from dataclasses import replace

import pytest

from covey.partition.cost import Network, predict_all, price
from covey.partition.plan import Pipeline, StagePlan
from covey.partition.profile import Workload
from covey.partition.terms import Terms, joint_prediction, shared_sessions
from support.plans import device, layout, link, stages

BATCHED = {
    peer: replace(
        device(peer, decode_s=0.010, head_s=0.002),
        batch_decode_s_per_block=(0.012, 0.016, 0.024),
        batch_head_s=(0.003, 0.004, 0.006),
    )
    for peer in "ab"
}
FAST = Network([link("a", "b", rtt_s=0.0, bandwidth=1e12)])
TWO = stages(("a", 0, 2), ("b", 2, 4))


def two(n_sessions: int, network: Network = FAST) -> Terms:
    return price(TWO, layout(4), BATCHED, network, request=Workload(n_sessions=n_sessions))


def test_a_batch_goes_through_both_stages_at_the_pace_of_the_busier() -> None:
    # Of 16 sessions 8 are in each stage: a step of 8, and the head's work for them.
    assert two(16).throughput(16) == pytest.approx(8 / (2 * 0.024 + 0.006))


def test_few_sessions_are_limited_by_their_way_around() -> None:
    terms = two(1)
    once_s = 4 * 0.010 + 0.002
    assert terms.tpot_s == pytest.approx(once_s, rel=1e-6)
    assert terms.throughput(1) == pytest.approx(1 / once_s, rel=1e-6)
    assert terms.throughput(2) == pytest.approx(1 / (2 * 0.010 + 0.002), rel=1e-6)
    assert terms.throughput(3) == pytest.approx(3 / (4 * 0.012 + 0.003), rel=1e-6)
    assert terms.throughput(0) == 0.0


def test_more_sessions_never_do_less_and_wait_longer() -> None:
    terms = two(1)
    done = [terms.throughput(n) for n in range(1, 40)]
    assert done == sorted(done)
    assert terms.queue_s(1) == pytest.approx(0.0)
    assert terms.queue_s(32) == pytest.approx(32 / done[31] - terms.tpot_s)


def test_a_wire_carries_every_token_of_a_batch() -> None:
    slow = Network([link("a", "b", rtt_s=0.0, bandwidth=1e4)])  # 0.1 s for each token
    terms = two(16, slow)
    assert terms.throughput(16) == pytest.approx(1 / 0.1)
    assert max(terms.busy(), key=lambda busy: busy.seconds).kind == "link"
    assert terms.cycle_s(3) == pytest.approx(4 * 0.024 + 0.006 + 2 * 8 * 0.1)


def test_bytes_of_each_token_are_told_by_link() -> None:
    coded = price(
        TWO,
        layout(4),
        BATCHED,
        FAST,
        request=Workload(),
        codecs=("exact", "int8", "exact"),
    )
    assert coded.link_bytes() == (("a", "b", 532), ("b", "a", 1000))
    assert coded.prediction().link_bytes == coded.link_bytes()


def alone(peer: str, decode_s: float) -> Terms:
    devices = {peer: device(peer, decode_s=decode_s, head_s=1e-9)}
    stage = StagePlan.alone(peer, 0, 4)
    return price([stage], layout(4), devices, Network([]), request=Workload(n_sessions=4))


def test_of_replicas_a_lone_session_takes_the_faster_and_many_take_all() -> None:
    slow, fast = alone("slow", 0.03), alone("fast", 0.01)
    both = joint_prediction([slow, fast])
    assert (both.ttft_s, both.tpot_s) == (fast.ttft_s, fast.tpot_s)
    assert shared_sessions([slow, fast], 4) == (1, 3)
    assert both.throughput_tok_per_s == pytest.approx(1 / 0.12 + 1 / 0.04)
    assert [peer for peer, _ in both.memory_bytes] == ["slow", "fast"]


def test_a_replica_too_slow_for_a_session_adds_nothing() -> None:
    fast, slow = alone("fast", 0.01), alone("slow", 1.0)
    assert shared_sessions([fast, slow], 4) == (4, 0)
    throughput = joint_prediction([fast, slow]).throughput_tok_per_s
    assert throughput == fast.throughput(4)


def test_sessions_of_equal_replicas_are_all_shared_out() -> None:
    for n_sessions in range(1, 12):
        counts = shared_sessions([alone(peer, 0.01) for peer in "abc"], n_sessions)
        assert sum(counts) == n_sessions
        assert max(counts) - min(counts) <= 1


def test_several_pipelines_are_predicted_in_their_codecs() -> None:
    pipelines = [
        Pipeline.of(TWO, codecs=("exact", "fp16", "fp16")),
        Pipeline.of(stages(("c", 0, 4))),
    ]
    devices = [*BATCHED.values(), device("c")]
    made = predict_all(pipelines, layout(4, wire_bytes=2000), devices, [link("a", "b")])
    assert [peer for peer, _ in made.memory_bytes] == ["a", "b", "c"]
    assert made.link_bytes == (("a", "b", 1000), ("b", "a", 1000))


def streaming(n_blocks: int, disk: float, *, sizes: tuple[int, ...] = (100,) * 4) -> Terms:
    devices = {"a": replace(device("a"), disk_bytes_per_s=disk)}
    stage = StagePlan.alone("a", 0, 4, streamed_blocks=n_blocks)
    model = layout(4, block_bytes=sizes, kv_bytes=1)
    request = Workload(context_tokens=1, n_sessions=1)
    return price([stage], model, devices, Network([]), request=request)


def test_a_disk_that_keeps_up_costs_nothing_but_saves_memory() -> None:
    (stage,) = streaming(4, 20_000.0).stages  # 5 ms for a block of 10 ms
    assert (stage.window, stage.stall_s) == ("tight", 0.0)
    assert stage.decode_s == pytest.approx(0.04)
    assert stage.memory_bytes == (2 * 100 + 4,)


def test_reading_that_is_hidden_by_resident_blocks_is_loose() -> None:
    (stage,) = streaming(2, 8_000.0).stages  # 12.5 ms for a block, 25 ms of 40 for both
    assert (stage.window, stage.stall_s) == ("loose", 0.0)


def test_a_disk_too_slow_stalls_each_token_by_the_rest() -> None:
    terms = streaming(4, 5_000.0)
    (stage,) = terms.stages
    assert stage.window == "stalled"
    assert stage.decode_s == pytest.approx(400 / 5_000)
    assert terms.stall_s == pytest.approx(0.08 - 0.04)
    assert terms.prediction().stall_s == terms.stall_s


def test_a_batch_reads_the_disk_once() -> None:
    (stage,) = streaming(4, 5_000.0).stages
    assert stage.steps_s == pytest.approx((0.08, 0.08, 0.16, 0.32))


def test_what_stays_resident_reads_nothing() -> None:
    (stage,) = streaming(0, 1.0).stages
    assert (stage.window, stage.stall_s) == ("resident", 0.0)
    assert stage.memory_bytes == (404,)
