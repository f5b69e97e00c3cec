"""Loss curves of the runs whose folders are there, thinned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from effbench.results.store import Store

PLACES = 20_000
"""Places of all curves together, so that many runs do not make a large file."""
MOST, FEWEST = 200, 20
"""Places of one curve."""

Line = tuple[list[float], list[float]]
"""Steps and losses."""


def curves(keys: Sequence[str], store: Store) -> list[dict[str, Any]]:
    """Return the curves of runs, in their order; a run without a folder has none.

    Args:
        keys: Of the runs; of more than there is room for, the first ones.
        store: Where their folders are.

    Raises:
        UserError: When the log of one is damaged.
    """
    logs = {key: store.run(key).path / "events.jsonl" for key in keys}
    there = [key for key, log in logs.items() if log.is_file()][: PLACES // FEWEST]
    places = max(FEWEST, min(MOST, PLACES // max(1, len(there))))
    if not there:
        return []
    from effbench.results.events import read_events  # reads the schema, which takes a while

    found = [{"key": key, **_lines(read_events(logs[key]), places)} for key in there]
    return [curve for curve in found if len(curve) > 1]


def thinned(line: Line, places: int) -> Line:
    """Return the means of consecutive parts of a line, as many as there are places.

    Args:
        line: Steps and losses.
        places: Most of them.
    """
    steps, losses = line
    if len(steps) <= places:
        return line
    ends = [len(steps) * i // places for i in range(places + 1)]
    parts = [slice(a, b) for a, b in pairwise(ends)]
    return [_mean(steps[part]) for part in parts], [_mean(losses[part]) for part in parts]


def _lines(events: Iterable[Mapping[str, Any]], places: int) -> dict[str, Line]:
    """Return the lines of one run by what their losses are of."""
    found: dict[str, Line] = {}
    for event in events:
        if event["event"] in ("step", "validation") and "loss" in event:
            kind = "validation" if event["event"] == "validation" else "training"
            steps, losses = found.setdefault(kind, ([], []))
            steps.append(float(event["step"]))
            losses.append(float(event["loss"]))
    return {kind: _rounded(thinned(line, places)) for kind, line in found.items()}


def _rounded(line: Line) -> Line:
    steps, losses = line
    return [round(s, 1) for s in steps], [float(f"{loss:.5g}") for loss in losses]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
