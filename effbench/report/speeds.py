"""Decoding speeds of a table's rows, which other runs of the same artefact may have measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from effbench.report.facts import DECODING, Facts
from effbench.report.table import Value, as_value
from effbench.results.reader import Reader
from effbench.results.records import Record

SPEEDUP = "decode_speedup"

Evaluated = Mapping[tuple[str, str], Sequence[str]]
"""Keys of the timed evaluations of each artefact, by its run and the method; by the method alone
those of untouched models."""


def evaluated(there: Sequence[Facts]) -> Evaluated:
    """Return the evaluations among all records in which decoding was timed.

    Args:
        there: What is kept of the records.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for fact in there:
        if fact.stage == "eval" and fact.timed:
            found.setdefault((fact.parent, fact.method), []).append(fact.key)
    return found


def decoding_speed(
    records: Sequence[Record], point: str, there: Evaluated, reader: Reader
) -> Value | None:
    """Return the decoding speed of runs at an operating point; None where no record has it.

    It is that of the first of them, else that of an evaluation of the same artefact, or of the same
    untouched model, with the same method, model and hardware. One that timed it beside the dense
    model gives a ratio, which is fair on a shared machine too: see `decoding_speedup`.

    Args:
        records: Runs of one row.
        point: Where it is wanted.
        there: The timed evaluations among all records.
        reader: Of their records.
    """
    there_too = _nearest(records, there, reader)
    return _first(DECODING, (r for r in there_too if not _beside_dense(r)), point)


def decoding_speedup(
    records: Sequence[Record], point: str, there: Evaluated, reader: Reader
) -> Value | None:
    """Return how many times as fast as the dense model runs decode, timed in turn.

    Args:
        records: As for `decoding_speed`.
        point: As for `decoding_speed`.
        there: As for `decoding_speed`.
        reader: As for `decoding_speed`.
    """
    there_too = _nearest(records, there, reader)
    return _first(SPEEDUP, (r for r in there_too if _beside_dense(r)), point)


def _nearest(records: Sequence[Record], there: Evaluated, reader: Reader) -> Iterator[Record]:
    """Yield runs, then the timed evaluations of what their numbers are of."""
    yield from records
    for record in records:
        yield from _evaluations(record, there, reader)


def _first(metric: str, records: Iterable[Record], point: str) -> Value | None:
    return next((v for record in records if (v := at_point(record, metric, point))), None)


def _beside_dense(record: Record) -> bool:
    """Whether a run timed decoding beside that of the model that it started from."""
    plugins = record.spec.get("evaluators") or []
    settings = [p.get("settings") or {} for p in plugins if p.get("name") == "speed"]
    return any(own.get("baseline") == "dense" for own in settings)


def at_point(record: Record, name: str, point: str) -> Value | None:
    """Return a metric at an operating point, or that of the run as a whole.

    Where a run has it several times, as it has a speed for each batch size and length of a grid, it
    is no number of the point, and none of them is taken.
    """
    for where in dict.fromkeys((point, "")):
        if found := [as_value(m) for m in record.metrics if (m.name, m.point) == (name, where)]:
            return found[0] if len({v.value for v in found}) == 1 else None
    return None


def _evaluations(record: Record, there: Evaluated, reader: Reader) -> list[Record]:
    """Return other runs that evaluated what a run's numbers are of."""
    made_by = record.parent if record.stage == "eval" else record.key
    near = there.get((made_by, record.name_of("method")), ())
    found = (reader.of(key, outcomes=False) for key in near if key != record.key)
    return [other for other in found if _setting(other) == _setting(record)]


def _setting(record: Record) -> list[Any]:
    return [record.spec.get(part) for part in ("method", "model", "hardware")]
