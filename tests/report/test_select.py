"""An operating point that is chosen on one split and shown on another."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from effbench.report.comparison.compare import compare
from effbench.report.comparison.select import Criterion, criterion_of, select_points
from effbench.report.table import headline
from effbench.results.records import SCHEMA, Metric, Outcomes, Record
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

LOSS = Criterion("loss", "validation")


def run(
    method: str,
    values: dict[str, tuple[float, float]],
    number: int = 0,
    seed: int = 0,
    metric: str = "loss",
    splits: tuple[str, str] = ("validation", "test"),
) -> Record:
    """Return a record with `(validation, test)` of a metric at each point."""
    metrics = [
        Metric(metric, value, "", point, split, 4)
        for point, both in values.items()
        for split, value in zip(splits, both, strict=True)
    ]
    outcomes = [
        Outcomes("perplexity", m.name, m.point, m.split, m.split, [m.value + d for d in range(4)])
        for m in metrics
    ]
    metrics += [Metric("flops_per_token", n, "", p) for n, p in enumerate(values)]
    metrics += [Metric("train_tokens", 1000, "tokens", obtained="counted")]
    spec: dict[str, Any] = {"method": {"name": method}, "seed": seed, "train": {}}
    key = f"{number:04x}".ljust(16, "0")
    started = "2025-03-01T12:30:00+00:00"
    return Record(
        SCHEMA, key, method, "train", spec, {}, "", started, 60.0, metrics, outcomes=outcomes
    )


FAMILY = run("qdylora", {"r1": (2.0, 1.0), "r4": (1.5, 3.0), "r8": (1.7, 2.0)}, number=1)
SINGLE = run("qlora", {"": (1.9, 1.9)})


def points(record: Record) -> set[str]:
    return {m.point for m in record.metrics if m.point}


def test_the_best_point_on_validation_is_shown_on_test() -> None:
    found = select_points([SINGLE, FAMILY], LOSS)
    assert [r.key for r in found.records] == [SINGLE.key, FAMILY.key]
    assert points(found.records[1]) == {"r4"}
    assert {m.split for m in found.records[1].metrics} == {"", "test"}
    assert {(o.point, o.split) for o in found.records[1].outcomes} == {("r4", "test")}
    assert found.words == [
        "qdylora: r4 was chosen among 3 points by loss on validation (1.5); "
        "what is shown is on other rows."
    ]
    compared = compare(found.records, said=found.words)
    assert [str(m.kind) for m in compared.metrics if m.tested] == ["loss on test"]
    assert [row.name for row in compared.metrics[0].rows] == ["qlora", "qdylora r4"]
    assert compared.metrics[0].rows[1].value.value == 3.0
    assert compared.words[0] == found.words[0] and found.words[0] in compared.markdown()


def test_of_an_accuracy_the_highest_is_the_best() -> None:
    made = run("qdylora", {"r1": (0.2, 0.9), "r4": (0.5, 0.1)}, metric="accuracy")
    (record,) = select_points([made], Criterion("accuracy", "validation")).records
    assert points(record) == {"r4"}


def test_of_equal_points_the_first_is_taken() -> None:
    made = run("qdylora", {"r1": (2.0, 1.0), "r4": (1.5, 3.0), "r8": (1.5, 2.0)})
    assert points(select_points([made], LOSS).records[0]) == {"r4"}


def test_seeds_of_one_method_have_one_point() -> None:
    """Apart, the first would take r1 and the second r8; over both r4 is best."""
    first = run("qdylora", {"r1": (1.0, 1.0), "r4": (1.1, 1.0), "r8": (3.0, 1.0)}, 1, seed=0)
    second = run("qdylora", {"r1": (3.0, 1.0), "r4": (1.1, 1.0), "r8": (1.0, 1.0)}, 2, seed=1)
    found = select_points([first, SINGLE, second], LOSS)
    assert [points(r) for r in found.records] == [{"r4"}, set(), {"r4"}]
    assert "(1.1, a mean over 2 seeds)" in found.words[0]
    apart = [select_points([r], LOSS).records[0] for r in (first, second)]
    assert [points(r) for r in apart] == [{"r1"}, {"r8"}]
    (row, _) = compare(found.records).metrics[0].rows
    assert row.seeds == 2 and row.point == "r4"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("loss@test", "choose on the split that is reported"),
        ("loss", "no metric on a split"),
        ("@validation", "no metric on a split"),
        ("weight@validation", "not known"),
    ],
)
def test_criteria_that_are_refused(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        criterion_of(word)
    assert criterion_of("loss@validation") == LOSS


def test_a_record_without_the_split_is_refused() -> None:
    bare = replace(FAMILY, metrics=[m for m in FAMILY.metrics if m.split != "validation"])
    with pytest.raises(UserError, match="qdylora has no loss on validation") as caught:
        select_points([bare], LOSS)
    assert "effbench eval from=00010000" in caught.value.hint
    with pytest.raises(UserError, match="qdylora has no los"):
        select_points([FAMILY], Criterion("los", "validation"))
    only = replace(FAMILY, metrics=[m for m in FAMILY.metrics if m.split != "test"])
    with pytest.raises(UserError, match="nothing would be left to report"):
        select_points([only], LOSS)
    task = [replace(m, task="piqa") for m in FAMILY.metrics]
    with pytest.raises(UserError, match="qdylora has no"):
        select_points([replace(FAMILY, metrics=task)], LOSS)


def test_lists_of_runs_show_the_test_split() -> None:
    assert headline(FAMILY) == "loss 1 to 3 over 3 points"


# -- from runs to the table ------------------------------------------------------------------------


def test_runs_evaluate_several_splits_and_are_compared(
    bench: Bench, cli: Callable[..., tuple[int, str, str]]
) -> None:
    words = [
        "train.max_steps=2",
        "hardware.device=cpu",
        "dataset.limit.test=12",
        "evaluator=[perplexity,choices]",
        "evaluator.perplexity.split=[validation,test]",
        "evaluator.choices.split=[validation,test]",
    ]
    ranks = ["method.rank=4", "method.eval_ranks=[1,4]"]
    family = bench.run("train", "method=dylora", *ranks, *words)
    single = bench.run("train", "method=lora", "method.rank=4", *words)
    plain = bench.run("train", "method=dylora", *ranks, *words[:3])
    found = {(m.name, m.split, m.point): m.value for m in family.metrics if m.split}
    for name in ("loss", "accuracy"):
        assert {(s, p) for n, s, p in found if n == name} == {
            (s, p) for s in ("validation", "test") for p in ("r1", "r4")
        }
    alone = {(m.name, m.split, m.point): m.value for m in plain.metrics if m.split}
    assert {k: v for k, v in found.items() if k in alone} == alone

    where = ["--results", str(bench.root), "--format", "json"]
    keys = [single.key, family.key]
    status, out, _ = cli("compare", *keys, "--select", "loss@validation", *where)
    assert status == 0
    best = min(("r1", "r4"), key=lambda p: found["loss", "validation", p])
    table = next(m for m in json.loads(out)["metrics"] if m["metric"] == "loss")
    assert (table["split"], [r["point"] for r in table["rows"]]) == ("test", ["", best])
    assert json.loads(out)["words"][0].startswith(f"dylora: {best} was chosen among 2 points")
    status, _, said = cli("compare", single.key, plain.key, "--select", "loss@validation", *where)
    assert status == 2 and "split=[validation,test]" in said
