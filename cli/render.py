"""How facts look: JSON for machines, tables for people, one line for an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def print_json(value: object) -> None:
    """One line of JSON on standard output."""
    sys.stdout.write(json.dumps(value, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def show(value: dict[str, Any], *, as_json: bool, render: Callable[[dict[str, Any]], None]) -> None:
    """Print facts as JSON or through `render`."""
    if as_json:
        print_json(value)
    else:
        render(value)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; numbers, which begin with a digit, are set to the right."""
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for idx, column in enumerate(columns):
        is_number = bool(rows) and all(row[idx][:1].isdigit() or row[idx] == "-" for row in rows)
        grid.add_column(column, justify="right" if is_number else "left")
    for row in rows:
        grid.add_row(*map(Text, row))  # as it is: names and addresses may hold brackets
    out.print(grid)


def size(n_bytes: float) -> str:
    """Bytes for people: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def seconds(value: float | None) -> str:
    """A time for people: 3.2 ms."""
    if value is None:
        return "-"
    return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"
