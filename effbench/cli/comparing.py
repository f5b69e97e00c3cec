"""Commands that hold finished runs against each other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from effbench.cli.choosing import list_
from effbench.cli.options import Results, complete_run
from effbench.runner.progress import Progress
from effbench.util.errors import UserError
from effbench.util.wrap import columns, write

SizeOption = Annotated[
    Literal["screen", "column", "page"],
    typer.Option("--size", help="Of the plot; column and page: of a paper in two columns."),
]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file to a command line."""
    for command in (compare, report, gate, power, table):
        app.command()(command)


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Two or more runs; the first, RUN or RUN@POINT, is the one compared with.",
            autocompletion=complete_run,
        ),
    ],
    results: Results = Path("results"),
    form: Annotated[
        Literal["text", "md", "csv", "json"], typer.Option("--format", help="Form of the table.")
    ] = "text",
    full: Annotated[
        bool, typer.Option("--full", help="Show every number (other formats always do).")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw a metric over operating points.")
    ] = None,
    metric: Annotated[str, typer.Option(help="Metric of the plot.")] = "loss",
    of: Annotated[
        Literal["values", "differences"], typer.Option("--of", help="What is drawn of it.")
    ] = "values",
    size: SizeOption = "screen",
    margin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X or METRIC=X",
            help="Difference that still counts as none, in the metric's unit; may be repeated.",
        ),
    ] = None,
    select: Annotated[
        str,
        typer.Option(
            metavar="METRIC@SPLIT",
            help="Of each run only the operating point that is best there; shown on other splits.",
        ),
    ] = "",
    same_points: Annotated[
        bool,
        typer.Option("--same-points", help="Hold rows against the first run at the same point."),
    ] = False,
    flips: Annotated[
        int | None,
        typer.Option(
            "--flips",
            min=0,
            metavar="N",
            help="Instead: items right in one of two RUN[@POINT] alone, N of each way.",
        ),
    ] = None,
) -> None:
    """Compare runs on the same items: differences with intervals, and what cannot be told apart.

    Runs of one spec with several seeds make one row, tested over seeds and items. With --margin it
    says too what is equivalent, or at least not worse. With --select each run, or group of seeds,
    is there at one point, chosen on validation data. With --same-points each rank, depth or other
    point is compared with that of the first run, and not with the first run's first.

    \b
    Examples:
      effbench compare latest 3f2a
      effbench compare 3f2a@r8 91bc
      effbench compare 3f2a 91bc 07de --format md
      effbench compare 3f2a 91bc --margin loss=0.02 --margin accuracy=0.01
      effbench compare 3f2a 91bc --select loss@validation
      effbench compare 3f2a 91bc --same-points
      effbench compare 3f2a 91bc@r8 --flips 5
      effbench compare 3f2a 91bc --plot curve.png
      effbench compare 3f2a 91bc --plot forest.svg --of differences --size column
    """
    from effbench.report.comparison.compare import compare as compare_records
    from effbench.report.comparison.compare import margins_of
    from effbench.report.comparison.reference import reference_of, said_of
    from effbench.report.comparison.select import Selection, criterion_of, select_points
    from effbench.report.facts import told_of
    from effbench.report.terminal import print_comparison
    from effbench.results.lookup import find
    from effbench.results.store import Store
    from effbench.results.sweeps import tunings
    from effbench.results.tunings import tuned_together

    if flips is not None:
        from effbench.cli.gate import flips_of

        write(flips_of(runs, results, flips), sys.stdout)
        return
    if select and same_points:
        raise UserError(
            "--select leaves each run with one point, and --same-points compares at all of them.",
            "Leave one of the two out.",
        )
    if "@" in runs[0] and (select or same_points):
        raise UserError(
            f"{runs[0]} names a point, and {'--select' if select else '--same-points'} another.",
            f"Name the run alone: {runs[0].partition('@')[0]}.",
        )
    folder = results / "records"
    records = [reference_of(runs[0], folder), *(find(folder, run) for run in runs[1:])]
    tuned = [*tunings(results), *tuned_together(results)]
    known = told_of(records, Store(results), tuned)
    chosen = Selection(records, [])
    if select:
        chosen = select_points(records, criterion_of(select), known)
    said = [] if select or same_points else said_of(runs[0], records[0])
    found = compare_records(
        chosen.records,
        known,
        margins_of(margin or []),
        [*chosen.words, *said],
        same_points=same_points,
        tunings=tuned,
    )
    if form == "text":
        print_comparison(found, full)
    else:
        typer.echo({"md": found.markdown, "csv": found.csv, "json": found.json}[form]())
    if plot:
        from effbench.report.plots.curves import comparison_plot
        from effbench.report.plots.forest import forest_plot

        {"values": comparison_plot, "differences": forest_plot}[of](found, metric, plot, size)
        write(f"Plot: {plot}")


