"""What plans may be made of: a node plans for what the nodes of its version can run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """How far a search goes beyond one chain of single devices."""

    max_members: int = 4  # of one tensor-parallel group
    max_pipelines: int = 4  # side by side
    may_stream: bool = True  # weights from disk, where no plan holds the model in memory


EVERYTHING = Scope()
CHAINS = Scope(max_members=1, max_pipelines=1, may_stream=False)
