"""`effbench sweep`: which grids there are, and how far one of them is."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from effbench.cli.options import Results
from effbench.util.errors import UserError
from effbench.util.wrap import write

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="How far grids of runs are.")


def _complete(incomplete: str) -> list[str]:
    from effbench.results.store import results_dir
    from effbench.results.sweeps import grids

    names = ["latest", *(folder.name for folder in grids(results_dir()))]
    return [name for name in names if name.startswith(incomplete)]


Ref = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="latest, the name of a grid's config, or when it began as list shows it.",
        autocompletion=_complete,
    ),
]


@app.command(name="status")
def status(ref: Ref = "latest", results: Results = Path("results")) -> None:
    """Say how far a grid is that runs here, runs elsewhere or has ended.

    \b
    Examples:
      effbench sweep status
      effbench sweep status lora_rates
    """
    from effbench.report.grid import overview
    from effbench.results.sweeps import find_grid, read_grid

    folder = find_grid(results, ref)
    grid = read_grid(folder)
    write(f"{folder.name}  {grid.command}".rstrip(), sys.stdout)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**6
    for line in overview(grid.cells, grid.jobs, width):
        typer.echo(line)


@app.command(name="list")
def list_(results: Results = Path("results")) -> None:
    """List the grids that were begun, newest first."""
    from effbench.report.grid import counts
    from effbench.results.sweeps import grids, read_grid

    if not (known := grids(results)):
        raise UserError(f"There is no grid in {results}.", "Run one: effbench train -m seed=0,1")
    for folder in known:
        grid = read_grid(folder)
        typer.echo(f"{folder.name}  {grid.name or '-'}  {counts(grid.cells)}")
