"""What every method promises; a new method is held to it by its two files alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from goldens import PUBLIC, Golden

from effbench.api import registry
from effbench.results.records import Record
from effbench.results.store import RunFolder
from effbench.testing.bench import Bench, without_evaluation
from effbench.testing.contract import MethodContract, applies, for_each, no_part_is_made_twice
from effbench.testing.kinds import evaluation_kind, makes
from effbench.testing.runs import Made, counted, overrides


class TestMethods(MethodContract):
    """The contract, and what others rely on beside it."""

    methods = registry.names("methods")

    @pytest.mark.golden
    def test_the_names_that_it_leaves_stay(
        self, name: str, made: Callable[[str], Made], golden: Callable[[str], Golden]
    ) -> None:
        found, usual = names_of(made(name)), names_of(made("full"))
        if name != "full":
            found = {**found, **only_new(found, usual)}
        golden("methods.json").check(name, found, PUBLIC, grows=3)

    @pytest.mark.golden
    @for_each(evaluation_kind)
    def test_the_names_that_evaluators_leave_stay(
        self,
        name: str,
        made: Callable[[str], Made],
        evaluated: Callable[[str], Record],
        golden: Callable[[str], Golden],
    ) -> None:
        def left(name: str) -> dict[str, Any]:
            record = evaluated(name)
            names = public_names(record, made(name).bench.store.run(record.key))
            return {**names, "files": dict.fromkeys(names["files"], "")}

        found = left(name)
        if name != "full":
            found = {**found, **only_new(found, left("full"))}
        golden("evaluated.json").check(name, found, PUBLIC, grows=3)

    @pytest.mark.golden
    @applies(makes)
    def test_the_same_settings_give_the_same_bits(
        self, name: str, made: Callable[[str], Made], golden: Callable[[str], Golden]
    ) -> None:
        version = registry.find("methods", name).version
        golden("bits.json").check_bits(f"method {name}", version, made(name).tensors())


def only_new(found: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics and files that the usual ones are not among."""
    metrics = {k: v for k, v in found["metrics"].items() if k not in usual["metrics"]}
    files = {f: "" for f in found["files"] if f not in usual["files"]}
    return {
        "metrics": metrics,
        "files": files if isinstance(found["files"], dict) else list(files),
    }


def names_of(run: Made) -> dict[str, Any]:
    """Return the names that a run of a method leaves, those of tensors among them."""
    tensors = {re.sub(r"\.\d+\.", ".N.", name) for name in run.tensors()}
    folder = run.bench.folder(run.job)
    return {**public_names(run.record, folder), "tensors": sorted(tensors)}


def public_names(record: Record, folder: RunFolder) -> dict[str, Any]:
    """Return the points, metrics and files of a run.

    An energy counts as modelled: whether it is measured is the machine's to say.
    """
    points = list(dict.fromkeys(m.point for m in record.metrics if m.point))
    files = {p.relative_to(folder.path).as_posix() for p in folder.path.rglob("*") if p.is_file()}
    for point in points:
        files = {re.sub(rf"@{re.escape(point)}(?=\.)", "@POINT", name) for name in files}
    names = {m.name.replace("_modelled", ""): m.unit for m in record.metrics}
    return {"files": sorted(files), "metrics": names, "points": points}


def test_no_part_of_structured_by_wanda_is_made_twice(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_evaluation(monkeypatch)
    words = overrides("structured", criterion="wanda")
    whole, job = (bench.job("compress", *words, f"seed={seed}") for seed in (0, 1))
    with counted("structured") as parts:
        bench.go(whole)
    no_part_is_made_twice("structured", bench, job, parts)
    assert bench.artefact(job) == bench.artefact(whole)
