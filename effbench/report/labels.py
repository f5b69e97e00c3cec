"""Short names that tell a few runs apart, and what is different between their specs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from effbench.api.stages.base import trains

if TYPE_CHECKING:
    from effbench.results.records import Record
    from effbench.stats import Better

ABSENT = "—"
"""Stands for a value that a run does not have."""

LOWER_IS_BETTER = ("loss", "perplexity", "bits", "seconds", "bytes", "params")
HIGHER_IS_BETTER = ("accuracy", "acc", "exact_match", "agreement", "per_second")


def better(metric: str) -> Better:
    """Return which direction of a metric is the good one, by its name; empty when none is."""
    if any(part in metric for part in HIGHER_IS_BETTER):
        return "higher"
    return "lower" if any(part in metric for part in LOWER_IS_BETTER) else ""


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys; lists stay whole."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, part in value.items():
        flat |= flatten(part, f"{prefix}.{name}" if prefix else str(name))
    return flat


def differences(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Return the dotted keys whose values are not the same in all specs, one value per record.

    Training settings of a run that trained nothing are left out: they are not part of its key.
    """
    flat = [
        {k: v for k, v in flatten(r.spec).items() if trains(r.stage) or k[:6] != "train."}
        for r in records
    ]
    keys = dict.fromkeys(key for spec in flat for key in spec)
    values = {key: [spec.get(key, ABSENT) for spec in flat] for key in keys}
    return {key: row for key, row in values.items() if any(v != row[0] for v in row)}


def by_name(differs: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Return differences, with those of parts that have names (evaluators) each for itself.

    Args:
        differs: As `differences` returns them.
    """
    found = dict[str, list[Any]]()
    for key, values in differs.items():
        if not any(_is_named(value) for value in values):
            found[key] = values
            continue
        parts = [{p["name"]: p for p in value} if _is_named(value) else {} for value in values]
        flat = [flatten({n: p.get("settings", p) for n, p in each.items()}, key) for each in parts]
        rows = {key: [", ".join(each) or ABSENT for each in parts]}
        rows |= {k: [one.get(k, ABSENT) for one in flat] for one in flat for k in one}
        found |= {k: row for k, row in rows.items() if any(v != row[0] for v in row)}
    return found


def _is_named(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, dict) and "name" in part for part in value)
    )


def labels(records: Sequence[Record]) -> list[str]:
    """Return one short, unique name per record.

    The method, then the model, dataset, seed or stage where they are not all the same, then
    settings, and the run key when nothing else tells two runs apart.
    """
    parts = [
        [record.name_of("method") or record.label or record.key[:8] for record in records],
        [record.name_of("model") for record in records],
        [record.name_of("dataset") for record in records],
        [f"seed {record.spec.get('seed', ABSENT)}" for record in records],
        [record.stage for record in records],
    ]
    telling = [parts[0], *(p for p in parts[1:] if len(set(p)) > 1)]
    names = [", ".join(p for p in row if p) for row in zip(*telling, strict=True)]
    for group in _clashes(names):
        settings = _settings([records[i] for i in group])
        for i, text in zip(group, settings, strict=True):
            names[i] = f"{names[i]}, {text}" if text else names[i]
    for group in _clashes(names):
        for i in group:
            names[i] = f"{names[i]}, {records[i].key[:8]}"
    return names


def _clashes(names: list[str]) -> list[list[int]]:
    return [
        [i for i, name in enumerate(names) if name == clash]
        for clash, count in Counter(names).items()
        if count > 1
    ]


TELLING = ("method", "train", "dataset", "model", "hardware")
"""Parts of a spec, the one first that tells runs apart best; any other one comes after them."""


def _settings(records: list[Record]) -> list[str]:
    """Return the two most telling settings that are different, as `rank=8 alpha=16`."""
    found = sorted(differences(records).items(), key=lambda item: _order(item[0]))[:2]
    return [
        " ".join(f"{key.rpartition('.')[2]}={_brief(values[i])}" for key, values in found)
        for i in range(len(records))
    ]


def _order(key: str) -> int:
    part = key.partition(".")[0]
    return TELLING.index(part) if part in TELLING else len(TELLING)


def _brief(value: Any) -> str:
    """Return a setting in few characters; of parts that have names, the names."""
    if isinstance(value, list):
        return f"[{','.join(map(_brief, value))}]"
    return str(value.get("name", value)) if isinstance(value, dict) else str(value)


def command_of(record: Record) -> str:
    """Return the command that runs a run again; of one from before it was kept, by its key."""
    again = f"effbench {record.stage} --like {record.key} --fresh"
    return str(record.environment.get("command") or again)
