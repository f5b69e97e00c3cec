"""What there is in a results folder: finished runs, and those that are at work or were stopped."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from textwrap import wrap

from effbench.api.names import called
from effbench.report.facts import facts
from effbench.report.labels import ABSENT
from effbench.report.table import RUN_COLUMNS, Cell, Table, readable
from effbench.results.store import RunFolder, Store
from effbench.util.errors import UserError, did_you_mean, printable_values

FILTERS = ("key", "stage", "method", "model", "dataset", "seed", "state")
"""What runs are chosen by."""
STATES = ("finished", "running", "interrupted")
AGES = ((86400, "d"), (3600, "h"), (60, "min"))


@dataclass(frozen=True)
class Listed:
    """One run as a list shows it; all are texts that are empty where nothing is known."""

    key: str
    started: str
    """UTC, ISO 8601."""
    stage: str
    method: str
    model: str
    dataset: str
    seed: str
    result: str
    command: str
    state: str

    def row(self, now: float) -> tuple[str, ...]:
        """Return the texts of `COLUMNS`."""
        result = self.result if self.state == "finished" else self.state
        what = self.stage, self.method, self.model, self.dataset, self.seed
        return self.key[:8], age(self.started, now), *(w or ABSENT for w in what), result


COLUMNS = (RUN_COLUMNS[0], "age", *RUN_COLUMNS[2:])
SHARED = range(2, 7)
"""Columns of which one value may stand for all runs: stage, method, model, dataset, seed."""
BELOW = ("result", "command")


def listed(store: Store, filters: Sequence[str] = ()) -> list[Listed]:
    """Return the runs that fit all filters, oldest first.

    Args:
        store: Runs and records.
        filters: `NAME=VALUE` with a name of `FILTERS`; several values stand with commas between
            them, and `*` is any text.

    Raises:
        UserError: For a filter that is none.
    """
    wanted = [_filter(word) for word in filters]
    found = [*_finished(store), *_unfinished(store)]
    fits = [r for r in found if all(_fits(getattr(r, n), values, n) for n, values in wanted)]
    return sorted(fits, key=lambda r: (r.started, r.key))


def listing(store: Store, filters: Sequence[str] = (), full: bool = False) -> Table:
    """Return the table of the runs that fit all filters.

    Args:
        store: Runs and records.
        filters: As for `listed`.
        full: Also show the bytes on disk and the command of each.

    Raises:
        UserError: For a filter that is none, and when no run fits.
    """
    runs, now = listed(store, filters), time.time()
    if not runs:
        fit = f" with {' '.join(filters)}" if filters else ""
        hint = "See all: effbench runs" if filters else "Start with: effbench train"
        raise UserError(f"There are no runs{fit} in {store.root}.", hint)
    if not full:
        return Table("", COLUMNS, [(*run.row(now),) for run in runs])
    more = [(_size(store.run(run.key)), run.command or ABSENT) for run in runs]
    rows: list[tuple[Cell, ...]] = [
        (*run.row(now), *texts) for run, texts in zip(runs, more, strict=True)
    ]
    return Table("", (*COLUMNS, "on disk", "command"), rows)


def fitted(table: Table, width: int) -> str:
    """Return a table of runs in lines that a terminal can hold, no word of them broken.

    What is the same for all is said once, above; where lines are too long all the same, what comes
    of a run, and its command, stand below it.

    Args:
        table: A `listing`.
        width: Characters of a line.
    """
    rows = [[str(cell) for cell in row] for row in table.rows]
    same = [i for i in SHARED if len(rows) > 1 and len({row[i] for row in rows}) == 1]
    told = ", ".join(f"{table.columns[i]} {rows[0][i]}" for i in same)
    kept = [i for i in range(len(table.columns)) if i not in same]
    lines = _lines(table, rows, kept)
    if max(map(len, lines)) > width:
        below = [i for i in kept if table.columns[i] in BELOW]
        lines = _lines(table, rows, [i for i in kept if i not in below])
        head, lines = lines[:2], lines[2:]
        pairs = zip(lines, rows, strict=True)
        lines = head + [x for own, row in pairs for x in (own, *_below(row, below, width))]
    return "\n".join([*([f"All: {told}", ""] if told else []), *lines])


def _lines(table: Table, rows: Sequence[Sequence[str]], kept: Sequence[int]) -> list[str]:
    cells: list[tuple[Cell, ...]] = [tuple(row[i] for i in kept) for row in rows]
    text = Table("", tuple(table.columns[i] for i in kept), cells).text()
    return [line.rstrip() for line in text.splitlines()]


def _below(row: Sequence[str], columns: Sequence[int], width: int) -> list[str]:
    """Return what stands under the line of a run."""
    return [line for i in columns for line in _wrapped(row[i], width)]


def _wrapped(text: str, width: int) -> list[str]:
    return wrap(
        text,
        width,
        initial_indent="    ",
        subsequent_indent="      ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def age(started: str, now: float) -> str:
    """Return how long ago an ISO 8601 time of UTC was, in its largest whole unit.

    Args:
        started: The time.
        now: Seconds since the epoch.
    """
    if not started:
        return ABSENT
    when = datetime.fromisoformat(started)
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    seconds = max(0.0, now - when.timestamp())
    for size, unit in AGES:
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _size(folder: RunFolder) -> str:
    return readable(folder.bytes_on_disk(), "bytes") if folder.path.is_dir() else ABSENT


# -- filters -----------------------------------------------------------------------------------


def _filter(word: str) -> tuple[str, list[str]]:
    name, equals, value = word.partition("=")
    values = value.split(",")
    if name not in FILTERS:
        raise UserError(f"Runs have no {name!r}.", did_you_mean(name, FILTERS))
    if not equals or not all(values):
        raise UserError(f"{name} has no value.", f"For example: {name}=NAME or {name}=A,B.")
    if name == "state":
        for state in values:
            if not any(fnmatchcase(known, state) for known in STATES):
                raise UserError(f"There is no state {state!r}.", did_you_mean(state, STATES))
    return name, values


def _fits(text: str, values: Iterable[str], name: str) -> bool:
    return any(fnmatchcase(text, f"{v}*" if name == "key" else v) for v in values)


# -- where it is read --------------------------------------------------------------------------


def _finished(store: Store) -> list[Listed]:
    return [Listed(*kept[:-4], "finished") for kept in facts(store)]


def _unfinished(store: Store) -> Iterator[Listed]:
    for key in store.run_keys():
        folder = store.run(key)
        if not folder.finished:
            yield _unfinished_run(folder)


def _unfinished_run(folder: RunFolder) -> Listed:
    spec = _read(folder, "spec.json")
    parts = (spec.get(part) for part in ("method", "model", "dataset"))
    method, model, dataset = (called(p) if isinstance(p, dict) else "" for p in parts)
    begun = (folder.path / "spec.json").stat().st_mtime
    return Listed(
        folder.key,
        datetime.fromtimestamp(begun, UTC).isoformat(timespec="seconds"),
        str(spec.get("stage", "")),
        str(method),
        str(model),
        str(dataset),
        str(spec.get("seed", "")),
        result="",
        command=str(_read(folder, "environment.json").get("command") or ""),
        state="running" if folder.held else "interrupted",
    )


def _read(folder: RunFolder, name: str) -> dict[str, object]:
    """Return a JSON object of a run; nothing of one that is damaged or is being written."""
    try:
        found = folder.read_json(name)
    except UserError:
        return {}
    return printable_values(found) if isinstance(found, dict) else {}
