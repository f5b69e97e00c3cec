"""Grids on the disk: which runs they have, what came of each, and which grids were there to tune.

A grid is a folder in `sweeps/` of the results. `grid.json` declares its runs before the first one
begins; a folder for each run has `outcome.json` once it has ended. Of runs that there is nothing to
do for, which may be all of thousands, `settled.json` says what came of them. A grid with an
objective has `objective.json` too: its runs are declared to be trials of a tuning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from effbench.results.store import Store
from effbench.util.errors import UserError, did_you_mean, printable_values
from effbench.util.files import write_atomic

OUTCOME = "outcome.json"
SETTLED = "settled.json"
OBJECTIVE = "objective.json"
GRID = "grid.json"
DECLARED = ("words", "key", "error", "kind", "work")
TAIL_BYTES = 4096
"""Of an event log, within which its last line ends."""

State = Literal["waiting", "running", "done", "failed", "interrupted"]


@dataclass(eq=False)
class Cell:
    """One run of a grid, and how far it is."""

    number: int
    words: list[str]
    key: str = ""
    error: str = ""
    """Why it failed, or could not be composed."""
    kind: str = ""
    """What runs that take about as long have in common."""
    work: float = 0.0
    """FLOPs of its training, as planned; 0 where they are not known."""
    state: State = "waiting"
    seconds: float = 0.0
    """What it took; 0 where it was done before."""
    begun: float = 0.0
    """Seconds since the epoch; 0 where that is not known."""
    value: float | None = None
    """Of the objective, where the grid has one and the run ended well."""
    said: str = ""
    """Its last line."""


@dataclass(frozen=True)
class Grid:
    """What a grid is, as it was declared."""

    name: str
    """Of its config; empty without one."""
    command: str
    jobs: int
    """Most runs at once."""
    cells: list[Cell]
    """Those that are known; a sweeper that draws them declares none."""


def declare(folder: Path, grid: Grid) -> None:
    """Note the runs of a grid before the first one begins."""
    cells = [{name: getattr(cell, name) for name in DECLARED} for cell in grid.cells]
    values = {"name": grid.name, "command": grid.command, "jobs": grid.jobs, "cells": cells}
    write_atomic(folder / GRID, json.dumps(values, indent=1) + "\n")


def read_grid(folder: Path) -> Grid:
    """Return a grid as its folder and its runs' folders say by now.

    Raises:
        UserError: When its declaration is damaged.
    """
    found = {int(n): o for n, o in numbered_outcomes(folder) if n.isdigit()}
    declared = _declared(folder)
    numbers = range(len(declared.get("cells", ())))
    cells = [Cell(n, **declared["cells"][n]) for n in numbers]
    cells += [Cell(n, found[n].get("overrides", [])) for n in sorted(found.keys() - set(numbers))]
    store = Store(folder.parents[1])
    for cell in cells:
        _look(cell, found.get(cell.number, {}), store)
    return Grid(
        declared.get("name", ""), declared.get("command", ""), declared.get("jobs", 1), cells
    )


def _declared(folder: Path) -> dict[str, Any]:
    path = folder / GRID
    try:
        values = printable_values(json.loads(path.read_text())) if path.is_file() else {}
        return {**values, "cells": [{n: c[n] for n in DECLARED} for c in values.get("cells", ())]}
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(
            f"{path} cannot be read: {error}.",
            "Give the grid's command again: it writes another.",
        ) from None


def _look(cell: Cell, outcome: Mapping[str, Any], store: Store) -> None:
    """Fill in what came of a run by now."""
    cell.key = cell.key or outcome.get("key", "")
    cell.error = outcome.get("error", "") or cell.error
    cell.value, cell.seconds = outcome.get("value"), outcome.get("seconds", 0.0)
    run = store.run(cell.key)
    if cell.key and run.finished:
        cell.state, cell.error = "done", ""
    elif cell.key and run.held:
        cell.state, cell.said = "running", last_event(run.path / "events.jsonl")
        with suppress(OSError):
            cell.begun = (run.path / "environment.json").stat().st_mtime
    elif cell.error:
        cell.state = "failed"
    elif cell.key and run.can_go_on():
        cell.state = "interrupted"


def last_event(log: Path) -> str:
    """Return the last event of a run in a few words; empty where there is none yet."""
    with suppress(OSError, ValueError, IndexError):
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            event = json.loads(file.read().rpartition(b"\n")[0].splitlines()[-1])
        facts = [f"{n} {event[n]:.5g}" for n in ("step", "loss", "value") if n in event]
        names = [] if event["event"] == "step" else [event["event"], event.get("name", "")]
        return " ".join([*filter(None, names), *facts])
    return ""


def grids(results: Path) -> list[Path]:
    """Return the folders of all grids, newest first.

    Args:
        results: Folder of results.
    """
    return sorted((p for p in (results / "sweeps").glob("*") if p.is_dir()), reverse=True)


def find_grid(results: Path, ref: str) -> Path:
    """Return the folder of a grid.

    Args:
        results: Folder of results.
        ref: `latest`, the name of a grid's config, of which the latest is taken, or how the name of
            its folder begins.

    Raises:
        UserError: When there is none.
    """
    known = grids(results)
    if not known:
        raise UserError(
            f"There is no grid in {results}.", "Run one: effbench train -m seed=0,1 method=lora"
        )
    names = {folder: _declared(folder).get("name", "") for folder in known}
    fits = [f for f in known if ref in ("latest", names[f]) or f.name.startswith(ref)]
    if not fits:
        suggested = did_you_mean(ref, {*filter(None, names.values()), known[0].name})
        raise UserError(f"There is no grid {ref!r}.", f"{suggested} See: effbench sweep list")
    return fits[0]


def numbered_outcomes(grid: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return what came of each run of a grid, by the name of its folder, in their order."""
    found = settled_in(grid)
    for path in grid.glob(f"*/{OUTCOME}"):
        if isinstance(outcome := _read(path), dict):
            found[path.parent.name] = outcome
    return sorted(found.items(), key=lambda item: (len(item[0]), item[0]))


