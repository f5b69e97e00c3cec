"""Commands that run something, or say before what it would take."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from effbench.api.stages import base as stages
from effbench.cli.options import (
    ConfigDirs,
    DryRun,
    Fresh,
    Like,
    Multirun,
    Overrides,
    PrintKey,
    Yes,
)
from effbench.runner.progress import Progress
from effbench.util.errors import UserError
from effbench.util.wrap import columns, write

if TYPE_CHECKING:
    from effbench.api.spec import Job


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file to a command line."""
    for stage in stages.names():
        app.command(stage, help=stages.help_of(stage))(_command_of(stage))
    for command in (tune, plan, similarity):
        app.command()(command)


def _command_of(stage: str) -> Callable[..., None]:
    """Return the command that runs jobs of a stage."""

    def command(
        overrides: Overrides = None,
        multirun: Multirun = False,
        dry_run: DryRun = False,
        fresh: Fresh = False,
        print_key: PrintKey = False,
        like: Like = None,
        config_dir: ConfigDirs = None,
        yes: Yes = False,
    ) -> None:
        start = _named(like)
        _stage(stage, overrides, config_dir, multirun, dry_run, fresh, print_key, start, yes)

    return command


def _named(like: str | None) -> str:
    """Return the run that --like names; empty without it."""
    if like is not None and not like.strip():
        raise UserError(
            "--like names no run.", "Name one, for example --like latest, or leave --like out."
        )
    return like or ""


def _stage(
    stage: str,
    overrides: Sequence[str] | None,
    config_dir: Sequence[Path] | None,
    multirun: bool,
    dry_run: bool,
    fresh: bool,
    print_key: bool,
    like: str,
    yes: bool,
) -> None:
    with Progress(sys.stderr.isatty()).during(f"{stage}: starting"):
        from effbench.config.compose import compose
        from effbench.config.overrides import is_sweep
        from effbench.runner.local import execute, record_of

    words, extra = list(overrides or []), list(config_dir or [])
    if (multirun or any(w.startswith("sweep=") for w in words)) and (dry_run or print_key):
        raise UserError(
            "--dry-run and --print-key are for one run, not for a grid.",
            "Leave -m out and give one value for each key.",
        )
    several = multirun or is_sweep(words)
    if several and not (dry_run or print_key):
        _grid(stage, words, extra, fresh, yes, like)
        return
    with Progress(sys.stderr.isatty()).during(f"{stage}: reading the configs"):
        job = compose(stage, words, extra, like)
    if print_key:
        typer.echo(job.spec.key)
        return
    for note in job.notes:
        write(note)
    _require_models(job)
    if dry_run:
        _plan(job)
        _first_row(job)
        return
    before = None if fresh else record_of(job)
    if before:
        write(f"Done before, nothing to run (--fresh runs it anew): {before.key}")
    _show_record(before or execute(job, fresh))


def _require_models(job: Job) -> None:
    """Refuse folders of models in which something is missing, before anything is begun."""
    from effbench.models.load import require_files

    if stages.find(job.spec.stage).loads:
        require_files(job.spec.model)
        for model in job.spec.others:
            require_files(model, tokenizer=False)


def _grid(
    stage: str, words: list[str], extra: list[Path], fresh: bool, yes: bool, like: str
) -> None:
    from effbench.runner.grid.words import spelled_out
    from effbench.runner.sweep import sweep

    outcomes = sweep(stage, words, extra, fresh, yes, like)
    failed = [o for o in outcomes if o.error]
    shared = _shared(outcomes) if sys.stdout.isatty() else frozenset[str]()
    for outcome in outcomes:
        state = f"failed: {outcome.error.splitlines()[0]}" if outcome.error else "done"
        value = "" if outcome.value is None else f"  {outcome.value:.5g}"
        own = " ".join(word for word in outcome.overrides if word not in shared)
        write(f"{outcome.key or '-':16}  {own}  {state}{value}", sys.stdout)
    _best_of(spelled_out(stage, words, extra)[1], outcomes)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(outcomes)} runs failed.",
            "Mend what is said above and give the same command: what is done is not run twice.",
        )


def _shared(outcomes: Sequence[Any]) -> frozenset[str]:
    """Return the words that all runs of a grid have, which tell none from another."""
    words = [frozenset(outcome.overrides) for outcome in outcomes]
    return frozenset.intersection(*words) if len(words) > 1 else frozenset()


def _best_of(words: list[str], outcomes: Sequence[Any]) -> None:
    """Say which run of a grid is best by its objective, where it has one."""
    from effbench.runner.objective import objective_in

    objective, _ = objective_in(words)
    values = [math.nan if o.value is None else o.value for o in outcomes]
    best = objective.best(values) if objective else None
    if objective and best is not None:
        write(f"Best by {objective.criterion}: {outcomes[best].key} ({values[best]:.5g})")


