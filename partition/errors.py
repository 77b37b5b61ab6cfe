"""What can go wrong while planning: the members cannot hold a model, or a value is not a plan."""

from __future__ import annotations

from covey.errors import CoveyError


class PartitionError(CoveyError):
    """Base of everything the planner refuses."""


class PlanInfeasible(PartitionError):
    """No plan exists with these devices and links; more room or another link would help."""

    def __init__(self, advice: str, *, missing_bytes: int = 0, missing_blocks: int = 0) -> None:
        super().__init__(advice)
        self.missing_bytes = missing_bytes
        self.missing_blocks = missing_blocks


class InvalidPlan(PartitionError):
    """A plan, profile or layout is out of bounds; whoever published it is wrong. Ignore it."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field