def power(
    runs: Annotated[
        list[str] | None,
        typer.Argument(help="Further runs to estimate from.", autocompletion=complete_run),
    ] = None,
    from_: Annotated[
        list[str] | None,
        typer.Option("--from", help="Runs to estimate from.", autocompletion=complete_run),
    ] = None,
    metric: Annotated[str, typer.Option(help="Metric of the runs.")] = "accuracy",
    task: Annotated[str, typer.Option(help="Benchmark task of the metric.")] = "",
    difference: Annotated[
        list[float] | None,
        typer.Option(help="To be seen: points for shares, else in the metric's unit; repeatable."),
    ] = None,
    items: Annotated[int | None, typer.Option(min=2, help="Items there are.")] = None,
    seeds: Annotated[int | None, typer.Option(min=2, help="Seeds there are.")] = None,
    accuracy: Annotated[float | None, typer.Option(min=0, max=1, help="Of the first.")] = None,
    discordance: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of items only one gets right.")
    ] = None,
    sd: Annotated[float | None, typer.Option(min=0, help="Of the difference, over items.")] = None,
    seed_sd: Annotated[float | None, typer.Option(min=0, help="Of a run, over seeds.")] = None,
    power: Annotated[float, typer.Option(min=0.06, max=0.999, help="Wanted.")] = 0.8,
    alpha: Annotated[float, typer.Option(min=1e-6, max=0.5, help="Two-sided.")] = 0.05,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the smallest difference over items.")
    ] = None,
    form: Annotated[
        Literal["text", "md", "csv"], typer.Option("--format", help="Form of the table.")
    ] = "text",
    results: Results = Path("results"),
) -> None:
    """Say how many items and seeds it takes to see a difference, and what a number can show.

    Two runs on the same items tell how much their answers differ. One run, or an accuracy, tells
    it only as if the other answered independently: more items than needed. Several seeds of a run
    tell the spread over seeds.

    \b
    Examples:
      effbench power --from 3f2a 91bc --metric loss --difference 0.02
      effbench power --accuracy 0.45 --difference 1
      effbench power --discordance 0.08 --items 1319 --difference 1 --difference 2
      effbench power --discordance 0.08 --seed-sd 0.004 --items 1319 --difference 1
      effbench power --discordance 0.08 --plot power.png
    """
    from effbench.report.power import Wanted, estimate, render, stated
    from effbench.results.lookup import earlier, find

    wanted = Wanted(tuple(difference or ()), items, seeds, power, alpha)
    keys = [*(from_ or []), *(runs or [])]
    folder = results / "records"
    if keys:
        chosen = [find(folder, key) for key in keys]
        case = estimate(chosen, metric, task, earlier(chosen, folder))
        case = case.override(discordance, sd, seed_sd)
    else:
        case = stated(accuracy, discordance, sd, seed_sd)
    typer.echo(render(case, wanted, form))
    if plot:
        from effbench.report.plots.power import power_plot

        power_plot(case, wanted, plot)
        write(f"Plot: {plot}")


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(help="Runs; all of them by default.", autocompletion=complete_run),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path(
        "report.html"
    ),
    against: Annotated[
        str,
        typer.Option(
            metavar="RUN[@POINT]",
            help="Run that others are held against; else the first one that is named.",
            autocompletion=complete_run,
        ),
    ] = "",
    results: Results = Path("results"),
) -> None:
    """Write runs as one HTML file: a table to filter and sort, charts, differences, commands.

    It opens from disk in a browser and reaches no network. With a run to hold others against, it
    has the tests of compare, which take a few seconds where there are hundreds of runs.

    \b
    Examples:
      effbench report
      effbench report --against 3f2a -o all.html
      effbench report --against 3f2a@r8
      effbench report 3f2a 91bc 07de
    """
    from effbench.report.page.write import write_report

    with Progress(sys.stderr.isatty()).during("report"):
        count = write_report(results, runs or [], against, output)
    write(f"Written: {output} ({count} run{'' if count == 1 else 's'})")


