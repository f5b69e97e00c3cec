"""The record of a finished run: one JSON line in `results/records/<key>.json`.

Records are committed with the code, so a fresh clone can make every table again. Per-item outcomes
stand at the end of the line, so that lists of many runs can be shown without parsing them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from effbench.api.names import called
from effbench.results.migrations import RECORDS, migrated_spec
from effbench.results.store import record_files
from effbench.util.errors import CONTROL, NewerVersionError, UserError, printable_values
from effbench.util.files import write_atomic
from effbench.util.seals import seal_of

SCHEMA = 3
"""Raised when the form of a record changes; `migrations.RECORDS` then gets an entry."""

Obtained = Literal["measured", "counted", "modelled", "simulated"]

T = TypeVar("T")


@dataclass(frozen=True)
class Metric:
    """One number of a run."""

    name: str
    value: float
    unit: str
    point: str = ""
    """Operating point of the artefact; empty when it has only one."""
    split: str = ""
    """Split of the dataset; empty for what no data entered."""
    n: int = 0
    """Observations behind the value; 0 when it is not an estimate."""
    low: float | None = None
    """Lower end of the 95 % interval."""
    high: float | None = None
    """Upper end of the 95 % interval."""
    obtained: Obtained = "measured"
    """`measured` on the device, `counted` exactly, `modelled` from shapes and ceilings, or
    `simulated`: played over time on such a model."""
    phase: str = ""
    """Part of the run (load, train, evaluate)."""
    task: str = ""
    """Benchmark task that an evaluator brought along; empty for the run's own dataset."""


@dataclass(frozen=True)
class Outcomes:
    """The outcome of every item behind a metric, for paired tests between runs."""

    evaluator: str
    metric: str
    point: str
    split: str
    ids: str
    """`schema.digest` of the item ids in order: runs with equal `ids` saw the same items."""
    values: list[float]
    """One per item, in order; their mean is the metric. Stored with 6 significant digits."""
    task: str = ""
    """As in `Metric`."""
    clusters: list[int] = field(default_factory=list)
    """Group of each item, where items are not independent (questions on one passage); else empty.
    Intervals and tests then resample whole groups."""


@dataclass(frozen=True)
class Record:
    """What one finished run was and what it gave."""

    schema: int
    key: str
    label: str
    stage: str
    spec: dict[str, Any]
    environment: dict[str, Any]
    parent: str
    """Key of the run this one went on from; empty when it started from the base model."""
    started: str
    """UTC, ISO 8601."""
    seconds: float
    """Wall-clock time of the run."""
    metrics: list[Metric]
    plan: dict[str, Any] = field(default_factory=dict)
    """What was predicted before the run."""
    notes: list[str] = field(default_factory=list)
    outcomes: list[Outcomes] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    """What was read of each source of the dataset, and what its splits are as tokens: the fields of
    `api.account`."""
    seeds: list[int] = field(default_factory=list)
    """Of the run and of those that made what it started from, last to first; empty in records from
    before it was kept."""

    @property
    def ended(self) -> float:
        """When the run finished, in seconds since the epoch."""
        return ended(self.started, self.seconds)

    def name_of(self, part: str) -> str:
        """Return the name of the `method`, `model` or `dataset`, or an empty string."""
        return called(self.spec.get(part) or {})


def ended(started: str, seconds: float) -> float:
    """Return when a run finished, in seconds since the epoch.

    Args:
        started: When it began, ISO 8601.
        seconds: How long it took.
    """
    return datetime.fromisoformat(started).timestamp() + seconds


# -- files -------------------------------------------------------------------------------------


