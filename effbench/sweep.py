"""Grids of runs: Hydra's sweepers make the list, Hydra's launchers take it to the machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from effbench.config import (
    DEFAULT_METHOD,
    check_overrides,
    conf_dir,
    job_from,
    register_plugin_configs,
    to_plain,
)
from effbench.errors import RunFailedError, UserError
from effbench.launch import execute
from effbench.spec import Stage

OUTCOME = "outcome.json"


@dataclass(frozen=True)
class Outcome:
    """How one run of a grid ended."""

    overrides: list[str]
    key: str
    error: str = ""


def sweep(
    stage: Stage, overrides: Sequence[str], extra: Sequence[Path] = (), fresh: bool = False
) -> list[Outcome]:
    """Run a grid; a run that fails does not stop the others.

    Args:
        stage: The command.
        overrides: Hydra overrides, with sweeps among them (`method.rank=4,8`).
        extra: Folders with the user's own configs.
        fresh: Run finished keys again.

    Raises:
        UserError: When the grid itself cannot be composed.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig

    chosen = check_overrides(overrides, extra)
    register_plugin_configs()
    words = list(overrides)
    if "method" not in chosen and "experiment" not in chosen:
        words.append(f"method={DEFAULT_METHOD[stage]}")
    if extra:
        words.append(f"hydra.searchpath=[{','.join(f'file://{p.resolve()}' for p in extra)}]")
    results = next((w.split("=", 1)[1] for w in words if w.startswith("run.results=")), "results")
    folder = Path(results).resolve() / "sweeps" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    words.append(f"hydra.sweep.dir={folder}")

    def task(config: Any) -> None:
        context = HydraConfig.get()
        mine = [str(o) for o in context.overrides.task]
        key, error = "", ""
        try:
            job = job_from(stage, to_plain(config), {o.split("=")[0].lstrip("+~") for o in mine})
            key = job.spec.key
            execute(job, fresh)
        except UserError as problem:
            error = str(problem)
        except RunFailedError as problem:
            if problem.status == 130:
                raise KeyboardInterrupt from None
            error = str(problem)
        place = Path(context.runtime.output_dir)
        place.mkdir(parents=True, exist_ok=True)
        (place / OUTCOME).write_text(json.dumps({"overrides": mine, "key": key, "error": error}))

    with _arguments(["effbench", "-m", *words]):
        try:
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(
                task
            )()
        except SystemExit as stop:
            if stop.code:
                raise UserError(
                    "The grid cannot be composed; the reason stands above.",
                    "Try one of its runs alone, with --dry-run.",
                ) from None
    files = sorted(folder.glob(f"*/{OUTCOME}"), key=lambda p: int(p.parent.name))
    return [Outcome(**json.loads(p.read_text())) for p in files]


@contextmanager
def _arguments(words: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = words
    try:
        yield
    finally:
        sys.argv = before
