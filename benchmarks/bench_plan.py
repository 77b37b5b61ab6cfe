"""`make bench-plan`: the search against every plan there is, and how long it takes.

Small questions of any kind are answered by brute force too, and both answers must be the same to
the last bit. Times are those of households made up of ordinary machines, wired or on Wi-Fi, that
share a model of 70 billion parameters in four bits; the slowest of several counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from covey.partition.advice.presets import DEVICE_CLASSES, LINK_CLASSES, typical_device
from covey.partition.errors import PlanInfeasible
from covey.partition.front.search import Front
from covey.partition.observed import slowed
from covey.partition.profile import DeviceProfile, LinkProfile, ModelLayout, Workload
from covey.partition.scope import EVERYTHING, Scope

from .plan_oracle import Question, brute_force, random_question
from .rows import Row, report

PIPELINES = Scope(max_members=1, max_pipelines=1, may_stream=False)
WITH_GROUPS = replace(PIPELINES, max_members=4)

LLAMA_70B = ModelLayout(
    digest="llama-70b",
    n_blocks=80,
    hidden_size=8192,
    block_bytes=(480_000_000,) * 80,
    embedding_bytes=590_000_000,
    head_bytes=590_000_000,
    kv_bytes_per_token_per_block=4096,
    wire_bytes_per_token=32_768,
    n_kv_heads=8,
    mlp_columns=28_672,
    attention_share=0.18,
)
WIRED_SHARE = 0.75  # of the machines; the others are on Wi-Fi
UNLIKE = 0.1  # how far machines of one kind are from what is typical, at most


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, time, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=500, help="small ones, for brute force")
    parser.add_argument("--households", type=int, default=3, help="of each size, to be timed")
    options = parser.parse_args(argv)
    n = options.questions
    same = sum(_is_same(seed) for seed in range(n))
    rows = [Row(f"fronts equal to brute force, of {n}", same, n, "at least")]
    for what, scope, target_s in (
        ("pipelines", PIPELINES, 2),
        ("with groups of up to 4", WITH_GROUPS, 20),
        ("with replicas as well", EVERYTHING, None),
    ):
        seconds, fronts = _timed(8, scope, options.households)
        name = f"8 devices x 80 blocks, {what}"
        rows.append(Row(f"{name}: exact, of {len(fronts)}", sum(front.exact for front in fronts)))
        if target_s is not None:
            rows[-1] = replace(rows[-1], target=len(fronts), direction="at least")
        rows.append(Row(f"{name}: seconds", seconds, target_s))
    seconds, fronts = _timed(64, EVERYTHING, options.households)
    rows.append(Row("64 devices x 80 blocks, bounded: seconds", seconds, 5))
    gap = max(front.gap for front in fronts)
    rows.append(Row("64 devices x 80 blocks, bounded: gap to the bound", gap, 0.05))
    report(rows)


def _is_same(seed: int) -> bool:
    question = random_question(seed)
    try:
        front = question.front(WITH_GROUPS)
    except PlanInfeasible:
        return not brute_force(question)
    found = [point.prediction.objectives for point in front.points]
    return front.exact and found == brute_force(question)


def _timed(n_devices: int, scope: Scope, n_households: int) -> tuple[float, list[Front]]:
    """The longest time, and all fronts."""
    fronts, longest_s = [], 0.0
    for seed in range(n_households):
        question = household(seed, n_devices)
        began_at = time.perf_counter()
        fronts.append(question.front(scope))
        longest_s = max(longest_s, time.perf_counter() - began_at)
    return longest_s, fronts


def household(seed: int, n_devices: int, layout: ModelLayout = LLAMA_70B) -> Question:
    """Ordinary machines that are no two alike, and the links between them."""
    random = Random(seed)  # noqa: S311 - a question to time
    devices: list[DeviceProfile] = []
    for idx in range(n_devices):
        kind = DEVICE_CLASSES[random.choice(list(DEVICE_CLASSES))]
        typical = typical_device(kind, f"p{idx:02}", layout, engine="native", step_s=3e-4)
        unlike = slowed(typical, 1.0 / random.uniform(1 - UNLIKE, 1 + UNLIKE))
        devices.append(replace(unlike, split_s_per_block=2e-5))
    is_wired = [random.random() < WIRED_SHARE for _ in devices]
    links: list[LinkProfile] = []
    for a in range(n_devices):
        for b in range(a + 1, n_devices):
            kind_of_link = LINK_CLASSES["lan" if is_wired[a] and is_wired[b] else "wifi"]
            worse = random.uniform(0.8, 1.25)
            links += replace(
                kind_of_link,
                rtt_s=kind_of_link.rtt_s * worse,
                bandwidth_bytes_per_s=kind_of_link.bandwidth_bytes_per_s / worse,
            ).between(devices[a].peer_id, devices[b].peer_id)
    return Question(layout=layout, devices=tuple(devices), links=tuple(links), request=Workload())


if __name__ == "__main__":
    main()
