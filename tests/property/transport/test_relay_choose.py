"""What `choose_kept` promises of any candidates."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from covey.transport.relay.choose import Candidate, choose_kept

hosts = st.none() | st.sampled_from(["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"])
rtts = st.none() | st.floats(0.0, 3.0)
candidates = st.lists(
    st.builds(Candidate, st.text("abcdef", min_size=1, max_size=2), hosts, rtts),
    unique_by=lambda candidate: candidate.peer_id,
    max_size=8,
)
kept = st.sets(st.text("abcdef", min_size=1, max_size=2), max_size=3)


@given(candidates, kept)
def test_as_many_as_there_are_and_none_twice(found: list[Candidate], kept: set[str]) -> None:
    chosen = choose_kept(found, kept)
    assert len(chosen) == len(set(chosen)) == min(2, len(found))
    assert set(chosen) <= {candidate.peer_id for candidate in found}


@given(candidates, kept)
def test_what_was_chosen_stays_chosen(found: list[Candidate], kept: set[str]) -> None:
    chosen = choose_kept(found, kept)
    assert set(choose_kept(found, chosen)) == set(chosen)


@given(candidates)
def test_the_order_of_candidates_does_not_matter(found: list[Candidate]) -> None:
    assert choose_kept(found, ()) == choose_kept(found[::-1], ())
