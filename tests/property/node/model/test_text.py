"""Streams of text: any split gives what the whole gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from covey.node.model.sampling import Sampler, SamplingParams, StopMatcher
from covey.node.model.tokenizer_spec import build_tokenizer
from support.tiny_models import tiny_metadata

TOKENIZER = build_tokenizer(Path("tiny.gguf"), {"format": "gguf"} | tiny_metadata())
STOPS = ["aa", "aba", "b\n", "abab"]


@given(st.text())
def test_any_text_survives_encoding(text: str) -> None:
    ids = TOKENIZER.encode(text, parse_special=False)
    assert TOKENIZER.decode(ids) == text


@given(st.lists(st.integers(0, TOKENIZER.vocab_size + 3)))
def test_stream_of_any_tokens_is_their_decoding(ids: list[int]) -> None:
    stream = TOKENIZER.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == TOKENIZER.decode(ids)


@given(st.text(), st.data())
def test_stream_of_valid_text_never_shows_a_replacement(text: str, data: st.DataObject) -> None:
    stream = TOKENIZER.stream()
    ids = TOKENIZER.encode(text.replace("\ufffd", ""), parse_special=False)
    kept = ids[: data.draw(st.integers(0, len(ids)))]
    shown = "".join(map(stream.push, kept))
    assert "\ufffd" not in shown
    assert text.replace("\ufffd", "").startswith(shown)


@given(st.lists(st.text("ab\n", max_size=3)))
def test_stop_matcher_shows_the_same_for_any_split(pieces: list[str]) -> None:
    matcher, shown, stopped = StopMatcher(STOPS), "", False
    for piece in pieces:
        emit, stopped = matcher.push(piece)
        shown += emit
        assert not any(stop in shown for stop in STOPS)
    at_once = StopMatcher(STOPS)
    emit, stopped_at_once = at_once.push("".join(pieces))
    assert shown + matcher.flush() == emit + at_once.flush()
    assert stopped == stopped_at_once == any(stop in "".join(pieces) for stop in STOPS)


@given(
    st.lists(st.sampled_from([-3.0, 0.0, 0.5, 0.5, 4.0]), min_size=1, max_size=40),
    st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    st.integers(0, 45),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
    st.integers(0, 2**32),
)
def test_a_drawn_token_is_always_one_that_the_filters_keep(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    logits = np.array(values, np.float32)
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    sampled = Sampler(params, len(values)).sample(logits, [])
    assert sampled == Sampler(params, len(values)).sample(logits, [])
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    rank = order.index(sampled.id)
    assert rank < (top_k or len(values))
    if temperature:
        weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)[order]
        kept = weights[: top_k or None]
        assert kept[:rank].sum() <= top_p * kept.sum() * (1 + 1e-6)  # the sampler's are fp32
        assert weights[rank] >= min_p * (1 - 1e-6)
    else:
        assert rank == 0
