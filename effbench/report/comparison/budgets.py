"""What a fair comparison holds equal, and whether it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from effbench.api.schema import digest
from effbench.api.stages.base import trains
from effbench.report.comparison.seeds import Group, settings
from effbench.report.table import show
from effbench.results.records import Record

EQUAL = 0.01
"""Budgets count as equal when the largest exceeds the smallest by at most this share."""


@dataclass(frozen=True)
class Budget:
    """Something that a fair comparison holds equal."""

    name: str
    values: list[float | str | None]
    """One per run or group of runs; None where it is not recorded."""

    @property
    def equal(self) -> bool | None:
        """Whether all had the same, within 1 %; None when it is not recorded for all."""
        if any(v is None for v in self.values):
            return None
        numbers = [v for v in self.values if isinstance(v, int | float)]
        if len(numbers) < len(self.values):
            return len(set(self.values)) == 1
        return max(numbers) <= (1 + EQUAL) * min(numbers)

    def shown(self) -> str:
        """Return the values as people read them."""
        return " against ".join(dict.fromkeys(show(v) for v in self.values))


def budgets(
    groups: Sequence[Group],
    known: Sequence[Record] = (),
    tunings: Sequence[Collection[str]] = (),
) -> list[Budget]:
    """Return what a fair comparison of groups holds equal.

    Args:
        groups: What is compared.
        known: All finished runs of the folder, among which the tuning trials are counted.
        tunings: Keys of the runs of each grid that was declared to tune.
    """
    rows: dict[str, Callable[[Record], float | str | None]] = {
        "training tokens": lambda r: _metric(r, "train_tokens"),
        "layer forwards": lambda r: _metric(r, "train_layer_forwards"),
        "optimiser steps": _steps,
        "trainable parameters": lambda r: _metric(r, "trainable_params"),
    }
    dataset = partial(_dataset, all(trains(group.records[0].stage) for group in groups))
    found = [_content("base model", groups, _model), _content("dataset", groups, dataset)]
    found += [Budget(name, [_common(value, g) for g in groups]) for name, value in rows.items()]
    trials = Tried(known, tunings)
    tried = [float(trials.of(g.records[0])) for g in groups]
    seeds = [float(len(g.records)) for g in groups]
    return [*found, Budget("tuning trials", [*tried]), Budget("seeds", [*seeds])]


Content = tuple[str, str]
"""A name for people, and a hash of what it stands for."""


def _content(name: str, groups: Sequence[Group], of: Callable[[Record], Content]) -> Budget:
    """Return a budget that is equal where the content is, whatever its name is."""
    found = [of(group.records[0]) for group in groups]
    hashes, shown = {hash_ for _, hash_ in found}, dict(found)
    if len(hashes) == 1:
        return Budget(name, [found[0][0] or None] * len(found))
    alike = len(shown) < len(hashes)
    return Budget(name, [f"{n} ({hash_[:8]})" if alike else n or None for n, hash_ in found])


def _model(record: Record) -> Content:
    """Return the base model: all that is said of it but names of what is known otherwise.

    Where the hash of its content is known, its place is a name; sizes are one where they are only
    stated, for weights that have their own.
    """
    spec = record.spec.get("model") or {}
    names = {"name"}
    if spec.get("fingerprint"):
        names |= {"id", "path", "revision"}
    if spec.get("source") != "random":
        names.add("shape")
    return record.name_of("model"), digest({k: v for k, v in spec.items() if k not in names})


def _dataset(limited: bool, record: Record) -> Content:
    """Return the dataset: its rows and how they become text.

    Args:
        limited: Whether it matters how many of them are trained on.
        record: A run.
    """
    spec = record.spec.get("dataset") or {}
    places = ("name", "files", "limit", "allow_overlap")
    parts = {name: value for name, value in spec.items() if name not in places}
    limit = (spec.get("limit") or {}).get("train") if limited else None
    return record.name_of("dataset"), digest([parts, limit])


class Tried:
    """The settings of finished runs, among which those are counted that were tried to get a run.

    They are those of the grids with an objective that the run's settings were part of. Where no
    such grid declares them, all runs count that differ from it in settings of the method or of the
    training alone, at the same rows of training: ablations too. Seeds do not count.
    """

    def __init__(self, known: Sequence[Record], tunings: Sequence[Collection[str]] = ()) -> None:
        """Look at runs once.

        Args:
            known: All finished runs of the folder; others are not counted.
            tunings: Keys of the runs of each grid that was declared to tune.
        """
        self._grids = [frozenset(keys) for keys in tunings]
        self._frames: dict[str, dict[str, str]] = {}
        self._settings: dict[str, str] = {}
        for record in known:
            self._settings[record.key] = settled = _tuned(record)
            self._frames.setdefault(_frame(record), {})[record.key] = settled

    def of(self, record: Record) -> int:
        """Return how many settings were tried to get a run, itself among them."""
        own = _tuned(record)
        near = self._frames.get(_frame(record), {})
        same = {record.key, *(key for key, settled in near.items() if settled == own)}
        declared = [keys for keys in self._grids if not same.isdisjoint(keys)]
        if declared:
            tried = self._settings.keys() & frozenset[str]().union(*declared)
            return len({own, *(self._settings[key] for key in tried)})
        return len({own, *near.values()})


def _frame(record: Record) -> str:
    """Return what all trials of one tuning have in common."""
    spec = settings(record)
    train = record.spec.get("train") or {}
    rows: float = 1
    for name in ("max_steps", "batch_size", "accumulation"):
        rows *= int(train.get(name) or 1)
    rows = train.get("epochs") or rows
    parts = [record.stage, rows if trains(record.stage) else 0, record.parent]
    parts += [record.name_of("method")]
    parts += [spec.get("model"), spec.get("dataset")]
    return json.dumps(parts, sort_keys=True)


def _tuned(record: Record) -> str:
    """Return the settings that a tuning varies."""
    spec = settings(record)
    train = {k: v for k, v in (spec.get("train") or {}).items() if k != "checkpoint_every"}
    return json.dumps([spec.get("method"), train], sort_keys=True)


def _common(value: Callable[[Record], float | str | None], group: Group) -> float | str | None:
    """Return a budget of the runs of a group: the same for all of them, or their mean."""
    values = [value(record) for record in group.records]
    numbers = [v for v in values if isinstance(v, int | float)]
    if len(numbers) == len(values):
        return sum(numbers) / len(numbers)
    return values[0] if len(set(values)) == 1 else None


def _metric(record: Record, name: str) -> float | None:
    """Return a metric of the whole run, or its largest one over the operating points."""
    return max((m.value for m in record.metrics if m.name == name), default=None)


def _steps(record: Record) -> float | None:
    if not trains(record.stage):
        return None
    taken = _metric(record, "train_steps")
    return taken if taken is not None else (record.spec.get("train") or {}).get("max_steps")
