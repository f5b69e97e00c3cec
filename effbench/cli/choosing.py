"""Commands that say what there is to choose from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from effbench.cli.options import ConfigDirs, Overrides
from effbench.util.errors import UserError
from effbench.util.wrap import columns, write

Kind = Literal[
    "methods",
    "models",
    "datasets",
    "evaluators",
    "hardware",
    "launchers",
    "experiments",
    "sweeps",
    "tables",
    "tasks",
]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file to a command line."""
    app.command(name="list")(list_)
    app.command()(show)


def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    pattern: Annotated[str, typer.Argument(help="Only names that fit, for example 'q*'.")] = "*",
    config_dir: ConfigDirs = None,
) -> None:
    """List what there is to choose from, with one line each.

    \b
    Examples:
      effbench list methods
      effbench list models 'llama*'
    """
    from effbench.cli.listing import entries

    found = entries(kind, pattern, list(config_dir or []))
    if not found:
        raise UserError(f"No {kind} fit {pattern!r}.", f"See: effbench list {kind}")
    width = max(len(name) for name, _ in found)
    for name, line in found:
        write(f"{name:<{width}}  {line}".rstrip(), sys.stdout, width + 2)


def show(
    kind: Annotated[
        Literal["method", "model", "dataset", "evaluator", "hardware", "sweep"],
        typer.Argument(help="What it is."),
    ],
    name: Annotated[str, typer.Argument(help="Its name.")],
    overrides: Overrides = None,
    rows: Annotated[
        int, typer.Option(min=0, help="Of a dataset: so many rows as a model sees them.")
    ] = 0,
    split: Annotated[str, typer.Option(help="With --rows: of which split; else train.")] = "",
    config_dir: ConfigDirs = None,
) -> None:
    """Explain one method, model, dataset, evaluator or grid: source, settings, operating points.

    With --rows it shows rows of a dataset in their template, as tokens of the model, and which of
    them count in the loss: coloured in a terminal, in brackets elsewhere.

    \b
    Examples:
      effbench show method qdylora
      effbench show model llama2-7b
      effbench show dataset gsm8k-test --rows 3
      effbench show dataset file dataset.files.all=my.jsonl --rows 3
    """
    from effbench.cli.show import describe

    words, extra = list(overrides or []), list(config_dir or [])
    if not rows and not words and not split:
        write(describe(kind, name, extra), sys.stdout)
        return
    if kind != "dataset" or not rows:
        raise UserError(
            "Settings, --rows and --split show rows of a dataset.",
            "Leave them out, or say: effbench show dataset NAME KEY=VALUE --rows 3",
        )
    _show_rows([f"dataset={name}", "evaluator=[]", *words], extra, rows, split)


def _show_rows(words: list[str], extra: list[Path], count: int, split: str) -> None:
    from effbench.cli.rows import rows
    from effbench.config.compose import compose

    job = compose("eval", words, extra)
    for note in job.notes:
        write(note)
    for row in rows(job.spec, count, sys.stdout.isatty(), columns(), split):
        typer.echo(row)
