"""Grids on the disk: what came of each run, and which grids were there to tune.

A grid is a folder in `sweeps/` of the results, with a folder for each run and `outcome.json` in it.
One with an objective has `objective.json` too: its runs are declared to be trials of a tuning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

OUTCOME = "outcome.json"
OBJECTIVE = "objective.json"


def outcomes_in(grid: Path) -> list[dict[str, Any]]:
    """Return what came of each run of a grid, in their order; unreadable ones are left out."""
    found = []
    for path in sorted(grid.glob(f"*/{OUTCOME}"), key=lambda p: (len(p.parent.name), p)):
        with suppress(OSError, ValueError):
            found.append(json.loads(path.read_text()))
    return found


def declare_tuning(grid: Path, objective: Mapping[str, str]) -> None:
    """Note that the runs of a grid are trials, and what they are chosen by."""
    (grid / OBJECTIVE).write_text(json.dumps(dict(objective)))


def tunings(results: Path) -> list[frozenset[str]]:
    """Return the keys of the runs of each grid that was there to tune.

    Args:
        results: Folder of results.
    """
    grids = (path.parent for path in sorted((results / "sweeps").glob(f"*/{OBJECTIVE}")))
    return [frozenset(_keys(outcomes_in(grid))) for grid in grids]


def _keys(outcomes: Sequence[Mapping[str, Any]]) -> list[str]:
    return [o["key"] for o in outcomes if isinstance(o, dict) and o.get("key")]
