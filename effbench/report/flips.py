"""Items that one run gets right and the other does not: how many each way, and which."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from effbench.report.gate.arms import Arm, Place
from effbench.results.records import Outcomes
from effbench.results.store import Store, evaluation_stem
from effbench.stats import paired_test
from effbench.stats.base import binary
from effbench.util.errors import UserError, printable

LONGEST = 160
"""Characters of a text that are shown."""


@dataclass(frozen=True)
class Flips:
    """A metric of two runs, right or wrong on each item."""

    metric: str
    """Several with commas between them, where the same items change sides by each."""
    place: Place
    items: int
    only_first: list[int]
    """Items, counted from 0, that the first run alone gets right."""
    only_second: list[int]
    p: float
    """Two-sided p-value of no difference."""
    test: str
    """Its name: McNemar's exact one, or that of groups of items."""


def flips(first: Arm, second: Arm) -> list[Flips]:
    """Return the items that changed sides, for each metric that is right or wrong.

    Args:
        first: A run at an operating point.
        second: Another one, on the same items.

    Raises:
        UserError: For several seeds, and where they share no such metric on the same items.
    """
    for one in (first, second):
        if len(one.records) > 1:
            raise UserError(
                f"{one.ref} is several runs, whose answers differ.", "Name one run on each side."
            )
    metrics = dict.fromkeys(o.metric for o in first.records[0].outcomes)
    found = [
        _flips(metric, place, *first.outcomes(metric, place), *second.outcomes(metric, place))
        for metric in metrics
        for place in first.places(metric)
        if place in second.places(metric)
    ]
    if not (shared := [each for each in found if each]):
        raise UserError(
            f"{first.ref} and {second.ref} share no items that are right or wrong.",
            "Evaluate both: effbench eval from=RUN evaluator=choices, or evaluator=generation.",
        )
    return _merged(shared)


def _merged(found: Sequence[Flips]) -> list[Flips]:
    """Return metrics by which the same items change sides as one."""
    merged: dict[str, Flips] = {}
    for each in found:
        same = str([each.place, each.only_first, each.only_second])
        known = merged.get(same)
        names = f"{known.metric}, {each.metric}" if known else each.metric
        merged[same] = replace(each, metric=names)
    return list(merged.values())


def _flips(metric: str, place: Place, a: Outcomes, b: Outcomes) -> Flips | None:
    x, y = np.asarray(a.values), np.asarray(b.values)
    if a.ids != b.ids or x.size != y.size or not (binary(x) and binary(y)):
        return None
    p, test = paired_test(x, y, a.clusters)
    only_first, only_second = np.flatnonzero(x > y).tolist(), np.flatnonzero(y > x).tolist()
    return Flips(metric, place, x.size, only_first, only_second, p, test)


def flips_text(found: Flips, first: Arm, second: Arm, store: Store, most: int) -> str:
    """Return the counts, and the first items of each way with their texts where they were kept.

    Args:
        found: What changed sides.
        first: The first run.
        second: The second one.
        store: Where their run folders may be.
        most: Items to show of each way.
    """
    lines = [
        f"{found.metric}{found.place}: {len(found.only_first)} of {found.items:,} items are right "
        f"in {first.ref} alone, {len(found.only_second)} in {second.ref} alone, "
        f"p {'< 0.001' if found.p < 0.001 else f'= {found.p:.3f}'} ({found.test})"
    ]
    texts = [_texts(one, found, store) for one in (first, second)]
    normed = all(name.endswith("_norm") for name in found.metric.split(", "))
    written = "text_norm" if normed else "text"
    for one, items in ((first, found.only_first), (second, found.only_second)):
        lines += [f"right in {one.ref} alone:"] if items and most else []
        for item in items[:most]:
            lines += _item(item, (first, second), texts, written)
    if most and not any(texts) and (found.only_first or found.only_second):
        lines.append(_how(found, first))
    return "\n".join(lines)


Rows = Sequence[dict[str, str]]


def _item(item: int, arms: tuple[Arm, Arm], texts: Sequence[Rows], written: str) -> list[str]:
    """Return an item with its name and prompt, and what each run wrote or picked."""
    rows = next((rows for rows in texts if rows), None)
    if rows is None:
        return [f"  item {item + 1}"]
    lines = [f"  item {item + 1}, {rows[item]['id']}: {_end(rows[item]['prompt'])}"]
    answers = [(arm, own[item]) for arm, own in zip(arms, texts, strict=True) if own]
    said = ((arm, own.get(written, own["text"])) for arm, own in answers)
    return lines + [f"    {arm.ref}: {_short(text)}" for arm, text in said]


def _end(text: str) -> str:
    """Return the end of a prompt, where the question is: examples stand before it."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= LONGEST else f"…{text[1 - LONGEST :]}"


def _short(text: str) -> str:
    text = printable(" ".join(text.split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _texts(arm: Arm, found: Flips, store: Store) -> Rows:
    """Return the texts that an evaluation kept in its run folder, item by item; or nothing."""
    folder = store.run(arm.records[0].key).path / "evaluations"
    stems = [evaluation_stem(found.place.evaluator, point) for point in (arm.point, "")]
    for stem, part in product(stems, (found.place.task, found.place.split)):
        path = folder / f"{stem}.{part}.jsonl"
        if part and path.is_file():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if len(rows) == found.items and all({"id", "prompt", "text"} <= {*r} for r in rows):
                return rows
    return []


def _how(found: Flips, arm: Arm) -> str:
    """Return where the texts of items can be had, when no run folder has them."""
    if found.place.evaluator == "generation":
        again = f"effbench eval from={arm.records[0].key[:8]} evaluator=generation --fresh"
        return f"Their texts are in no run folder here; they are made again by: {again}"
    if found.place.task:
        return f"No texts were kept; items are the rows of the task {found.place.task}, in order."
    record = arm.records[0]
    data = record.spec.get("dataset") or {}
    files = (data.get("files") or {}).items()
    words = [data.get("name", ""), *(f"dataset.files.{s}={file}" for s, file in files)]
    shown = shlex.join(["effbench", "show", "dataset", *words, "--split", found.place.split])
    return (
        f"No texts were kept; items are rows of {record.name_of('dataset')}, in order: "
        f"{shown} --rows 3"
    )