def write(record: Record, folder: Path) -> Path:
    """Write a record into `folder`, atomically, and return its file.

    Raises:
        UserError: When the place cannot be written.
    """
    path = folder / f"{record.key}.json"
    plain = asdict(replace(record, outcomes=[]))
    del plain["outcomes"]
    plain["outcomes"] = [_packed(o) for o in record.outcomes]
    line = json.dumps(strict(plain), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    write_atomic(path, _sealed(line) + "\n")
    return path


def read(path: Path, outcomes: bool = True) -> Record:
    """Return the record in a file.

    Args:
        path: A file that `write` made, with this or an earlier version.
        outcomes: Whether to parse the per-item outcomes, the longest part of the line.

    Raises:
        UserError: When there is none, it is damaged, or a newer effbench wrote it.
    """
    try:
        return parse(path.read_text(encoding="utf-8"), path.stem, str(path), outcomes)
    except FileNotFoundError:
        raise UserError(f"There is no record {path}.", "See: effbench runs") from None
    except (ValueError, OSError) as error:
        raise _not_whole(str(path), error) from None


def parse(text: str, key: str, where: str, outcomes: bool = True) -> Record:
    """Return the record that a file holds.

    Args:
        text: Its content.
        key: Of its run; the file is named after it.
        where: What errors call it.
        outcomes: As for `read`.

    Raises:
        UserError: When it is damaged, or a newer effbench wrote it.
    """
    try:
        values = _parse(text, outcomes)
        if key != values["key"]:
            raise ValueError(f"it is that of run {values['key']}")
        if values.get("parent") == values["key"]:
            raise ValueError("its run goes on from itself")
        return _record(_migrated(values))
    except NewerVersionError as error:
        raise UserError(
            f"{where} was written by a newer effbench: {error.message}.",
            "Upgrade effbench to read it.",
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _not_whole(where, error) from None


def _not_whole(where: str, error: Exception) -> UserError:
    return UserError(
        f"{where} is not a whole record: {_reason(error)}.",
        "Restore it from version control, or delete it and run its command again.",
    )


def read_all(folder: Path, outcomes: bool = True) -> list[Record]:
    """Return all records of a folder, oldest first; none is skipped.

    Raises:
        UserError: That names the first file that cannot be read.
    """
    records = [read(path, outcomes) for path in record_files(folder)]
    return sorted(records, key=lambda r: (r.started, r.key))


class Completed(dict[str, Any]):
    """A spec that has the fields that are known here, so that nobody looks for them again."""

    @cached_property
    def texts(self) -> dict[str, str]:
        """What was written of it, by whom: a table asks the same of a run for each pair of rows."""
        return {}


def as_now(records: Sequence[Record]) -> list[Record]:
    """Return records whose specs have the fields that came since, so that specs can be compared."""
    from effbench.api.keys import completed
    from effbench.api.spec import Spec

    def now(spec: dict[str, Any]) -> Completed:
        return Completed(completed(Spec, migrated_spec(spec)))

    return [r if isinstance(r.spec, Completed) else replace(r, spec=now(r.spec)) for r in records]


# -- reading and writing one line --------------------------------------------------------------

OUTCOMES = ',"outcomes":['
"""Cannot occur inside a JSON string, where quotes are escaped; its last occurrence is ours."""


DIGEST = re.compile(r',"digest":"([0-9a-f]{32})"\}$')
"""Ends a line; earlier versions wrote none."""


def _sealed(line: str) -> str:
    return f'{line[:-1]},"digest":"{seal_of(line)}"}}'


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return str(error.strerror)
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _parse(text: str, outcomes: bool) -> dict[str, Any]:
    line = text.removesuffix("\n")
    if "\n" in line:
        raise ValueError("it has more than one line")
    if found := DIGEST.search(line):
        line = line[: found.start()] + "}"
        if seal_of(line) != found[1]:
            raise ValueError("its content is not what was written")
    if not outcomes and OUTCOMES in line and line.endswith("]}"):
        line = line[: line.rindex(OUTCOMES)] + "}"
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    foreign = CONTROL.search(line) or r"\u00" in line
    return printable_values(values) if foreign else values


def _migrated(values: dict[str, Any]) -> dict[str, Any]:
    number = values["schema"]
    if number > SCHEMA:
        raise NewerVersionError(f"its schema is {number}, known: {SCHEMA}")
    for step in range(number, SCHEMA):
        values = RECORDS[step](values)
    return values


def _record(values: dict[str, Any]) -> Record:
    metrics = [_typed(Metric, m, "metrics") for m in values.pop("metrics")]
    outcomes = [_typed(Outcomes, _unpacked(o), "outcomes") for o in values.pop("outcomes", [])]
    return _typed(Record, {**values, "metrics": metrics, "outcomes": outcomes}, "record")


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float,),
    "float | None": (float, type(None)),
    "dict": (dict,),
    "list": (list,),
    "Obtained": (str,),
}
"""What a field may hold, by the head of its annotation (this file must not import pydantic)."""


class _Part(NamedTuple):
    """What is held of a field when a record is read."""

    number: bool
    kinds: tuple[type, ...]
    choices: tuple[str, ...]
    """None of them where any value of its kind will do."""


@cache
def _parts(cls: type) -> tuple[dict[str, _Part], frozenset[str]]:
    """Return the fields of a class by name, and the names of those that cannot be missing."""
    found = {}
    for part in fields(cls):
        annotation = str(part.type)
        kinds = _KINDS[annotation.partition("[")[0]]
        choices = get_args(Obtained) if annotation == "Obtained" else ()
        found[part.name] = _Part(annotation.startswith("float"), kinds, choices)
    return found, frozenset(part.name for part in fields(cls) if _required(part))


def _typed(cls: type[T], values: dict[str, Any], where: str) -> T:
    known, required = _parts(cls)  # type: ignore[arg-type]
    unknown = values.keys() - known
    if unknown and required <= values.keys():
        raise NewerVersionError(f"{where}.{min(unknown)} is not known here")
    types = tuple(map(type, values.values()))
    for name in _to_look_at(cls, tuple(values), types):  # type: ignore[arg-type]
        part, value = known[name], values[name]
        if part.number and type(value) not in (float, bool, NoneType):
            value = values[name] = float(value)
        if not isinstance(value, part.kinds) or (part.choices and value not in part.choices):
            raise TypeError(f"{where}.{name} cannot be {value!r}")
    return cls(**values)


@cache
def _to_look_at(cls: type, names: tuple[str, ...], types: tuple[type, ...]) -> list[str]:
    """Return the fields whose values are not certain to be right by their type alone.

    A record has hundreds of metrics of few forms, so that this is asked anew of few of them.
    """
    known, _ = _parts(cls)
    given = [(name, kind) for name, kind in zip(names, types, strict=True) if name in known]
    return [name for name, kind in given if known[name].choices or kind not in known[name].kinds]


def _required(part: Field[Any]) -> bool:
    return part.default is MISSING and part.default_factory is MISSING


def _packed(outcomes: Outcomes) -> dict[str, Any]:
    """Return outcomes with short numbers: 6 digits, and `1` for 1.0."""
    rounded = (float(f"{v:.6g}") for v in outcomes.values)
    values = [int(v) if v.is_integer() and abs(v) < 1e6 else v for v in rounded]
    return {**asdict(replace(outcomes, values=[])), "values": values}


def _unpacked(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "values": [float(v) for v in values["values"]]}


def strict(value: Any) -> Any:
    """Return `value` with NaN and infinities as strings, which strict JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict(v) for v in value]
    return value
