"""`effbench runs`: what there is, one of them, and removing what is not needed."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from effbench.cli.options import Results, complete_run
from effbench.util.errors import UserError
from effbench.util.wrap import write

if TYPE_CHECKING:
    from effbench.results.housekeeping import Removal
    from effbench.results.store import Store

FILTER = re.compile(r"[a-z_.]+=.*")
WITH_VALUE = ("--results",)
"""Options whose value is the next word."""


class _Filters(TyperGroup):
    """A command with subcommands that takes `NAME=VALUE` words where none is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not any(word in self.commands for word in args):
            after = zip(["", *args], args, strict=False)
            filters = [w for last, w in after if FILTER.match(w) and last not in WITH_VALUE]
            ctx.meta["filters"] = filters
            args = [word for word in args if word not in filters]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[NAME=VALUE]...", *super().collect_usage_pieces(ctx)]


app = typer.Typer(
    cls=_Filters,
    invoke_without_command=True,
    rich_markup_mode=None,
)
Run = Annotated[str, typer.Argument(help="Key, prefix or latest.", autocompletion=complete_run)]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@app.callback()
def runs(
    context: typer.Context,
    results: Results = Path("results"),
    full: Annotated[
        bool, typer.Option("--full", help="Show the bytes on disk and the command of each, too.")
    ] = False,
) -> None:
    """List runs: all, or those that fit NAME=VALUE words.

    Names are key, stage, method, model, dataset, seed and state (finished, running, interrupted);
    values may have commas between them and `*` for any text.

    \b
    Examples:
      effbench runs
      effbench runs method=lora,qlora state=finished
      effbench runs state=interrupted --full
      effbench runs show latest
      cd $(effbench runs path latest)
      effbench runs rm 3f2a91c0
      effbench runs clean
      effbench runs query "select method, point, value from metrics where name = 'loss'"
    """
    if context.invoked_subcommand is None:
        from effbench.report.runs import fitted, listing
        from effbench.results.store import Store

        table = listing(Store(results), context.meta.get("filters", ()), full)
        width = shutil.get_terminal_size().columns
        typer.echo(fitted(table, width) if sys.stdout.isatty() else table.text() + "\n")


@app.command(name="show")
def show(
    run: Run,
    results: Results = Path("results"),
    spec: Annotated[bool, typer.Option("--spec", help="Print the whole spec as JSON.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Show every metric of every operating point.")
    ] = False,
) -> None:
    """Show the metrics of a finished run."""
    from effbench.results.lookup import find

    record = find(results / "records", run)
    if spec:
        import json

        typer.echo(json.dumps(record.spec, indent=1, sort_keys=True))
    else:
        from effbench.report.terminal import print_record

        print_record(record, full)


@app.command(name="path")
def path(run: Run, results: Results = Path("results")) -> None:
    """Print the folder of a run."""
    from effbench.results.store import Store

    store = Store(results)
    typer.echo(store.run(store.resolve(run)).path)


@app.command(name="query")
def query(
    sql: Annotated[str, typer.Argument(help="DuckDB SQL over `records` and `metrics`.")],
    results: Results = Path("results"),
) -> None:
    """Answer an SQL query over all records."""
    from effbench.report.terminal import print_rows
    from effbench.results.query import query

    print_rows(query(results / "records", sql))


@app.command(name="rm")
def rm(
    runs: Annotated[list[str], typer.Argument(help="Keys.", autocompletion=complete_run)],
    results: Results = Path("results"),
    yes: Yes = False,
) -> None:
    """Remove runs with their records.

    One that others started from stays, unless they are named too.
    """
    from effbench.results.housekeeping import removal_of
    from effbench.results.store import Store

    store = Store(results)
    _remove(store, removal_of(store, runs), yes)


@app.command(name="clean")
def clean(
    results: Results = Path("results"),
    interrupted: Annotated[
        bool, typer.Option("--interrupted", help="Remove interrupted runs, too.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Remove what nobody needs: leftovers of killed processes, runs that had hardly begun.

    Finished runs, their records and runs at work stay.
    """
    from effbench.results.housekeeping import leftovers
    from effbench.results.store import Store

    store = Store(results)
    if found := leftovers(store, interrupted):
        _remove(store, found, yes)
    else:
        write("Nothing to remove.")


def _remove(store: Store, removals: Sequence[Removal], yes: bool) -> None:
    from effbench.report.table import readable

    total = readable(sum(removal.bytes for removal in removals), "bytes")
    for removal in removals:
        typer.echo(f"{removal.key}  {readable(removal.bytes, 'bytes')}  {removal.what}")
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("Nobody is there to be asked.", "Add --yes to remove these.")
        typer.confirm(f"Remove {total}?", abort=True)
    for removal in removals:
        removal.carry_out(store)
    write(f"Removed {total}.")
