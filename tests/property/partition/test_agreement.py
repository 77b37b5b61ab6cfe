"""Members with the same documents agree, in whatever order these came."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from covey.partition.activation import active_plan, is_ready, valid_proposals
from covey.partition.plan import LayerPlan
from support.plans import device, layout, link, plan

PEERS = "abcd"
DEVICES = {peer: device(peer, decode_s=0.01 * (i + 1)) for i, peer in enumerate(PEERS)}
LINKS = [link(a, b) for a in PEERS for b in PEERS if a < b]


@st.composite
def proposals(draw: st.DrawFn) -> LayerPlan:
    peers = draw(st.permutations(PEERS))[: draw(st.integers(1, 3))]
    cuts = [0, *sorted(draw(st.sets(st.integers(1, 3), min_size=2, max_size=2)))][: len(peers)]
    spans = list(zip(peers, cuts, [*cuts[1:], 4], strict=True))
    made = plan(*spans, epoch=draw(st.integers(0, 4)))
    return replace(made, proposer=draw(st.sampled_from(PEERS)))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(proposals(), max_size=8),
    st.sets(st.sampled_from(PEERS), min_size=1),
    st.randoms(use_true_random=False),
    st.data(),
)
def test_members_agree_for_any_order_and_repetition(
    plans: list[LayerPlan], live: set[str], random: Random, data: st.DataObject
) -> None:
    said = {
        one.digest: data.draw(st.sampled_from([set(one.peers), set(one.peers[:1]), set()]))
        for one in plans
    }

    def active(documents: list[LayerPlan], order: str) -> LayerPlan | None:
        devices = {peer: DEVICES[peer] for peer in order}
        valid = valid_proposals(documents, layout(), devices, said)
        return active_plan(valid, said, live, layout(), devices, LINKS)

    shuffled = [*plans, *plans[:2]]
    random.shuffle(shuffled)
    agreed = active(plans, PEERS)
    assert active(shuffled, PEERS[::-1]) == agreed
    if agreed is not None:
        assert is_ready(agreed, said)
        assert live.issuperset(agreed.peers)


@settings(deadline=None)
@given(st.lists(proposals(), max_size=8), st.data())
def test_no_valid_epoch_runs_more_than_one_ahead(
    plans: list[LayerPlan], data: st.DataObject
) -> None:
    said = {one.digest: data.draw(st.sampled_from([set(one.peers), set()])) for one in plans}
    valid = valid_proposals(plans, layout(), DEVICES, said)
    active = max((one.epoch for one in plans if is_ready(one, said)), default=0)
    assert all(one.epoch <= active + 1 for one in valid)
    assert len({one.digest for one in valid}) == len(valid)
