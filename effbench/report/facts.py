"""What lists and comparisons ask of all records, kept in their index.

A record's settings stand there as two digests: of what all trials of one tuning have in common, and
of all settings but seeds. They are those of the spec as it was written, so that no later code
changes them; one record of each setting is read where it must be known what it amounts to now.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from effbench.report import labels, table
from effbench.report.labels import ABSENT, command_of
from effbench.report.table import run_row
from effbench.results.index import summaries
from effbench.results.lookup import earlier
from effbench.results.records import read
from effbench.results.store import Store

if TYPE_CHECKING:
    from effbench.results.records import Record


class Facts(NamedTuple):
    """What is kept of a record; all are texts that are empty where nothing is known."""

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
    frame: str
    """What trials of one tuning have in common for certain."""
    settings: str
    """Digest of the spec without its seed."""
    parent: str
    timed: str
    """`yes` where the speed of decoding was measured."""


DECODING = "decode_tokens_per_second"
"""The metric by which a record is timed."""


def facts(store: Store) -> list[Facts]:
    """Return the facts of all records, oldest first; none is skipped.

    Raises:
        UserError: That names the first file that cannot be read.
    """
    code = [Path(module.__file__ or "") for module in (table, labels)]
    return [Facts(*texts) for texts in summaries(store, facts_of, [Path(__file__), *code])]


def facts_of(record: Record) -> Facts:
    """Return the facts of a record."""
    row = ("" if text == ABSENT else text for text in run_row(record)[2:])
    spec = {name: part for name, part in record.spec.items() if name != "seed"}
    timed = "yes" if any(m.name == DECODING for m in record.metrics) else ""
    mine = command_of(record), _frame(record), _digest(spec), record.parent, timed
    return Facts._make([record.key, record.started, *row, *mine])


def told_of(
    records: Sequence[Record], store: Store, tunings: Sequence[Collection[str]] = ()
) -> list[Record]:
    """Return what a comparison of runs must know of others, without their outcomes.

    They are the runs that these went on from and, of those that may have been tried to tune them,
    all of their grids and one of each setting.

    Args:
        records: What is compared.
        store: Where all finished runs are.
        tunings: Keys of the runs of each grid that was declared to tune.

    Raises:
        UserError: That names the first file that cannot be read.
    """
    own, frames, there = {r.key for r in records}, {*map(_frame, records)}, facts(store)
    near = {f.key: f.settings for f in there if f.frame in frames}
    grids = [keys for keys in tunings if not {*keys}.isdisjoint(near.keys() | own)]
    wanted = {*{settings: key for key, settings in near.items()}.values(), *chain(*grids)}
    known = {r.key: r for r in [*records, *earlier(records, store.records)]}
    for key in sorted(wanted.intersection(f.key for f in there) - known.keys()):
        known[key] = read(store.records / f"{key}.json", outcomes=False)
    return [record for key, record in known.items() if key not in own]


def _frame(record: Record) -> str:
    parts = (record.spec.get(part) or {} for part in ("method", "model", "dataset"))
    return _digest([record.stage, *(str(part.get("name", "")) for part in parts), record.parent])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
