"""The twenty labs of plans, as data: devices, links, a model; and the model that nodes start with.

Both published settings are among them, by the names of their links: `tpi-llm` and `paretopipe`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from benchmarks.synthetic import SHAPES, synthetic

from .fleet import Member


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One lab."""

    name: str
    members: tuple[Member, ...]
    model: str = "smollm2"  # or a shape of `benchmarks.synthetic` and its type, as "tp-512.Q4_0"


def _case(devices: str, links: str, **options: object) -> Case:
    """Kinds of devices, and one link for all or one for each."""
    kinds, presets = devices.split(), links.split()
    if len(presets) == 1:
        presets *= len(kinds)
    caps = options.pop("max_blocks", None)
    members = tuple(
        Member(kind=kind, link=link, max_blocks=caps)  # type: ignore[arg-type]
        for kind, link in zip(kinds, presets, strict=True)
    )
    forced = "" if caps is None else f", {caps} blocks each"
    model = options.get("model", "smollm2")
    named_model = "" if model == "smollm2" else f"{model}, "
    name = f"{named_model}{'+'.join(kinds)}, {'+'.join(dict.fromkeys(presets))}{forced}"
    return Case(name=name, members=members, **options)  # type: ignore[arg-type]


CASES = (
    _case("desktop laptop", "ethernet"),
    _case("desktop pi4", "ethernet"),
    _case("pi5 pi5", "ethernet"),
    _case("pi4 pi4 pi4 pi4", "ethernet"),
    _case("laptop pi5 pi4", "ethernet"),
    _case("desktop laptop", "good-wifi"),
    _case("laptop pi5", "good-wifi"),
    _case("laptop pi4 pi4", "good-wifi"),
    _case("desktop laptop pi5 pi4", "good-wifi"),
    _case("desktop pi5", "bad-wifi"),
    _case("laptop laptop", "bad-wifi"),
    _case("desktop laptop", "uplink"),
    _case("laptop pi5", "tpi-llm"),
    _case("pi5 pi5 pi5 pi5", "tpi-llm"),
    _case("laptop pi5", "paretopipe"),
    _case("desktop laptop pi5", "ethernet good-wifi bad-wifi"),
    # From here on nobody can hold all of it.
    _case("laptop pi5", "ethernet", model="tp-512.Q4_0", max_blocks=20),
    _case("desktop laptop pi5 pi4", "ethernet", model="tp-512.Q4_0", max_blocks=14),
    _case("laptop pi5 pi5", "ethernet good-wifi bad-wifi", max_blocks=20),
    _case("desktop laptop", "paretopipe", max_blocks=20),
)


def source_of(model: str) -> tuple[str, str]:
    """What nodes are started with, and what they call it; makes the file if there is none."""
    kind, _, type_name = model.partition(".")
    if not type_name:
        return model, model
    path = synthetic(SHAPES[kind], type_name, print)
    return str(path), path.stem


def add_case_option(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """An option that takes the number of a case, from 1."""
    numbers = range(1, len(CASES) + 1)
    parser.add_argument(name, type=int, metavar="N", choices=numbers, **options)
