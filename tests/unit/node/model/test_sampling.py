"""Sampling: limits by field, the order of the steps, ties, penalties, stop texts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from covey.node.model.errors import InvalidParams, ModelError
from covey.node.model.sampling import Sampler, SamplingParams, StopMatcher


def logits(*values: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(values, np.float32)


def possible(params: dict[str, Any], *values: float, history: tuple[int, ...] = ()) -> set[int]:
    """The tokens that 300 seeded draws come to."""
    sampler = Sampler(SamplingParams(seed=1, **params), len(values))
    return {sampler.sample(logits(*values), history).id for _ in range(300)}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", True),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 3.0),
        ("frequency_penalty", -3.0),
        ("seed", 2**64),
        ("seed", "x"),
        ("logit_bias", {0: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", dict.fromkeys(range(2000), 0.0)),
        ("stop", ("",)),
        ("stop", ("x" * 2000,)),
        ("stop", ("x",) * 17),
        ("stop", (3,)),
        ("max_tokens", 0),
        ("max_tokens", 10**9),
        ("logprobs", 21),
    ],
)
def test_value_out_of_limits_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidParams, match=f"{field} = ") as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


def test_bias_for_a_token_the_model_lacks() -> None:
    with pytest.raises(InvalidParams, match="a token below 2"):
        Sampler(SamplingParams(logit_bias={2: 1.0}), 2)


def test_params_cannot_be_changed_through_the_bias() -> None:
    bias = {1: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 9.0
    assert params.logit_bias == {1: 1.0}
    with pytest.raises(TypeError):
        params.logit_bias[1] = 2.0  # type: ignore[index] # that it is refused is the point


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    assert Sampler(SamplingParams(), 4).sample(logits(0, 3, 3, 1), []).id == 1


def test_a_seed_repeats_itself_and_another_does_not() -> None:
    def run(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), 50)
        return [sampler.sample(np.zeros(50, np.float32), []).id for _ in range(20)]

    assert run(7) == run(7)
    assert run(-7) == run(-7)
    assert run(7) != run(8)


def test_temperature_one_draws_in_proportion() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0), 2)
    odds = logits(math.log(0.8), math.log(0.2))
    drawn = [sampler.sample(odds, []).id for _ in range(4000)]
    assert 0.17 < sum(drawn) / 4000 < 0.23  # six standard deviations either way


def test_high_temperature_flattens() -> None:
    assert possible({"temperature": 100.0}, 0, 5, 0) == {0, 1, 2}
    assert possible({"temperature": 0.1}, 0, 5, 0) == {1}
    assert possible({"temperature": 1e-60}, 0, 5, 0) == {1}


def test_top_k_keeps_k_and_the_lower_ids_among_equals() -> None:
    assert possible({"temperature": 1.0, "top_k": 2}, 1, 1, 0, 1) == {0, 1}
    assert possible({"temperature": 1.0, "top_k": 9}, 1, 1) == {0, 1}


def test_top_p_keeps_the_fewest_that_reach_p() -> None:
    odds = [math.log(p) for p in (0.5, 0.3, 0.2)]
    assert possible({"temperature": 1.0, "top_p": 0.4}, *odds) == {0}
    assert possible({"temperature": 1.0, "top_p": 0.7}, *odds) == {0, 1}
    assert possible({"temperature": 1.0, "top_p": 0.9}, *odds) == {0, 1, 2}


def test_top_p_counts_within_top_k() -> None:
    odds = [math.log(p) for p in (0.4, 0.3, 0.3)]
    # Of the two kept, the first alone has 0.4/0.7 = 0.57.
    assert possible({"temperature": 1.0, "top_p": 0.5, "top_k": 2}, *odds) == {0}


def test_top_p_reaches_past_the_first_few_hundred() -> None:
    flat = [0.0] * 5000
    assert len(possible({"temperature": 1.0, "top_p": 0.9}, *flat)) > 250
    assert max(possible({"temperature": 1.0, "top_p": 0.1}, *flat)) < 500


def test_min_p_is_relative_to_the_most_probable() -> None:
    odds = [math.log(p) for p in (0.6, 0.31, 0.09)]
    assert possible({"temperature": 1.0, "min_p": 0.5}, *odds) == {0, 1}


def test_repetition_penalty_lowers_both_signs() -> None:
    params = SamplingParams(repetition_penalty=2.0)
    assert Sampler(params, 2).sample(logits(3, 2), [0]).id == 1
    assert Sampler(params, 2).sample(logits(-1, -1.5), [0]).id == 1
    assert Sampler(params, 2).sample(logits(3, 2), []).id == 0


def test_presence_counts_once_and_frequency_each_time() -> None:
    presence = Sampler(SamplingParams(presence_penalty=1.0), 2)
    assert presence.sample(logits(1.5, 0), [0, 0]).id == 0
    frequency = Sampler(SamplingParams(frequency_penalty=1.0), 2)
    assert frequency.sample(logits(1.5, 0), [0, 0]).id == 1
    assert frequency.sample(logits(1.5, 0), [0]).id == 0


def test_bias_moves_the_choice_and_not_the_reported_probability() -> None:
    sampled = Sampler(SamplingParams(logit_bias={1: 10.0}), 2).sample(logits(0, 0), [])
    assert sampled.id == 1
    assert sampled.logprob == pytest.approx(math.log(0.5))


def test_logprobs_come_most_probable_first() -> None:
    odds = [math.log(p) for p in (0.2, 0.5, 0.3)]
    sampled = Sampler(SamplingParams(logprobs=2), 3).sample(logits(*odds), [])
    assert [token for token, _ in sampled.top] == [1, 2]
    assert [math.exp(logprob) for _, logprob in sampled.top] == pytest.approx([0.5, 0.3])


def test_the_logits_are_not_modified() -> None:
    given = logits(1, 2, 3)
    params = SamplingParams(temperature=1.0, repetition_penalty=2.0, logit_bias={0: 5.0})
    Sampler(params, 3).sample(given, [0, 1, 99])
    assert given.tolist() == [1, 2, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonsense_is_not_sampled_from(bad: float) -> None:
    with pytest.raises(ModelError, match="not finite"):
        Sampler(SamplingParams(), 2).sample(logits(0, bad), [])


def test_a_stop_text_over_several_pieces_is_never_shown() -> None:
    matcher = StopMatcher(["\nUser:"])
    assert [matcher.push(piece) for piece in ("Hi", " there\n", "Us", "er", ": x")] == [
        ("Hi", False),
        (" there", False),
        ("", False),
        ("", False),
        ("", True),
    ]
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""


def test_a_false_beginning_is_shown_once_it_is_one() -> None:
    matcher = StopMatcher(["aab"])
    assert [matcher.push(piece)[0] for piece in ("a", "a", "a", "c")] == ["", "", "a", "aac"]


def test_what_is_held_back_comes_with_the_flush() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the EN") == ("the ", False)
    assert matcher.flush() == "EN"


def test_the_stop_text_that_is_complete_first_counts() -> None:
    assert StopMatcher(["b", "a"]).push("xxaxxb") == ("xx", True)
    assert StopMatcher(["abcd", "bc"]).push("abcd") == ("a", True)
    assert StopMatcher(["b", "ab"]).push("ab") == ("", True)