def gate(
    policy: Annotated[Path, typer.Argument(help="YAML with margins and limits: docs/gate.md.")],
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN[@POINT]",
            help="What is to be let through; seeds of one run are joined by +.",
            autocompletion=complete_run,
        ),
    ],
    against: Annotated[
        str,
        typer.Option(
            "--against",
            metavar="BASE[@POINT]",
            help="What it is held against.",
            autocompletion=complete_run,
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON.")] = False,
    results: Results = Path("results"),
) -> None:
    """Let a run through, or not: one verdict over the metrics and limits of a policy.

    Metrics are held against their margin by the paired tests of compare, adjusted for each other.
    The exit status is 0 for GO, 1 for NO-GO, 3 for INCONCLUSIVE, and 2 for a mistake in what was
    given.

    \b
    Examples:
      effbench gate default latest --against 3f2a
      effbench gate policy.yaml 91bc@r8 --against 3f2a
      effbench gate policy.yaml 91bc+07de@r8 --against 3f2a --json
    """
    from effbench.cli.gate import judgement_of
    from effbench.report.gate.verdict import STATUS
    from effbench.report.terminal import print_table

    found = judgement_of(policy, run, against, results)
    if as_json:
        typer.echo(found.json(), nl=False)
    else:
        print_table(found.table(), named=2)
        for line in found.lines():
            write(line, sys.stdout)
    raise typer.Exit(STATUS[found.verdict])


def table(
    name: Annotated[str, typer.Argument(help="Its name, or a file; none lists them.")] = "",
    form: Annotated[
        Literal["terminal", "markdown", "latex", "csv"],
        typer.Option("--format", help="Form of the table."),
    ] = "terminal",
    full: Annotated[
        bool, typer.Option("--full", help="Every metric with its tests, budgets and settings.")
    ] = False,
    run: Annotated[
        bool, typer.Option("--run", help="First run what is missing, and write results/tables.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what --run takes and of what commands; run none.")
    ] = False,
    scale: Annotated[
        str,
        typer.Option(
            "--scale",
            metavar="mechanism|offline|gpu|paper",
            help="Its cells at that scale: their plan until they have run. Else its own.",
        ),
    ] = "",
    plot: Annotated[
        Path | None, typer.Option(help="Draw it instead: a file that ends in .png, .pdf or .svg.")
    ] = None,
    of: Annotated[
        Literal["differences", "values", "curves"],
        typer.Option("--of", help="What is drawn; curves: training losses, a band over seeds."),
    ] = "differences",
    size: SizeOption = "screen",
    results: Results = Path("results"),
) -> None:
    """Show a table of several methods with several seeds, from records alone.

    It ends with what was asked, what the paired tests found, and what would overturn it.

    \b
    Examples:
      effbench table
      effbench table qdylora
      effbench table qdylora --format latex
      effbench table qdylora --run --dry-run
      effbench table qdylora --run
      effbench table qdylora --scale paper
      effbench table grand
      effbench table grand --plot pareto.pdf --size page
      effbench table qdylora --plot differences.pdf --size column
    """
    if not name:
        list_("tables")
        return
    from effbench.cli.tables import (
        campaign_named,
        gathers,
        grand_named,
        is_planned,
        run_campaign,
        would_run,
    )
    from effbench.report.campaign_table import rendered

    if gathers(name):
        from effbench.report.grand_table import pareto
        from effbench.report.grand_table import rendered as whole

        if run or dry_run or scale:
            raise UserError(
                f"{name} gathers other tables as they are: it runs nothing.",
                "Name one of them: effbench table qdylora --run",
            )
        grand = grand_named(name, results)
        if plot:
            write(f"Plot: {pareto(grand, plot, size)}")
        else:
            typer.echo(whole(grand, form, full), nl=False)
        return
    campaign = campaign_named(name, scale)
    if dry_run:
        typer.echo("\n".join(would_run(campaign, results)))
        return
    if run:
        run_campaign(campaign, results, write)
    if is_planned(campaign, results):
        from effbench.cli.plan_table import planned

        typer.echo(planned(campaign, form), nl=False)
        return
    if plot:
        from effbench.report.campaign_plots import plot as draw

        write(f"Plot: {draw(campaign, results, plot, of, size)}")
        return
    if form == "terminal" and sys.stdout.isatty():
        text = rendered(campaign, results, form, full, columns())
        write(text.removesuffix("\n"), sys.stdout, indent=2)
        return
    typer.echo(rendered(campaign, results, form, full), nl=False)