def _show_record(record: Any, full: bool = False) -> None:
    from effbench.report.terminal import print_record

    print_record(record, full)


def tune(
    overrides: Overrides = None,
    at: Annotated[
        Literal["best", "mean"],
        typer.Option(help="Of several operating points: the best one, or the mean over them."),
    ] = "best",
    extend: Annotated[
        int, typer.Option(min=0, help="How often the grid goes on where its end is best.")
    ] = 2,
    config_dir: ConfigDirs = None,
) -> None:
    """Try a method at several settings, chosen on rows that are not reported; say what it cost.

    Numbers alone are tuned. The trials are kept, so that compare and table count them.

    \b
    Examples:
      effbench tune method=qdylora train.learning_rate=3e-4,1e-3,3e-3
      effbench tune method=lora train.learning_rate=1e-3,3e-3 method.alpha=16,32 --extend 0
      effbench tune method=lora train.learning_rate=1e-3,3e-3 sweep.metric=loss@validation
    """
    from effbench.cli.tuning import tune as tried

    for line in tried(list(overrides or []), list(config_dir or []), at, extend, typer.echo):
        write(line, sys.stdout)


def plan(
    overrides: Overrides = None,
    like: Like = None,
    config_dir: ConfigDirs = None,
) -> None:
    """Say what a run will need before it runs: memory by component, work, least time.

    \b
    Examples:
      effbench plan method=qdylora
      effbench plan method=full model=llama2-7b hardware=h200
      effbench plan experiment=qdylora_paper
    """
    from effbench.config.compose import compose

    _plan(compose(None, list(overrides or []), list(config_dir or []), _named(like)))


def _first_row(job: Any) -> None:
    from effbench.data.dataset import first_row

    spec = job.spec
    if shown := first_row(spec.dataset):
        write(f"First row  {shown}", sys.stdout)
    own = spec.dataset.source == "file"
    if _reads(spec, own):
        if own and stages.trains(spec.stage):
            from effbench.cli.rows import first

            typer.echo(first(spec, sys.stdout.isatty(), columns()))
        with Progress(sys.stderr.isatty()).during(f"reading the rows of {spec.dataset.called}"):
            from effbench.runner.open import check_rows
            from effbench.util.hf import quiet

            with quiet():
                check_rows(job)


def _reads(spec: Any, own: bool) -> bool:
    """Whether rows are held against the model: one's own, and those of benchmarks."""
    from effbench.api.plugins import make_evaluator
    from effbench.data.dataset import at_hand
    from effbench.models.load import tokenizer_at_hand

    if not stages.find(spec.stage).loads or not at_hand(spec.dataset):
        return False
    asks = any(make_evaluator(e).libraries() for e in spec.evaluators)
    return (asks or own) and tokenizer_at_hand(spec.model)


def _plan(job: Any) -> None:
    from effbench.cli.plan_text import render
    from effbench.resources.planned import predicted

    found, rows = predicted(job)
    typer.echo(render(found, job.spec, job.runtime.machine, rows))


def similarity(
    overrides: Overrides = None,
    ratio: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the layers to share or to drop.")
    ] = 0.4,
    plot: Annotated[
        Path | None, typer.Option(help="Where the heat map goes; else into the run folder.")
    ] = None,
    fresh: Fresh = False,
    config_dir: ConfigDirs = None,
) -> None:
    """Say which layers of a model are alike: what could be shared, and what could be dropped.

    \b
    Examples:
      effbench similarity model=smollm2-135m
      effbench similarity model=smollm2-135m evaluator.similarity.tokens=512 --plot map.png
      effbench similarity from=latest --ratio 0.2
    """
    from effbench.config.compose import compose
    from effbench.report.layer_similarity import Layers, conclusions, heat_map, layers_table
    from effbench.report.terminal import print_table
    from effbench.results.store import Store
    from effbench.runner.local import execute

    words = list(overrides or [])
    job = compose("eval", [*words, "evaluator=similarity"], list(config_dir or []))
    record = execute(job, fresh)
    run = Store(Path(job.runtime.results)).run(record.key).path
    point = next(m.point for m in reversed(record.metrics) if m.name == "attention_similarity")
    found = Layers.read(run, point)
    print_table(layers_table(found, f"{record.label} {point}".strip()))
    for line in conclusions(found, ratio, words):
        write(line, sys.stdout)
    path = heat_map(found, plot or run / "similarity.png", record.name_of("model"))
    write(f"Heat map: {path}")
