"""Grids of runs: Hydra's sweepers make the list, Hydra's launchers take it to the machines."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from effbench.api.spec import Stage
from effbench.config.code import checked
from effbench.config.compose import commanded, hydra_compose, job_from, results_of, to_plain
from effbench.config.overrides import check_overrides, parse
from effbench.results.store import Store
from effbench.results.sweeps import OUTCOME, declare_tuning, outcomes_in
from effbench.runner.local import execute
from effbench.runner.objective import objective_in
from effbench.runner.worker import INTERRUPTED
from effbench.util.errors import RunFailedError, UserError
from effbench.util.files import mendable
from effbench.util.package_data import conf_dir


@dataclass(frozen=True)
class Outcome:
    """How one run of a grid ended."""

    overrides: list[str]
    key: str
    error: str = ""
    value: float | None = None
    """Of the objective, where the grid has one and the run ended well."""


def sweep(
    stage: Stage, overrides: Sequence[str], extra: Sequence[Path] = (), fresh: bool = False
) -> list[Outcome]:
    """Run a grid; a run that fails does not stop the others.

    Args:
        stage: The command.
        overrides: Hydra overrides, with sweeps among them (`method.rank=4,8`), and perhaps an
            objective (`sweep.metric=loss@validation`).
        extra: Folders with the user's own configs.
        fresh: Run finished keys again.

    Raises:
        UserError: When the grid itself cannot be composed.
    """
    extra = checked(extra)
    objective, overrides = objective_in(overrides)
    chosen = check_overrides(overrides, extra)
    words = chosen.with_defaults(stage)
    words += objective.for_sweeper(words) if objective else []
    results = _results(words, _points(words) or [], extra)
    words = [_latest_now(w, results) for w in words]
    points = _points(words)
    _try_one(stage, points or [], chosen.chosen, extra)
    folder = results / "sweeps" / f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    with mendable(folder):
        folder.mkdir(parents=True)
        if objective:
            declare_tuning(folder, objective.declared())

    def run(config: Callable[[], dict[str, Any]], point: Sequence[str], place: Path) -> float:
        key, error, value = "", "", None
        try:
            job = commanded(job_from(stage, config(), chosen.chosen), point)
            key = job.spec.key
            record = execute(job, fresh)
            value = objective.of(record) if objective else None
        except UserError as problem:
            error = str(problem)
        except RunFailedError as problem:
            if problem.status == INTERRUPTED:
                raise KeyboardInterrupt from None
            error = str(problem)
        place.mkdir(parents=True, exist_ok=True)
        found = Outcome([word.lstrip("+") for word in point], key, error, value)
        (place / OUTCOME).write_text(json.dumps(vars(found)))
        return math.nan if value is None else value

    elsewhere = {c for c in chosen.chosen if re.match(r"(launcher|experiment|hydra)\b", c)}
    if points is None or elsewhere:
        _hand_to_hydra(words, extra, folder, run)
    else:  # here, one after another: no need to have Hydra compose each of them from its files
        for number, point in enumerate(points):
            run(partial(hydra_compose, point, extra), point, folder / str(number))
    return [Outcome(**found) for found in outcomes_in(folder)]


def _hand_to_hydra(
    words: Sequence[str], extra: Sequence[Path], folder: Path, run: Callable[..., float]
) -> None:
    """Have Hydra's sweeper and launcher call `run` for every run of the grid."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    search = [f"hydra.searchpath=[{','.join(f'file://{p}' for p in extra)}]"] if extra else []

    def task(config: Any) -> float:
        context = HydraConfig.get()
        point = [str(word) for word in context.overrides.task]
        return run(partial(to_plain, config), point, Path(context.runtime.output_dir))

    with _arguments(["effbench", "-m", *words, *search, f"hydra.sweep.dir={folder}"]):
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


def _points(words: Sequence[str]) -> list[list[str]] | None:
    """Return the words of each run of a grid; None when a sweeper of Hydra draws them itself."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(words))
        (points,) = BasicSweeper.split_arguments(parsed, None)
        return [list(point) for point in points]
    except HydraException:
        return None


def _try_one(
    stage: Stage, points: Sequence[Sequence[str]], chosen: set[str], extra: Sequence[Path]
) -> None:
    """Compose runs of the grid until one is possible.

    Raises:
        UserError: What is wrong with the first one, when none is.
    """
    problem: UserError | None = None
    for point in points:
        try:
            job_from(stage, hydra_compose(point, extra), chosen)
            return
        except UserError as error:
            problem = problem or error
    if problem:
        raise problem


def _results(words: Sequence[str], points: Sequence[Sequence[str]], extra: Sequence[Path]) -> Path:
    """Return the folder of results that the runs of a grid have in common.

    Raises:
        UserError: When it is swept, or when not even one run of the grid can be composed.
    """
    if any(parse(w).key_or_group == "run.results" for w in words if parse(w).is_sweep_override()):
        raise UserError("A grid has one folder of results.", "Give run.results one value.")
    one = points[0] if points else [_first(word) for word in words if not word.startswith("hydra")]
    return results_of(hydra_compose(one, extra)).resolve()


def _first(word: str) -> str:
    """Return a word with the first of the values that a sweeper may draw for it."""
    override = parse(word)
    if not override.is_sweep_override():
        return word
    drawn = override.value()
    first = drawn.start if hasattr(drawn, "start") else drawn.list[0]
    return f"{override.input_line.partition('=')[0]}={first}"


def _latest_now(word: str, results: Path) -> str:
    """Name the latest run, which the grid's own runs would otherwise replace one by one."""
    if word.startswith("from=") and re.search(r"\blatest\b", word):
        return re.sub(r"\blatest\b", Store(results).resolve("latest"), word)
    return word


@contextmanager
def _arguments(words: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = words
    try:
        yield
    finally:
        sys.argv = before
