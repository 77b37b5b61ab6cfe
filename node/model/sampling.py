"""Logits to the next token, in numpy and with a generator of its own.

Sans-IO. A seeded run repeats itself exactly on the same machine, and equal logits are decided by
the lower id. The order is the usual one: bias, penalties, temperature, top_k, top_p, min_p, draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from .errors import InvalidParams, ModelError

FloatArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int64]

MAX_TOP_LOGPROBS = 20  # as OpenAI's API
MAX_BIASED_TOKENS = 1024  # OpenAI allows 300
MAX_STOPS = 16  # OpenAI allows 4
MAX_STOP_LENGTH = 1024  # characters
MAX_TOKENS = 2**24
_LEAST_TEMPERATURE = 1e-6  # below it the quotient leaves fp32; it is greedy already


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one generation chooses its tokens; the defaults are greedy.

    Raises:
        InvalidParams: a value out of its limits; `.field` names it as the HTTP API does.
    """

    temperature: float = 0.0  # 0: always the most probable token
    top_k: int = 0  # keep the k most probable; 0: all
    top_p: float = 1.0  # keep the fewest that together reach p
    min_p: float = 0.0  # keep those with at least min_p times the highest probability
    repetition_penalty: float = 1.0  # CTRL, arXiv:1909.05858, section 4.1; prompt included
    presence_penalty: float = 0.0  # off the logit of each token seen, prompt included
    frequency_penalty: float = 0.0  # the same times how often it was seen
    seed: int | None = None  # None: from the operating system
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    max_tokens: int = 256
    logprobs: int = 0  # how many alternatives to report with each token

    def __post_init__(self) -> None:
        """Check every field; own an unchangeable copy of the bias."""
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_int("top_k", self.top_k, 0, 2**31)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidParams("top_p", self.top_p, "above 0")
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**64 - 1)
        if len(self.logit_bias) > MAX_BIASED_TOKENS:
            n_biased = len(self.logit_bias)
            raise InvalidParams("logit_bias", n_biased, f"at most {MAX_BIASED_TOKENS} tokens")
        for token, bias in self.logit_bias.items():
            _check_int("logit_bias", token, 0, 2**31)
            _check_number("logit_bias", bias, -100.0, 100.0)
        if len(self.stop) > MAX_STOPS:
            raise InvalidParams("stop", len(self.stop), f"at most {MAX_STOPS} texts")
        for text in self.stop:
            _check_stop(text)
        _check_int("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _check_int("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias)))

    @property
    def has_penalties(self) -> bool:
        """Whether the choice depends on the tokens so far."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A chosen token; log-probabilities are the model's own, before bias and temperature."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (id, logprob), most probable first


class Sampler:
    """Chooses the tokens of one generation; owns its random generator.

    Raises:
        InvalidParams: the bias names a token that the model does not have.
    """

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        for token in params.logit_bias:
            if token >= vocab_size:
                raise InvalidParams("logit_bias", token, f"a token below {vocab_size}")
        self._params = params
        self._vocab_size = vocab_size
        seed = None if params.seed is None else params.seed % 2**64  # a seed may be negative
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._biased = np.fromiter(params.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(params.logit_bias.values(), np.float32)

    def sample(self, logits: FloatArray, history: Sequence[int]) -> SampledToken:
        """Choose one token.

        Args:
            logits: [V], not modified.
            history: the tokens that the penalties look at: the prompt and all tokens since.

        Raises:
            ModelError: the logits hold NaN or positive infinity.
        """
        if logits.shape != (self._vocab_size,):
            raise ValueError(f"logits {logits.shape}, vocabulary {self._vocab_size}")
        normaliser = _log_sum_exp(logits)
        adjusted = self._adjust(logits, history)
        if self._params.temperature == 0.0:
            chosen = int(np.argmax(adjusted))  # the lowest id among equals
        else:
            chosen = self._draw(adjusted)
        top: tuple[tuple[int, float], ...] = ()
        if self._params.logprobs:
            top = tuple(
                (int(token), float(logits[token]) - normaliser)
                for token in _most_probable(logits, self._params.logprobs)
            )
        return SampledToken(chosen, float(logits[chosen]) - normaliser, top)

    def _adjust(self, logits: FloatArray, history: Sequence[int]) -> FloatArray:
        """Bias and penalties; returns `logits` itself when there are none."""
        params = self._params
        if not self._biased.size and not (params.has_penalties and history):
            return logits
        adjusted = logits.copy()
        adjusted[self._biased] += self._bias
        if params.has_penalties and history:
            seen, counts = np.unique(np.asarray(history, np.int64), return_counts=True)
            inside = (seen >= 0) & (seen < self._vocab_size)
            seen, counts = seen[inside], counts[inside]
            at = adjusted[seen]
            penalty = np.float32(params.repetition_penalty)
            at = np.where(at > 0, at / penalty, at * penalty)
            at -= np.float32(params.presence_penalty)
            at -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
            adjusted[seen] = at
        return adjusted

    def _draw(self, logits: FloatArray) -> int:
        params = self._params
        # Weights in fp32, sums in fp64: a whole vocabulary in fp64 costs a millisecond per token.
        temperature = np.float32(max(params.temperature, _LEAST_TEMPERATURE))
        weights = np.exp((logits - logits.max()) / temperature)
        kept: IdArray | None = None  # all
        if params.top_k or params.top_p < 1.0:
            kept = _nucleus(weights, params.top_k or weights.size, params.top_p)
        if params.min_p:  # the highest weight is exp(0) = 1
            floor = np.float32(params.min_p)
            kept = (
                np.flatnonzero(weights >= floor) if kept is None else kept[weights[kept] >= floor]
            )
        reached = np.cumsum(weights if kept is None else weights[kept], dtype=np.float64)
        drawn = np.searchsorted(reached, self._random.random() * reached[-1], side="right")
        at = min(int(drawn), reached.size - 1)
        return at if kept is None else int(kept[at])


class StopMatcher:
    """Finds stop texts in a stream, holding back what may be the beginning of one.

    Sans-IO. Invariant: what was emitted holds no stop text and does not depend on the pieces.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece; returns (what may be shown now, whether a stop text was met).

        A stop text and all that follows it are never emitted; later pieces are ignored.
        """
        if self._stopped:
            return "", True
        self._held += text
        found = [(at + len(s), at) for s in self._stops if (at := self._held.find(s)) >= 0]
        if found:
            # The one that is complete first, so that the result does not depend on the pieces.
            _, start = min(found)
            emit, self._held, self._stopped = self._held[:start], "", True
            return emit, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        emit, self._held = self._held[:cut], self._held[cut:]
        return emit, False

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        emit, self._held = self._held, ""
        return emit


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _log_sum_exp(logits: FloatArray) -> float:
    highest = float(logits.max())
    if not math.isfinite(highest):  # max propagates NaN
        raise ModelError("the logits are not finite: a stage computes nonsense, replace it")
    return highest + math.log(float(np.exp(logits - np.float32(highest)).sum(dtype=np.float64)))


def _most_probable(values: FloatArray, count: int) -> IdArray:
    """Ids of the `count` highest values, highest first, the lower id first among equals."""
    count = min(count, values.size)
    threshold = np.partition(values, values.size - count)[values.size - count]
    above = np.flatnonzero(values > threshold)
    ties = np.flatnonzero(values == threshold)[: count - above.size]
    chosen: IdArray = np.concatenate([above, ties])
    ordered: IdArray = chosen[np.lexsort((chosen, -values[chosen]))]
    return ordered


def _nucleus(weights: FloatArray, top_k: int, top_p: float) -> IdArray:
    """The most probable `top_k` ids, cut where they reach `top_p` of what those k have."""
    if top_p >= 1.0:
        return _most_probable(weights, top_k)
    # Sorting a whole vocabulary costs milliseconds; the nucleus is nearly always a few hundred.
    count = min(top_k, 256)
    total = None if top_k < weights.size else float(weights.sum(dtype=np.float64))
    while True:
        kept = _most_probable(weights, top_k if total is None else count)
        reached = np.cumsum(weights[kept], dtype=np.float64)
        goal = top_p * (float(reached[-1]) if total is None else total)
        if total is None or reached[-1] >= goal or count >= weights.size:
            return kept[: int(np.searchsorted(reached, goal)) + 1]
        count = min(count * 8, weights.size)


def _check_number(name: str, value: object, low: float, high: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # type: ignore[operator] # a NaN fails too
        raise InvalidParams(name, value, f"a number from {low:g} to {high:g}")


def _check_stop(text: object) -> None:
    if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
        raise InvalidParams("stop", text, f"a text of 1 to {MAX_STOP_LENGTH} characters")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise InvalidParams(name, value, f"a whole number from {low} to {high}")
