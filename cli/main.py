"""The `covey` command.

Commands import what they need when they run, so that `covey --help` is instant.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from covey import CoveyError, __version__

from . import ask, demo, doctor, facts, members, nodes, plan
from .render import err

COMMANDS: tuple[Callable[..., None], ...] = (
    nodes.up,
    nodes.join,
    ask.run,
    ask.chat,
    plan.plan,
    facts.status,
    facts.models,
    doctor.doctor,
    doctor.ping,
    nodes.invite,
    nodes.stop,
    demo.demo,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(members.app, name="members")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"covey {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    """Run one language model over the computers you already own."""


def main() -> None:
    """Entry point of the console script: errors that a person can act on take one line."""
    try:
        app()
    except CoveyError as error:
        err.print(f"covey: {error}", markup=False, soft_wrap=True)
        sys.exit(1)
    except BrokenPipeError:
        # `covey status | head`: whoever read us has seen enough.
        sys.stderr.close()
        sys.exit(1)
