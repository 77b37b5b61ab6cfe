"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Home = Annotated[
    Path | None,
    typer.Option(
        help="State folder of the node.", envvar="COVEY_HOME", show_default="the platform's"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print facts as JSON, for machines.")]
Url = Annotated[
    str | None,
    typer.Option(help="Ask the node at this address instead of the one on this machine."),
]
ApiKey = Annotated[
    str | None, typer.Option(help="Key of the API at --url.", envvar="COVEY_API_KEY")
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[
    float, typer.Option(min=0.0, max=2.0, help="0 always takes the likeliest token.")
]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this share only.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from this many tokens only; 0: from all.")]
Seed = Annotated[int | None, typer.Option(help="Makes a sampled answer repeatable.")]
Raw = Annotated[
    bool, typer.Option("--raw", help="Go on from the text itself, without a chat template.")
]
