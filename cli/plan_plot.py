"""A picture of a front: what one session waits for, against what all sessions get together.

Drawn with matplotlib, which is only installed where somebody asked for it (`covey[plot]`).
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covey.client import BadRequest

from .plan_render import pipelines_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png", ".html")
MAX_MEASURED = 200
LOG_FROM = 8  # a longer axis than this is logarithmic
MAX_LABELLED = 15  # points with their number beside them; more would hide each other
DPI = 150

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What somebody measured a plan to do."""

    label: str
    tpot_s: float
    throughput_tok_per_s: float
    ttft_s: float | None = None


def measured_points(value: object, where: str) -> list[Measured]:
    """Read a JSON list of measured figures.

    Raises:
        BadRequest: names the entry that is wrong.
    """
    if not isinstance(value, list) or len(value) > MAX_MEASURED:
        raise BadRequest(f"{where}: must be a list of at most {MAX_MEASURED} measurements")
    return [_measured(entry, f"{where}: entry {idx}") for idx, entry in enumerate(value, start=1)]


def draw(facts: Facts, path: Path, measured: Sequence[Measured] = ()) -> None:
    """Draw the plans in `facts` into a file, whose suffix says in which form.

    Raises:
        BadRequest: another suffix, nothing to draw, no matplotlib, or a file that cannot be
            written.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise BadRequest(f"{path}: must end with {', '.join(FORMATS)}")
    if not facts["points"]:
        raise BadRequest(f"there is no plan to draw: {facts['infeasible']}")
    figure = _figure(facts, measured)
    buffer = io.BytesIO()
    if suffix == ".png":
        figure.savefig(buffer, format="png", dpi=DPI)
    else:
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = buffer.getvalue()
    if suffix == ".html":
        data = _page(facts, data.decode()).encode()
    try:
        path.write_bytes(data)
    except OSError as error:
        raise BadRequest(f"{path}: {error.strerror}") from error


def _measured(entry: object, where: str) -> Measured:
    if not isinstance(entry, Mapping):
        raise BadRequest(f"{where}: must be an object")
    label = entry.get("label", "")
    if not isinstance(label, str) or len(label) > 100:
        raise BadRequest(f"{where}: label must be a text of at most 100 characters")
    ttft_s = entry.get("ttft_s")
    return Measured(
        label=label,
        tpot_s=_positive(entry.get("tpot_s"), f"{where}: tpot_s"),
        throughput_tok_per_s=_positive(
            entry.get("throughput_tok_per_s"), f"{where}: throughput_tok_per_s"
        ),
        ttft_s=None if ttft_s is None else _positive(ttft_s, f"{where}: ttft_s"),
    )


def _positive(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRequest(f"{where} must be a number")
    if not (0 < value < 1e9 and math.isfinite(value)):
        raise BadRequest(f"{where} must be above 0")
    return float(value)


def _figure(facts: Facts, measured: Sequence[Measured]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BadRequest(
            "pictures need matplotlib: install it with pip install 'covey[plot]'"
        ) from error
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(
        f"{facts['model']}: plans worth having, {facts['workload']['sessions']} sessions at once, "
        f"questions of {facts['workload']['prompt_tokens']} tokens"
    )
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_axes(left, facts, "tpot_s", [(one.tpot_s, one) for one in measured])
    left.set_xlabel("each token, one session alone (ms)")
    left.set_ylabel("all sessions together (tokens/s)")
    first = [(one.ttft_s, one) for one in measured if one.ttft_s is not None]
    _draw_axes(right, facts, "ttft_s", first)
    right.set_xlabel("first token (ms)")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _draw_axes(
    axes: Axes, facts: Facts, field: str, measured: Sequence[tuple[float, Measured]]
) -> None:
    from matplotlib.ticker import StrMethodFormatter

    points = facts["points"]
    axes.scatter(*_xy(points, field), s=28, color="tab:blue", label="predicted", zorder=3)
    single = facts["single"]
    if single is not None:
        axes.scatter(
            *_xy([single], field),
            s=48,
            marker="s",
            color="tab:gray",
            label="one machine alone",
            zorder=2,
        )
    for name, key, color in (
        ("chosen", "is_chosen", "tab:orange"),
        ("active", "is_active", "tab:green"),
    ):
        marked = [point for point in points if point[key]]
        size = 130 if key == "is_chosen" else 220
        if marked:
            axes.scatter(
                *_xy(marked, field),
                s=size,
                facecolors="none",
                edgecolors=color,
                linewidths=1.8,
                label=name,
                zorder=4,
            )
    if measured:
        places = [(value * 1e3, one.throughput_tok_per_s) for value, one in measured]
        across, up = zip(*places, strict=True)
        axes.scatter(across, up, marker="x", s=40, color="tab:red", label="measured")
        for (x, y), (_, one) in zip(places, measured, strict=True):
            _label(axes, one.label, x, y, "tab:red", above=False)
    for point in points if len(points) <= MAX_LABELLED else [p for p in points if _is_marked(p)]:
        (x,), (y,) = _xy([point], field)
        _label(axes, str(point["n"]), x, y, "tab:blue", above=True)
    drawn = [*points, *([] if single is None else [single])]
    xs = [*_xy(drawn, field)[0], *(value * 1e3 for value, _ in measured)]
    if max(xs) > LOG_FROM * min(xs):
        axes.set_xscale("log")
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis(StrMethodFormatter("{x:g}"))
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.margins(x=0.08, y=0.1)
    axes.set_ylim(bottom=0)


def _is_marked(point: Facts) -> bool:
    return bool(point["is_chosen"] or point["is_active"])


def _xy(points: Sequence[Facts], field: str) -> tuple[list[float], list[float]]:
    return [point[field] * 1e3 for point in points], [
        point["throughput_tok_per_s"] for point in points
    ]


def _label(axes: Axes, text: str, x: float, y: float, color: str, *, above: bool) -> None:
    # A $ would begin a formula.
    axes.annotate(
        text.replace("$", r"\$"),
        (x, y),
        xytext=(5, 5 if above else -11),
        textcoords="offset points",
        fontsize=8,
        color=color,
    )


def _page(facts: Facts, svg: str) -> str:
    """The picture in a page of its own, with the plans as a table below it."""
    head = ("no.", "stages", "first token", "per token", "all sessions", "")
    rows = [
        (
            str(point["n"]),
            pipelines_text(point),
            f"{point['ttft_s'] * 1e3:.1f} ms",
            f"{point['tpot_s'] * 1e3:.2f} ms",
            f"{point['throughput_tok_per_s']:.1f} tokens/s",
            ", ".join(
                word
                for word, key in (("chosen", "is_chosen"), ("active", "is_active"))
                if point[key]
            ),
        )
        for point in facts["points"]
    ]
    title = html.escape(f"Plans of {facts['model']}")
    cells = "\n".join(f"<tr>{_cells('td', row)}</tr>" for row in rows)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        "<style>body{font:15px sans-serif;margin:2em}td,th{text-align:left;padding:.2em 1em}"
        "svg{max-width:100%;height:auto}</style>\n"
        f"<h1>{title}</h1>\n{svg[svg.index('<svg') :]}\n"
        f"<table>\n<tr>{_cells('th', head)}</tr>\n{cells}\n</table>\n</html>\n"
    )


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)
