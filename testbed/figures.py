"""What plans were predicted to do beside what they did, and the rows that judge it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median, quantiles
from types import MappingProxyType

from benchmarks.rows import Row

ERROR_MEDIAN, ERROR_P90 = 0.10, 0.25
ORDERED = 0.9
WORST_RATIO, MEDIAN_RATIO = 0.97, 1.25
TIE = 0.03  # plans that are predicted to be closer than this are in no order


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one plan does, or should."""

    ttft_s: float  # of a prompt of the workload's length
    tpot_s: float  # one session
    tokens_per_s: float  # the workload's sessions together

    @classmethod
    def predicted(cls, facts: Mapping[str, float]) -> Figures:
        """Those of a plan in the facts of `covey plan`."""
        return cls(
            ttft_s=facts["ttft_s"],
            tpot_s=facts["tpot_s"],
            tokens_per_s=facts["throughput_tok_per_s"],
        )


#: How to read each figure, so that less is better.
COSTS: Mapping[str, Callable[[Figures], float]] = MappingProxyType(
    {
        "TTFT": lambda figures: figures.ttft_s,
        "TPOT": lambda figures: figures.tpot_s,
        "throughput": lambda figures: 1 / figures.tokens_per_s,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One plan of one lab."""

    lab: str
    plan: str
    rules: tuple[str, ...]  # whose choice it is
    predicted: Figures
    measured: Figures

    def told(self) -> str:
        """Both sides, for people."""
        predicted, measured = self.predicted, self.measured
        return (
            f"{', '.join(self.rules):40}  {self.plan}\n"
            f"        predicted / measured: TTFT {predicted.ttft_s:.3f} / {measured.ttft_s:.3f} s, "
            f"TPOT {1e3 * predicted.tpot_s:.1f} / {1e3 * measured.tpot_s:.1f} ms, "
            f"{predicted.tokens_per_s:.1f} / {measured.tokens_per_s:.1f} tok/s"
        )


def errors(tried: Iterable[Tried], name: str) -> list[float]:
    """How far predictions of one figure are off, as shares of what was measured."""
    found = []
    for each in tried:
        predicted, measured = COSTS[name](each.predicted), COSTS[name](each.measured)
        if name == "throughput":  # of the figure itself, not of its inverse
            predicted, measured = 1 / predicted, 1 / measured
        found.append(abs(predicted - measured) / measured)
    return found


def ordered_pairs(tried: Iterable[Tried]) -> list[bool]:
    """For each two plans of one lab that are predicted to differ in a figure: whether they do so.

    Pairs that are predicted to tie are left out; see TIE.
    """
    found = []
    for one, other in combinations(tried, 2):
        if one.lab != other.lab:
            continue
        for cost in COSTS.values():
            predicted = cost(one.predicted) / cost(other.predicted)
            if abs(predicted - 1) > TIE:
                measured = cost(one.measured) / cost(other.measured)
                found.append((predicted < 1) == (measured < 1))
    return found


def ratios(tried: Sequence[Tried], own: str, rivals: Sequence[str]) -> dict[str, float]:
    """By lab, how many times faster than the best rival's our plan's token was measured to come."""
    found = {}
    for ours in tried:
        if own in ours.rules:
            others = [
                each.measured.tpot_s
                for each in tried
                if each.lab == ours.lab and set(rivals) & set(each.rules)
            ]
            if others:
                found[ours.lab] = min(others) / ours.measured.tpot_s
    return found


def percentile_90(values: Sequence[float]) -> float:
    """The 90th percentile; of a single value, that."""
    return quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]


def prediction_rows(tried: Sequence[Tried]) -> list[Row]:
    """How right the predictions are."""
    by_name = {name: errors(tried, name) for name in COSTS}
    everything = [error for found in by_name.values() for error in found]
    rows = [
        Row("predicted over measured, all figures: median error", median(everything), ERROR_MEDIAN),
        Row("  90th percentile", percentile_90(everything), ERROR_P90),
    ]
    for name, found in by_name.items():
        rows += [
            Row(f"  {name}: median error", median(found), ERROR_MEDIAN),
            Row(f"  {name}: 90th percentile", percentile_90(found)),
        ]
    if pairs := ordered_pairs(tried):
        share = sum(pairs) / len(pairs)
        name = f"pairs of plans in the predicted order, of {len(pairs)}"
        rows.append(Row(name, share, ORDERED, "at least"))
    return rows


def ratio_rows(tried: Sequence[Tried], own: str, rivals: Sequence[str]) -> list[Row]:
    """How good the chosen plans are beside the best of the rivals', and beside each of them."""
    rows = []
    if found := list(ratios(tried, own, rivals).values()):
        name = "measured TPOT, chosen plan over the best rival"
        rows += [
            Row(f"{name}: worst", min(found), WORST_RATIO, "at least"),
            Row(f"{name}: median", median(found), MEDIAN_RATIO, "at least"),
        ]
    for rival in rivals:
        if found := list(ratios(tried, own, [rival]).values()):
            rows.append(Row(f"  over {rival}: median", median(found)))
    return rows
