"""What is said where no plan exists: how much is missing, and what would do."""

from __future__ import annotations

from covey.partition.advice.shortfall import infeasible, streaming_bytes, why_no_single
from covey.partition.profile import Workload
from support.plans import device, layout

BIG = layout(4, block_bytes=(1_000_000,) * 4, head_weights=500_000)
ONE = Workload(context_tokens=2048, n_sessions=1)


def test_without_devices_all_of_the_model_is_missing() -> None:
    error = infeasible(BIG, [], ONE, None)
    assert (error.missing_blocks, error.missing_bytes) == (4, 4_500_000)
    assert "4 MB" in str(error) or "5 MB" in str(error)


def test_the_message_says_how_much_is_missing_and_where_to_get_it() -> None:
    error = infeasible(BIG, [device("a", memory=2_600_000)], ONE, None)
    assert (error.missing_blocks, error.missing_bytes) == (2, 2_000_000)
    assert str(error) == (
        "the devices hold 2 of 4 blocks and lack 2 MB: "
        "give 2 MB more with --memory, or add a device that has it"
    )


def test_a_shorter_context_is_offered_where_it_would_do() -> None:
    cached = layout(4, block_bytes=(1_000_000,) * 4, kv_bytes=1000)
    error = infeasible(cached, [device("a", memory=8_200_000)], ONE, None)
    assert "plan for a context of 1024 tokens instead of 2048" in str(error)
    hopeless = infeasible(cached, [device("a", memory=4_000_000)], ONE, None)
    assert "context" not in str(hopeless)


def test_an_owners_cap_is_named_where_it_stands_in_the_way() -> None:
    devices = [device("a", memory=5_000_000, max_blocks=1), device("b", memory=1_200_000)]
    error = infeasible(BIG, devices, ONE, None)
    assert error.missing_blocks == 2
    assert "raise --max-blocks of a" in str(error)
    assert "raise" not in str(infeasible(BIG, [device("a", memory=1, max_blocks=1)], ONE, None))


def test_the_head_needs_room_for_its_own_weights() -> None:
    devices = [device("a", memory=4_200_000)]
    error = infeasible(BIG, devices, ONE, None)
    assert error.missing_bytes == 300_000
    assert "a holds 3" in why_no_single(BIG, devices, ONE, None)


def test_room_without_links_asks_for_links() -> None:
    devices = [device("a", memory=3_000_000), device("b", memory=3_000_000)]
    error = infeasible(BIG, devices, ONE, None)
    assert (error.missing_blocks, error.missing_bytes) == (0, 0)
    assert "connect" in str(error)


def test_where_weights_may_stream_the_memory_for_that_is_told() -> None:
    error = infeasible(BIG, [device("a", memory=1_000_000)], ONE, None, may_stream=True)
    assert str(error).endswith("or give one device 2 MB, which then reads weights from its disk")
    assert streaming_bytes(BIG, ONE) == 2_500_000
