"""Arguments and options that several commands have, and how a shell completes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def complete_override(context: typer.Context, incomplete: str) -> list[str]:
    """Complete `group=`, `group=name` and `group.key=`."""
    from effbench.cli.completion import complete_after

    return complete_after(context.params.get("overrides") or [], incomplete)


def complete_run(incomplete: str) -> list[str]:
    """Complete run keys."""
    from effbench.cli.completion import run_keys

    return run_keys(incomplete)


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FILE.yaml] [KEY=VALUE]...",
        help="A file with a spec; overrides: group=name or group.key=value.",
        autocompletion=complete_override,
        show_default=False,
    ),
]
ConfigDirs = Annotated[
    list[Path] | None,
    typer.Option("--config-dir", help="Folder with your own configs, laid out like conf/."),
]
Multirun = Annotated[
    bool,
    typer.Option("-m", "--multirun", help="Run a grid: method.rank=4,8 seed=0,1 or sweep=NAME."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Compose, check and plan; run nothing.")]
Yes = Annotated[
    bool, typer.Option("--yes", help="With -m: do not ask about a grid of very many runs.")
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Run anew what is finished or was interrupted.")
]
Like = Annotated[
    str | None,
    typer.Option(
        "--like",
        metavar="RUN",
        help="Start from the spec of an earlier run.",
        autocompletion=complete_run,
    ),
]
PrintKey = Annotated[bool, typer.Option("--print-key", help="Print the run key and run nothing.")]
Results = Annotated[
    Path,
    typer.Option(
        "--results",
        help="Folder of runs and records.",
        envvar="EFFBENCH_RESULTS",
        callback=Path.expanduser,
    ),
]