def settle(grid: Path, outcomes: Mapping[int, Mapping[str, Any]]) -> None:
    """Note what came of runs that have no folder, by their numbers."""
    write_atomic(grid / SETTLED, json.dumps(outcomes))


def settled_in(grid: Path) -> dict[str, dict[str, Any]]:
    """Return what `settle` noted of a grid; nothing where that cannot be read."""
    found = _read(grid / SETTLED)
    pairs = found.items() if isinstance(found, dict) else ()
    return {number: outcome for number, outcome in pairs if isinstance(outcome, dict)}


def _read(path: Path) -> Any:
    """Return what a file of JSON holds; None where it cannot be read."""
    with suppress(OSError, ValueError):
        return printable_values(json.loads(path.read_text()))
    return None


def outcomes_in(grid: Path) -> list[dict[str, Any]]:
    """Return what came of each run of a grid, in their order; unreadable ones are left out."""
    return [outcome for _, outcome in numbered_outcomes(grid)]


def declare_tuning(grid: Path, objective: Mapping[str, str]) -> None:
    """Note that the runs of a grid are trials, and what they are chosen by."""
    write_atomic(grid / OBJECTIVE, json.dumps(dict(objective)))


def tunings(results: Path) -> list[frozenset[str]]:
    """Return the keys of the runs of each grid that was there to tune.

    Args:
        results: Folder of results.
    """
    found = (path.parent for path in sorted((results / "sweeps").glob(f"*/{OBJECTIVE}")))
    return [frozenset(_keys(outcomes_in(grid))) for grid in found]


def _keys(outcomes: Sequence[Mapping[str, Any]]) -> list[str]:
    return [o["key"] for o in outcomes if o.get("key")]
