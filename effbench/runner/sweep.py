"""Grids of runs: Hydra's sweepers make the list, Hydra's launchers take it to the machines."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from effbench.api.spec import Job, Stage
from effbench.config.code import checked
from effbench.config.compose import compose, results_of
from effbench.config.composed import to_plain
from effbench.config.overrides import check_overrides, parse
from effbench.config.start import split_words
from effbench.config.vary import Composer
from effbench.results.lookup import find
from effbench.results.store import Store
from effbench.results.sweeps import Grid, declare, declare_tuning, outcomes_in
from effbench.runner.grid.cells import Cells
from effbench.runner.grid.words import check_size, is_launched, jobs_in, listed, points, spelled_out
from effbench.runner.grid.work import Outcome, Work, keep_ended, run_here
from effbench.runner.objective import Objective, objective_in
from effbench.util.errors import UserError
from effbench.util.files import mendable, remove
from effbench.util.package_data import conf_dir
from effbench.util.safe_path import safe_path


def sweep(
    stage: Stage,
    overrides: Sequence[str],
    extra: Sequence[Path] = (),
    fresh: bool = False,
    agreed: bool = False,
    like: str = "",
) -> list[Outcome]:
    """Run a grid; a run that fails does not stop the others.

    Args:
        stage: The command.
        overrides: Hydra overrides, with sweeps among them (`method.rank=4,8`), and perhaps a file
            with a spec that the runs start from, a grid's
            config (`sweep=NAME`), an objective (`sweep.metric=loss@validation`) and how many go on
            at once (`sweep.jobs=2`).
        extra: Folders with the user's own configs.
        fresh: Run finished keys again.
        agreed: Whether any number of runs is meant.
        like: An earlier run whose spec they start from; empty for none.

    Raises:
        UserError: When the grid itself cannot be composed.
        RunFailedError: When it was interrupted; the same command goes on.
    """
    extra = checked(extra)
    told = ["--like", like] if like else []
    command = shlex.join(["effbench", stage, "-m", *overrides, *told])
    files, overrides = split_words(overrides)
    name, overrides = spelled_out(stage, overrides, extra)
    objective, overrides = objective_in(overrides)
    jobs, overrides = jobs_in(overrides)
    overrides = listed(overrides, extra)
    chosen = check_overrides(overrides, extra)
    begun = bool(files or like)
    words = list(chosen.words) if begun else chosen.with_defaults(stage)
    words += objective.for_sweeper(words) if objective else []
    check_size(words, agreed)
    launched = is_launched(words, extra)
    if launched and jobs > 1:
        raise UserError(
            "sweep.jobs is for runs of this process.", "Say it to the launcher: hydra.launcher.*"
        )
    if begun and (launched or points(words) is None):
        raise UserError(
            "Runs that start from a file or from an earlier run are made here, one for each value.",
            "Leave the launcher or the sweeper out, or write what they share as configs of your "
            "own: --config-dir.",
        )
    results = _results(words, points(words) or [], extra)
    words = [_latest_now(w, results) for w in words]
    drawn = points(words)
    over = _over(stage, files, extra, like, results) if begun else None
    work = Work(stage, chosen.chosen, fresh, objective)
    cells = Cells(stage, drawn or [], chosen.chosen, extra, over)
    work.settle(cells)
    made = Store(results).missing()
    folder = _declared(results, Grid(name, command, jobs, cells.all), objective)
    try:
        if drawn is None or (launched and any(cell.state == "waiting" for cell in cells.all)):
            keep_ended(cells, folder)
            _hand_to_hydra(words, extra, folder, work.of_config)
        else:  # here: no need to have Hydra compose each of them from its files
            run_here(cells, jobs, work, folder)
    except UserError:
        _forget_unless_begun(folder, made)
        raise
    outcomes = [Outcome(**found) for found in outcomes_in(folder)]
    _forget_unless_begun(folder, made)
    return outcomes


def _forget_unless_begun(folder: Path, made: Sequence[Path]) -> None:
    """Remove the folder of a grid that was refused, or all of whose runs were before they began.

    Args:
        folder: Of the grid.
        made: Folders of results that were not there before.
    """
    store = Store(folder.parents[1])
    found = outcomes_in(folder)
    if all(o["error"] and not (o["key"] and store.run(o["key"]).path.exists()) for o in found):
        remove(folder)
        store.give_back([folder.parent, *made])


def _over(
    stage: Stage, files: Sequence[Path], extra: Sequence[Path], like: str, results: Path
) -> Callable[[Sequence[str]], Job]:
    """Return what puts the words of a run over a file or an earlier run.

    Args:
        stage: The command.
        files: Of one's own, one at most.
        extra: Folders with the user's own configs.
        like: An earlier run; the latest is that of now, which the grid's own would replace.
        results: Of all runs of the grid, whatever the file says.
    """
    key = find(results / "records", like).key if like else ""

    def job_of(point: Sequence[str]) -> Job:
        words = [word.lstrip("+") for word in point]
        job = compose(stage, [*map(str, files), *words], extra, key)
        return replace(job, runtime=replace(job.runtime, results=str(results)))

    return job_of


def _declared(results: Path, grid: Grid, objective: Objective | None) -> Path:
    """Return the new folder of a grid, with what there is to know before its first run."""
    folder = results / "sweeps" / f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    with mendable(folder):
        folder.mkdir(parents=True)
        declare(folder, grid)
        if objective:
            declare_tuning(folder, objective.declared())
    return folder


def _hand_to_hydra(
    words: Sequence[str], extra: Sequence[Path], folder: Path, run: Callable[..., float]
) -> None:
    """Have Hydra's sweeper and launcher call `run` for every run of the grid."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    search = [f"hydra.searchpath=[{','.join(f'file://{p}' for p in extra)}]"] if extra else []

    def task(config: Any) -> float:
        at_work()
        context = HydraConfig.get()
        point = [str(word) for word in context.overrides.task]
        return run(partial(to_plain, config), point, Path(context.runtime.output_dir))

    arguments = ["effbench", "-m", *words, *search, f"hydra.sweep.dir={folder}"]
    with safe_path() as at_work, _arguments(arguments):
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


def _results(words: Sequence[str], points: Sequence[Sequence[str]], extra: Sequence[Path]) -> Path:
    """Return the folder of results that the runs of a grid have in common.

    Raises:
        UserError: When it is swept, or when not even one run of the grid can be composed.
    """
    if any(parse(w).key_or_group == "run.results" for w in words if parse(w).is_sweep_override()):
        raise UserError("A grid has one folder of results.", "Give run.results one value.")
    one = points[0] if points else [_first(word) for word in words if not word.startswith("hydra")]
    return results_of(Composer(extra)(one)).resolve()


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
