"""How every benchmark reports: a table for people, one JSON object for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Row:
    """One figure; `target` is None for one that only stands beside another."""

    figure: str
    value: float
    target: float | None = None
    direction: Literal["at most", "at least"] = "at most"

    @property
    def met(self) -> bool | None:
        """Whether the value is on the right side of its target."""
        if self.target is None:
            return None
        if self.direction == "at most":
            return self.value <= self.target
        return self.value >= self.target


def report(rows: Sequence[Row]) -> None:
    """Print the table and, as the last line, the JSON object. A miss is printed, not hidden."""
    width = max((len(row.figure) for row in rows), default=0)
    for row in rows:
        wanted = "" if row.target is None else f"{row.direction} {row.target:g}"
        verdict = {True: "met", False: "MISSED", None: ""}[row.met]
        print(f"{row.figure:{width}}  {row.value:>10.4g}  {wanted:<14} {verdict}")
    missed = sum(row.met is False for row in rows)
    print(json.dumps({"rows": [{**asdict(row), "met": row.met} for row in rows], "missed": missed}))
