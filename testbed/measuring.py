"""What a plan does beside what the nodes predict for it, profile and run in turn.

Profiles move while a swarm serves: so the prediction is read anew right before each text, from what
the nodes know by then, and the medians of both sides are compared.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from statistics import median

from covey.cli.child import wait_for
from covey.client import ServerBusy
from covey.errors import CoveyError

from .asker import Asker, Session, together, tokens_per_s
from .figures import Figures
from .fleet import CONTEXT, SESSIONS, Fleet
from .plans import Plan, apply, heads, shape

PLANNED_S, CALM_S = 90.0, 2.0
PROMPT = 128  # tokens, the workload's
WARM_PROMPT, WARM_TOKENS = 16, 8
TEXT_S = 2.0  # what one text should take after its first token
MIN_TOKENS, MAX_TOKENS = 8, 64
FULL_S = 2.5  # for which all sessions come at once, at least
ROUNDS_S = 5.0  # one session is measured again and again for so long,
MAX_ROUNDS = 3  # but not more often


def predicted_and_measured(fleet: Fleet, plan: Plan) -> tuple[Figures, Figures]:
    """Pin a plan and ask for texts where its first stage is; the first text is thrown away.

    Raises:
        CoveyError: it does not run, or not until the end.
    """
    apply(fleet, plan)
    # Of several pipelines a prediction for one session is of the quickest, asked for at its head.
    by_speed = sorted(heads(plan), key=lambda name: -fleet.members[name].speed)
    askers = [fleet.askers[name] for name in by_speed]
    asker = askers[0]
    asker.session(WARM_PROMPT, WARM_TOKENS)
    until = time.monotonic() + ROUNDS_S
    foretold: list[Figures] = []
    alone: list[Session] = []
    while not alone or (time.monotonic() < until and len(alone) < MAX_ROUNDS):
        foretold.append(_predicted(asker, plan))
        alone.append(asker.session(PROMPT, _bounded(TEXT_S / foretold[-1].tpot_s)))
    full = _predicted(asker, plan)
    step_s = SESSIONS / full.tokens_per_s
    came_at = _together(askers, max(FULL_S, MIN_TOKENS * step_s))
    n_pieces = sum(len(session.came_at) for session in alone)
    measured = Figures(
        ttft_s=median(session.ttft_s for session in alone),
        tpot_s=median(session.tpot_s for session in alone),
        tokens_per_s=tokens_per_s(came_at, sum(session.n_tokens for session in alone) / n_pieces),
    )
    predicted = Figures(
        ttft_s=median(figures.ttft_s for figures in foretold),
        tpot_s=median(figures.tpot_s for figures in foretold),
        tokens_per_s=full.tokens_per_s,
    )
    return predicted, measured


def _together(askers: Sequence[Asker], seconds: float) -> list[tuple[float, ...]]:
    """All sessions at once, as long as there is room for; else shorter ones.

    They are asked for at the head of each pipeline in turn, since that is what is predicted: one
    machine that asked for all of them would have to do the heads' own work of all.

    A session has room for all tokens that it may come to, and beside a plan that was there before
    a tight memory has not all the room that was planned.
    """
    with suppress(ServerBusy):
        return together(askers, PROMPT, SESSIONS, seconds=seconds, max_tokens=CONTEXT - PROMPT)
    return together(askers, PROMPT, SESSIONS, seconds=seconds, max_tokens=MAX_TOKENS)


def chosen(fleet: Fleet) -> Plan:
    """What the planner would run if nothing were pinned: its wish, once that stays the same.

    Raises:
        CoveyError: there is none in time.
    """
    asker = fleet.askers[fleet.founder]
    seen: list[tuple[float, Plan]] = []

    def is_calm() -> bool:
        fleet.check()
        points = asker.plan()["points"]
        plan = next((point for point in points if point["is_chosen"]), None)
        if plan is None or (seen and shape(plan) != shape(seen[-1][1])):
            seen.clear()
        if plan is not None:
            seen.append((time.monotonic(), plan))
        return bool(seen) and seen[-1][0] - seen[0][0] >= CALM_S

    wait_for(is_calm, PLANNED_S, "no plan that stays the same")
    return seen[-1][1]


def _predicted(asker: Asker, plan: Plan) -> Figures:
    """What the nodes expect of the plan now. Raises CoveyError if another one runs."""
    active = asker.plan()["active"]
    if active is None or shape(active) != shape(plan):
        raise CoveyError("the plan was replaced while it was measured")
    return Figures.predicted(active)


def _bounded(n_tokens: float) -> int:
    return max(MIN_TOKENS, min(MAX_TOKENS, round(n_tokens)))
