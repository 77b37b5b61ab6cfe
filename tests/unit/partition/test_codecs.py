"""Which codec a link gets: fast ones none, slow ones the one that pays, and no hovering."""

from __future__ import annotations

import pytest

from covey.partition.codecs import MARGIN, coarse, codec_for, codecs_for
from covey.partition.plan import CODECS
from covey.partition.profile import LinkProfile, ModelLayout, Workload

REQUEST = Workload()


def layout(hidden_size: int = 576, itemsize: int = 4) -> ModelLayout:
    return ModelLayout(
        digest="m",
        n_blocks=2,
        hidden_size=hidden_size,
        block_bytes=(1, 1),
        embedding_bytes=0,
        head_bytes=0,
        kv_bytes_per_token_per_block=1,
        wire_bytes_per_token=hidden_size * itemsize,
    )


def link(bytes_per_s: float, a: str = "a", b: str = "b") -> LinkProfile:
    return LinkProfile(a=a, b=b, rtt_s=0.01, bandwidth_bytes_per_s=bytes_per_s)


def test_a_border_within_one_device_and_one_on_a_fast_link_stay_exact() -> None:
    assert codec_for(layout(), None, REQUEST) == "exact"
    assert codec_for(layout(), link(125e6), REQUEST) == "exact"


def test_the_slower_the_link_the_fewer_bytes_and_every_codec_has_its_range() -> None:
    chosen = [codec_for(layout(), link(2.0 ** (30 - n / 4)), REQUEST) for n in range(100)]
    ranks = [CODECS.index(codec) for codec in chosen]
    assert ranks == sorted(ranks)
    assert set(chosen) == set(CODECS)


def test_fp16_is_never_chosen_where_it_saves_nothing() -> None:
    bf16 = layout(itemsize=2)
    chosen = {codec_for(bf16, link(2.0 ** (30 - n / 4)), REQUEST) for n in range(100)}
    assert chosen == {"exact", "int8", "int4"}


def test_a_wider_model_needs_a_faster_link_to_stay_exact() -> None:
    assert codec_for(layout(576), link(12e6), REQUEST) == "exact"
    assert codec_for(layout(4096), link(12e6), REQUEST) == "int8"


def test_a_link_that_hovers_changes_its_codec_once_at_most_whatever_it_began_with() -> None:
    for begun in CODECS:
        for middle in (2.0 ** (30 - n / 8) for n in range(200)):
            current, changes = begun, 0
            for factor in (1.0, 0.8, 1.2, 0.9, 1.2, 0.8, 1.1, 0.8, 1.2):
                codec = codec_for(layout(), link(middle * factor), REQUEST, current=current)
                changes += codec != current
                current = codec
            assert changes <= 2, (begun, middle)  # to the codec of the first look, and one beside
            settled = current
            for factor in (0.8, 1.2) * 4:
                current = codec_for(layout(), link(middle * factor), REQUEST, current=current)
                assert current == settled, middle


@pytest.mark.parametrize(("bandwidth", "codec"), [(1e9, "exact"), (1e4, "int4")])
def test_a_codec_is_left_when_the_link_has_become_another(bandwidth: float, codec: str) -> None:
    assert 0 < MARGIN < 1
    for current in CODECS:
        assert codec_for(layout(), link(bandwidth), REQUEST, current=current) == codec


def test_bandwidths_round_down_to_two_steps_an_octave() -> None:
    assert [coarse(x) for x in (1.0, 1.49, 1.5, 1.99, 2.0, 3.5e6)] == [
        *(1.0, 1.0, 1.5, 1.5, 2.0),
        1.5 * 2**21,
    ]


def test_each_border_of_a_chain_gets_its_own_links_codec() -> None:
    links = {("a", "b"): link(1e9), ("b", "c"): link(1e4, "b", "c"), ("c", "a"): link(3e6)}

    def find(sender: str, receiver: str) -> LinkProfile | None:
        return links.get((sender, receiver))

    codecs = codecs_for(["a", "b", "c"], layout(), find, REQUEST)
    assert codecs == ("exact", "exact", "int4", codec_for(layout(), link(3e6), REQUEST))
