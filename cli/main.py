"""The `covey` command."""

from __future__ import annotations

from typing import Annotated

import typer

from covey import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"covey {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Run one language model over the computers you already own."""


def main() -> None:
    """Entry point of the console script."""
    app()
