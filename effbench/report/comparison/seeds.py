"""Runs that differ in nothing but their seed, as one group."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from effbench.api.keys import copied, leave_places_out
from effbench.api.stages import base as stages
from effbench.api.stages.base import trains
from effbench.report.labels import labels
from effbench.results.records import Completed, Record, as_now

Seeds = tuple[int, ...]
"""The seeds of a run and of the runs it went on from, last to first."""


@dataclass(frozen=True)
class Group:
    """Runs of one spec with several seeds, or a single run."""

    label: str
    records: list[Record]
    """In the order of their seeds."""
    seeds: list[Seeds]
    """Of each run."""

    @property
    def keys(self) -> str:
        """Run keys, joined."""
        return "+".join(record.key for record in self.records)

    @property
    def seedless(self) -> bool:
        """Whether no seed enters its numbers: a model evaluated as it is, without training."""
        first = self.records[0]
        return first.stage == "eval" and not first.parent

    @property
    def made_with(self) -> list[Seeds]:
        """The seeds of each run that what it gives was made with, by which runs make pairs.

        That of an evaluation is not among them, unless it is all that its runs differ in.
        """
        return _made_with(self.records[0], self.seeds)


def grouped(records: Sequence[Record], known: Sequence[Record] = ()) -> list[Group]:
    """Return runs in groups of the same spec up to seeds, in order of first appearance.

    A second run with a seed that its group has already begins a group of its own.

    Args:
        records: The runs to group.
        known: Runs that these may have gone on from, whose seeds do not count either.
    """
    records, known = as_now(records), as_now(known)
    by_key = {record.key: record for record in [*known, *records]}
    found: list[tuple[str, list[Record], list[Seeds]]] = []
    for record in records:
        name, seeds = identity(record, by_key)
        for other, members, used in found:
            if other == name and seeds not in used:
                members.append(record)
                used.append(seeds)
                break
        else:
            found.append((name, [record], [seeds]))
    names = labels([_representative(members, seeds) for _, members, seeds in found])
    groups = []
    for name, (_, members, used) in zip(names, found, strict=True):
        order = sorted(range(len(used)), key=used.__getitem__)
        if used[0] != used[order[0]]:
            members, used = [members[i] for i in order], [used[i] for i in order]
        groups.append(Group(name, members, used))
    return groups


def identity(record: Record, known: Mapping[str, Record]) -> tuple[str, Seeds]:
    """Return what a run is up to its seeds, and those seeds.

    Args:
        record: The run.
        known: Runs by key, among them those it went on from; one that is missing counts by its key.
    """
    own, seeds = _itself(record), (int(record.spec.get("seed", 0)),)
    earlier = known.get(record.parent)
    if earlier is None:
        others = tuple(record.seeds[1:]) if record.parent else ()
        return f"{own} from {record.parent}", seeds + others
    before, others = identity(earlier, known)
    return f"{own} from {before}", seeds + others


def _itself(record: Record) -> str:
    """Return what a run is up to its own seed and what it went on from."""
    texts = record.spec.texts if isinstance(record.spec, Completed) else {}
    if __name__ not in texts:
        spec = settings(record)
        for name in ("seed", "parent"):
            spec.pop(name, None)
        texts[__name__] = json.dumps(spec, sort_keys=True)
    return texts[__name__]


def settings(record: Record) -> dict[str, Any]:
    """Return a copy of the spec without what its stage does not use, and where local files lie."""
    spec: dict[str, Any] = copied(record.spec)
    evaluators = (plugin.get("settings") or {} for plugin in spec.get("evaluators") or ())
    for part in (spec.get("model") or {}, spec.get("dataset") or {}, *evaluators):
        leave_places_out(part)
    if not trains(record.stage):
        spec.pop("train", None)
    return spec


def _made_with(first: Record, seeds: list[Seeds]) -> list[Seeds]:
    if not first.parent or stages.find(first.stage).makes:
        return seeds
    made = [own[1:] for own in seeds]
    return made if all(made) and len(set(made)) == len(made) else seeds


def _representative(members: Sequence[Record], seeds: list[Seeds]) -> Record:
    """Return the first run with the seeds that tell them apart in the place of its own."""
    if len(members) == 1:
        return members[0]
    own = sorted(s[0] for s in _made_with(members[0], seeds))
    whole = own == list(range(own[0], own[-1] + 1))
    shown = f"{own[0]}–{own[-1]}" if whole and own[-1] > own[0] else ", ".join(map(str, own))
    return replace(members[0], spec={**members[0].spec, "seed": shown})
