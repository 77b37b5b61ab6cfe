"""The cost model against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from covey.partition.cost import Network, Terms, misfits, predict, price
from covey.partition.errors import InvalidPlan, PlanInfeasible
from covey.partition.network import PACKET_BYTES, PROMPT_LOST_ROUND_TRIPS
from covey.partition.plan import Member, Span, StagePlan
from covey.partition.profile import LinkProfile, Workload
from support.plans import device, layout, link, stages

A = device("a", decode_s=0.010, prefill_s=0.001, head_s=0.005)
B = device("b", decode_s=0.020, prefill_s=0.002, head_s=0.007)
LINK = link("a", "b", rtt_s=0.004, bandwidth=1e6)  # 2 ms, and 1 ms per token of 1000 bytes
TWO = stages(("a", 0, 3), ("b", 3, 4))


def terms(request: Workload, **more: str) -> Terms:
    return price(TWO, layout(4), {"a": A, "b": B}, Network([LINK]), request=request, **more)


def test_one_device_alone_pays_compute_and_its_head_only() -> None:
    alone = predict(stages(("a", 0, 4)), layout(4), [A], [], prompt_tokens=300, n_sessions=4)
    assert alone.tpot_s == pytest.approx(0.045)
    assert alone.ttft_s == pytest.approx(300 * 0.004 + 0.005)
    assert alone.throughput_tok_per_s == pytest.approx(1 / 0.045)


def test_tpot_is_compute_and_both_hops() -> None:
    assert terms(Workload()).tpot_s == pytest.approx(0.005 + 0.030 + 0.020 + 2 * 0.003)


def test_one_chunk_goes_through_every_part_once() -> None:
    request = Workload(prompt_tokens=10, prefill_chunk=10)
    opened = 0.004
    there, back = 0.002 + 0.010, 0.003  # only the last position returns
    assert terms(request).ttft_s == pytest.approx(opened + 0.030 + there + 0.020 + back + 0.005)


def test_a_session_is_opened_on_all_stages_at_once() -> None:
    devices = {peer: device(peer) for peer in "abc"}
    links = [
        link("a", "b", rtt_s=0.1),
        link("a", "c", rtt_s=0.3),
        link("c", "a", rtt_s=0.5),
        link("b", "c", rtt_s=0.7),
    ]
    three = stages(("a", 0, 2), ("b", 2, 3), ("c", 3, 4))
    found = price(three, layout(4), devices, Network(links), request=Workload())
    assert found.open_s == pytest.approx((0.3 + 0.5) / 2)


def test_of_a_prompt_more_is_lost() -> None:
    def chunk_s(loss: float) -> float:
        lossy = replace(link("a", "b", rtt_s=0.04, bandwidth=1e6), loss=loss)
        border = Network([lossy]).border("a", "b", token_bytes=PACKET_BYTES, chunk_tokens=100)
        assert border is not None
        return border.chunk_wire_s

    assert chunk_s(0.02) == pytest.approx(chunk_s(0.0) + 2 * PROMPT_LOST_ROUND_TRIPS * 0.04)


def test_further_chunks_queue_behind_the_slowest_part() -> None:
    one = terms(Workload(prompt_tokens=10, prefill_chunk=10)).ttft_s
    three = terms(Workload(prompt_tokens=30, prefill_chunk=10)).ttft_s
    assert three == pytest.approx(one + 2 * 0.030)


def test_throughput_is_set_by_the_busiest_part_when_sessions_abound() -> None:
    busy = terms(Workload(n_sessions=100)).busy()
    assert max(busy, key=lambda part: part.seconds).peers == ("a",)
    full = terms(Workload(n_sessions=100)).prediction().throughput_tok_per_s
    assert full == pytest.approx(1 / 0.035)  # a's blocks, and a is the head


def test_throughput_is_capped_by_the_sessions_in_flight() -> None:
    one = terms(Workload(n_sessions=1)).prediction()
    assert one.throughput_tok_per_s == pytest.approx(1 / one.tpot_s)


def test_a_head_elsewhere_pays_two_borders_and_works_itself() -> None:
    alone = stages(("a", 0, 4))
    away = price(alone, layout(4), {"a": A, "b": B}, Network([LINK]), request=Workload(), head="b")
    assert away.tpot_s == pytest.approx(0.040 + 2 * 0.003 + 0.007)
    assert [border.receiver for border in away.borders] == ["a", "b"]


def test_memory_is_weights_cache_of_all_sessions_and_the_heads_own() -> None:
    weighty = layout(4, block_bytes=(1, 2, 3, 4), head_weights=1000, kv_bytes=10)
    made = predict(TWO, weighty, [A, B], [LINK], context_tokens=5, n_sessions=2)
    assert dict(made.memory_bytes) == {"a": 6 + 3 * 100 + 1000, "b": 4 + 100}


def test_misfits_names_who_is_given_too_much() -> None:
    small = {"a": device("a", memory=299), "b": device("b", max_blocks=0)}
    priced = price(TWO, layout(4), small, Network([LINK]), request=Workload())
    assert misfits(priced, small) == ("a", "b")
    assert misfits(terms(Workload()), {"a": A, "b": B}) == ()


def test_indices_weigh_only_in_front_of_a_shared_block() -> None:
    wide = layout(4, index_bytes=500)

    def wires(pattern: str) -> list[float]:
        priced = price(
            TWO,
            wide,
            {"a": A, "b": B},
            Network([LINK]),
            request=Workload(),
            index_pattern=pattern,
        )
        return [border.wire_s for border in priced.borders]

    assert wires("FSSF") == pytest.approx([0, 0.001, 0.001])
    assert wires("FFFS") == pytest.approx([0, 0.0015, 0.001])


def test_a_codec_changes_the_bytes_on_the_wire() -> None:
    priced = price(
        TWO,
        layout(4, wire_bytes=2000),
        {"a": A, "b": B},
        Network([LINK]),
        request=Workload(),
        codecs=("exact", "int8", "fp16"),
    )
    assert [border.wire_s for border in priced.borders] == pytest.approx([0, 532e-6, 1e-3])


def test_a_pair_without_a_link_is_unreachable() -> None:
    with pytest.raises(PlanInfeasible, match="no measured link joins a and b"):
        predict(TWO, layout(4), [A, B], [])


def test_each_direction_counts_as_measured_and_the_worse_of_two_measurements() -> None:
    slow = LinkProfile(a="b", b="a", rtt_s=0.1, bandwidth_bytes_per_s=1.0)
    network = Network([slow, LINK, link("a", "b", rtt_s=0.001, bandwidth=1e3)])
    forth, back = network.link("a", "b"), network.link("b", "a")
    assert forth is not None
    assert back == slow
    assert (forth.rtt_s, forth.bandwidth_bytes_per_s) == (0.004, 1e3)


def test_a_lost_packet_costs_a_timeout_if_it_is_alone_and_round_trips_if_not() -> None:
    lossy = Network([LinkProfile(a="a", b="b", rtt_s=0.04, bandwidth_bytes_per_s=1e9, loss=0.02)])
    alone = lossy.border("a", "b", token_bytes=1000, chunk_tokens=1)
    in_two = lossy.border("a", "b", token_bytes=2000, chunk_tokens=1)
    many = lossy.border("a", "b", token_bytes=1 << 20, chunk_tokens=1)
    assert alone is not None
    assert in_two is not None
    assert many is not None
    assert alone.latency_s == pytest.approx(0.02 + 0.02 * 0.2)
    assert in_two.latency_s == pytest.approx(0.02 + 2 * 0.02 * 10 * 0.04)
    assert many.latency_s == pytest.approx(0.02 + 10 * 0.04)


@pytest.mark.parametrize(
    "wrong",
    [
        stages(("a", 0, 3)),
        stages(("a", 0, 3), ("stranger", 3, 4)),
        (StagePlan(Span(0, 4), (Member("a", 1, 32), Member("b", 1, 32))),),
    ],
)
def test_what_cannot_be_priced_is_refused(wrong: tuple[StagePlan, ...]) -> None:
    with pytest.raises(InvalidPlan):
        predict(wrong, layout(4), [A, B], [LINK])
