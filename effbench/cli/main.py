"""The command line: its commands, each in a file of its subject, and how their errors are said.

A command is thin; it imports what it needs when it runs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from effbench.cli import choosing, comparing, launching, machine, runs, sweeps, using
from effbench.util.errors import RunFailedError, UserError
from effbench.util.files import places
from effbench.util.wrap import write


class _Words(TyperGroup):
    """The words of a command; one with a stray dash is named whole, where click names a letter."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = args[: args.index("--")] if "--" in args else args
        for word in () if ctx.resilient_parsing else options:
            if re.match(r"-[a-zA-Z_]{2}", word):
                raise UserError(
                    f"No such option: {word}",
                    "Options have two dashes (--dry-run), overrides none (train.max_steps=3).",
                )
        return super().parse_args(ctx, args)


MANY = 100_000
"""New objects before cycles among them are looked for: what a command reads stays to its end, and
looking through all of it again and again takes a tenth of a table's time."""

app = typer.Typer(
    name="effbench",
    cls=_Words,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Fine-tune, compress and evaluate language models with efficiency methods, and say what
it really cost and what it really kept.

\b
First steps:
  effbench train method=qdylora            train on the default model and questions
  effbench eval from=latest                evaluate it again, for example on other data
  effbench runs                            what has been run
  effbench compare latest KEY              what differs, and what cannot be told apart
  effbench list methods                    what there is to choose from
  effbench show method qdylora             one method: paper, settings, operating points
""",
)


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=lambda asked: _print_version(asked),
            help="Print the version.",
        ),
    ] = False,
) -> None:
    """Options before the command."""


def _print_version(asked: bool) -> None:
    if asked:
        from effbench import __version__

        typer.echo(f"effbench {__version__}")
        raise typer.Exit


launching.add_to(app)
app.add_typer(runs.app, name="runs")
app.add_typer(sweeps.app, name="sweep")
comparing.add_to(app)
choosing.add_to(app)
machine.add_to(app)
using.add_to(app)


def _say(text: str) -> None:
    write(text)


def _require_here() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError(
            "The current folder is gone.", "Change to another one, or make it again."
        ) from None


def _guarded(command: Callable[[], Any]) -> int:
    try:
        _require_here()
        with places():
            command()
    except UserError as error:
        _say(f"Error: {error.message}" + (f"\n{error.hint}" if error.hint else ""))
        return 2
    except RunFailedError as failure:
        return failure.status
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except (KeyboardInterrupt, SystemExit) as stop:  # typer makes the second of the first
        if getattr(stop, "code", 130) != 130:
            raise
        _say("Stopped.")
        return 130
    return 0


def _only(words: Sequence[str]) -> typer.Typer:
    """Return the command line with no other command than the one that is given.

    Typer looks into the signature of each, which would take half of the time of a list.
    """
    one, name = copy(app), words[0] if words else ""
    one.registered_groups = [g for g in app.registered_groups if g.name == name]
    one.registered_commands = [
        c
        for c in app.registered_commands
        if name == (c.name or getattr(c.callback, "__name__", ""))
    ]
    return one if one.registered_commands or one.registered_groups else app


def main() -> None:
    """Run the command line."""
    import gc
    import os

    from effbench.runner.signals import interrupt_when_asked

    interrupt_when_asked()
    gc.set_threshold(MANY)
    # Looking for plug-ins of pydantic reads the metadata of every installed package.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    if "_EFFBENCH_COMPLETE" in os.environ:
        _only(os.environ.get("COMP_WORDS", "").split()[1:-1])()
    if {"--install-completion", "--show-completion"} & {*sys.argv}:
        from effbench.cli.completion import leave_room_for_values

        leave_room_for_values()
    sys.exit(_guarded(_only(sys.argv[1:])))
