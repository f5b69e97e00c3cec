"""A grid at a glance: how many runs are how far, how long it still takes, what each says."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import get_args

from effbench.results.sweeps import Cell, State
from effbench.util.errors import printable

SHOWN = 12
"""Most runs at work, and most failed ones, that are listed."""


def overview(cells: Sequence[Cell], jobs: int, width: int) -> list[str]:
    """Return a grid in lines: counts and the time left, what is at work, what failed.

    Args:
        cells: All runs.
        jobs: Most of them at once.
        width: Columns of the terminal.
    """
    own = varied(cells)
    failed = [f"  {named(c, own)}: {c.error.splitlines()[0]}" for c in _in(cells, "failed")]
    lines = _first([printable(line)[:width] for line in failed])
    return [*at_work(cells, jobs, width), *(["failed:"] if lines else []), *lines]


def at_work(cells: Sequence[Cell], jobs: int, width: int) -> list[str]:
    """Return counts, the time left and the last line of each run at work; see `overview`."""
    own = varied(cells)
    running = [f"  {named(c, own)}  {c.said}" for c in _in(cells, "running")]
    lines = [headline(cells, jobs), *_first(running)]
    return [printable(line.rstrip())[:width] for line in lines]


def headline(cells: Sequence[Cell], jobs: int) -> str:
    """Return the counts by state and the time that is left."""
    left = seconds_left(cells, jobs)
    time_left = f", about {duration(left)} left" if left else ""
    return f"{counts(cells)}{time_left}"


def counts(cells: Sequence[Cell]) -> str:
    """Return how many runs are in each state."""
    found = Counter(cell.state for cell in cells)
    shown = ("done", *(s for s in get_args(State) if s != "done" and found[s]))
    return f"{len(cells)} run{'s' * (len(cells) != 1)}: " + ", ".join(
        f"{found[state]} {state}" for state in shown
    )


def seconds_left(cells: Sequence[Cell], jobs: int) -> float:
    """Return the time until a grid ends; 0 where nothing can be said or is to be done.

    A run takes what others of its kind took on average. Where none has ended, that is the planned
    work at the pace of those of other kinds.

    Args:
        cells: All runs.
        jobs: Most of them at once.
    """
    took: dict[str, list[float]] = defaultdict(list)
    for cell in _in(cells, "done"):
        if cell.seconds:
            took[cell.kind].append(cell.seconds)
    rates = [c.seconds / c.work for c in _in(cells, "done") if c.work and c.seconds]
    total = 0.0
    for cell in cells:
        if cell.state in ("waiting", "running", "interrupted"):
            whole = fmean(took[cell.kind]) if took[cell.kind] else cell.work * fmean(rates or [0])
            total += max(0.0, whole - (time.time() - cell.begun if cell.begun else 0))
    return total / max(1, jobs)


def varied(cells: Sequence[Cell]) -> set[str]:
    """Return the words that not all runs of a grid have."""
    found = Counter(word for cell in cells for word in cell.words)
    return {word for word, number in found.items() if number < len(cells)}


def named(cell: Cell, own: set[str]) -> str:
    """Return the key of a run and the words that not all have.

    Args:
        cell: The run.
        own: Those words.
    """
    return f"{cell.key or '-':16}  {' '.join(w for w in cell.words if w in own)}".rstrip()


def duration(seconds: float) -> str:
    """Return seconds as `1:02:03` or `2:03`."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def _in(cells: Sequence[Cell], state: State) -> list[Cell]:
    return [cell for cell in cells if cell.state == state]


def _first(lines: Sequence[str]) -> list[str]:
    """Return the first lines, and how many more there are."""
    more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [*lines[:SHOWN], *more]
