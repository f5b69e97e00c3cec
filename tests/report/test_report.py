"""Tables, comparisons and plots of records made up for the purpose."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from effbench.api.schema import plain
from effbench.api.spec import ModelSpec
from effbench.report.comparison.budgets import Tried
from effbench.report.comparison.compare import compare, margins_of
from effbench.report.comparison.contrast import Side, p_of_difference
from effbench.report.comparison.seeds import grouped
from effbench.report.labels import by_name, differences, labels
from effbench.report.plots.curves import _axis, comparison_plot
from effbench.report.table import (
    RUN_COLUMNS,
    Table,
    Value,
    comparison,
    headline,
    readable,
    run_row,
    tasks_table,
)
from effbench.report.terminal import print_comparison, print_table
from effbench.results.records import SCHEMA, Metric, Outcomes, Record
from effbench.results.sweeps import OUTCOME, declare_tuning, tunings
from effbench.stats import mean_interval
from effbench.util.errors import UserError

ITEMS = np.random.default_rng(0).gamma(20, 0.12, 120)


def run(
    method: str,
    shifts: dict[str, float],
    *,
    number: int = 0,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    ids: str = "aa",
    weight: float = 4 * 2**20,
    obtained: Any = "counted",
    tokens: float = 1000,
) -> Record:
    metrics, outcomes = [], []
    noise = np.random.default_rng(number + 1)
    for point, shift in shifts.items():
        values = (ITEMS + shift + noise.normal(0, 0.02, ITEMS.size)).tolist()
        mean = mean_interval(values)
        metrics.append(Metric("loss", mean[0], "nats/token", point, "test", 120, mean[1], mean[2]))
        outcomes.append(Outcomes("perplexity", "loss", point, "test", ids, values))
    metrics += [
        Metric("weight_bytes", weight, "bytes", obtained=obtained),
        Metric("peak_bytes", 3 * 2**30, "bytes", phase="train"),
        Metric("train_tokens", tokens, "tokens", obtained="counted"),
    ]
    spec = {
        "stage": "train",
        "method": {"name": method, "settings": settings or {}},
        "model": {"name": "tiny"},
        "dataset": {"name": "arithmetic"},
        "train": {"max_steps": 60},
        "seed": seed,
    }
    key = f"{number:04x}".ljust(16, "0")
    started = f"2025-03-{number + 1:02d}T12:30:00+00:00"
    return Record(
        SCHEMA, key, method, "train", spec, {}, "", started, 60.0, metrics, outcomes=outcomes
    )


LORA = run("lora", {"": 0.0})
FAMILY = run("qdylora", {"r1": 0.12, "r2": 0.05, "r8": 0.0}, number=1, settings={"rank": 8})
FULL = run("full", {"": -0.05}, number=2, weight=8 * 2**20)


def text_of(renderable: Any, width: int = 140) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(renderable)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


# -- labels ------------------------------------------------------------------------------------


def test_labels_say_only_what_tells_runs_apart() -> None:
    assert labels([LORA, FAMILY]) == ["lora", "qdylora"]
    assert labels([LORA, run("lora", {"": 0}, seed=1)]) == ["lora, seed 0", "lora, seed 1"]
    small, large = (run("lora", {"": 0}, settings={"rank": r}) for r in (4, 8))
    assert labels([small, large]) == ["lora, rank=4", "lora, rank=8"]
    parts = [{"name": "choices", "settings": {"split": "test"}}]
    more = replace(large, spec={**large.spec, "evaluators": parts, "train": {"max_steps": 9}})
    spec = {"evaluators": [], **small.spec}  # first in the spec, and last in what is told
    told = labels([replace(small, spec=spec), more])
    assert told == ["lora, rank=4 max_steps=60", "lora, rank=8 max_steps=9"]
    spec = {**large.spec, "evaluators": []}
    told = labels([replace(large, spec=spec), replace(more, spec={**spec, "evaluators": parts})])
    assert told == ["lora, evaluators=[]", "lora, evaluators=[choices]"]
    again = labels([LORA, run("lora", {"": 0}, number=7)])
    assert again == ["lora, 00000000", "lora, 00070000"]


def test_differences_of_evaluators_are_told_by_setting() -> None:
    def asked(name: str, **settings: object) -> dict[str, object]:
        return {"name": name, "settings": settings}

    first = [asked("generation", limit=4, tasks=[]), asked("speed", repeats=2)]
    rows = {"evaluators": [first, [asked("generation", limit=9, tasks=[])]], "seed": [0, 1]}
    assert by_name(rows) == {
        "evaluators": ["generation, speed", "generation"],
        "evaluators.generation.limit": [4, 9],
        "evaluators.speed.repeats": [2, "—"],
        "seed": [0, 1],
    }


def test_differences_are_dotted_and_absent_is_not_null() -> None:
    found = differences([LORA, FAMILY])
    assert found == {
        "method.name": ["lora", "qdylora"],
        "method.settings.rank": ["—", 8],
    }


def test_a_baseline_hides_nothing_that_the_others_differ_in() -> None:
    small, large = (
        run("lora", {"": 0}, number=r, settings={"rank": r, "alpha": 16}) for r in (4, 8)
    )
    found = compare([FULL, small, large], [])
    assert "method.settings.rank" in text_of(found.rich())
    assert "method.settings.alpha" not in text_of(found.rich()), "only the baseline lacks it"
    assert "method.settings.alpha" in text_of(found.rich(full=True))


# -- tables ------------------------------------------------------------------------------------


def test_words_stay_whole_at_the_width_of_a_terminal() -> None:
    heads = ("loss (test, nats/token)", "bits_per_byte (test, bits/byte)", "params (parameters)")
    table = Table("", ("metric", *heads), [("train_tokens_per_second", 10.64, 10.75, 6_399_000)])
    text = text_of(table.rich(), width=72)
    for word in ("train_tokens_per_second", "nats/token)", "bits/byte)", "(parameters)", "10.75"):
        assert word in text, text


def test_numbers_as_people_read_them() -> None:
    assert readable(2.34567) == "2.346"
    assert readable(61440) == "61,440"
    assert readable(134515008) == "134.5 M"
    assert readable(3 * 2**30, "bytes") == "3 GiB"
    assert readable(23040, "bytes/token") == "22.50 KiB/token"
    assert readable(0.00001234) == "1.23e-05"
    assert readable(0) == "0"
    assert readable(float("nan")) == "nan"
    assert str(Value(2.3456, "nats/token", 2.31, 2.38)) == "2.346 [2.310, 2.380]"
    assert str(Value(0.0001, "", -0.01, 0.01)) == "0.000 [-0.010, 0.010]"
    assert str(Value(2.5, "", float("-inf"), float("inf"))) == "2.500"


def test_one_table_three_forms() -> None:
    table = Table("A [bold]title", ("run|s", "loss"), [("x[1]", Value(1.5, "", 1.0, 2.0))], ("n",))
    assert "A [bold]title" in text_of(table.rich()) and "x[1]" in text_of(table.rich())
    assert "| run\\|s | loss |\n| --- | ---: |\n| x[1] | 1.5 [1.0, 2.0] |" in table.markdown()
    assert table.csv() == "run|s,loss,loss_low,loss_high\nx[1],1.5,1.0,2.0\n"


def test_the_list_of_runs() -> None:
    text = text_of(Table("", RUN_COLUMNS, [run_row(LORA), run_row(FAMILY)]).rich(), width=200)
    assert "2025-03-01 12:30" in text and "00000000" in text
    assert headline(LORA) == f"loss {LORA.metrics[0].value:.3f} nats/token"
    low, high = FAMILY.metrics[2].value, FAMILY.metrics[0].value
    assert headline(FAMILY) == f"loss {low:.3f} to {high:.3f} nats/token over 3 points"
    assert headline(run("base", {})) == "weight_bytes 4 MiB"


def test_what_is_modelled_has_a_column_of_its_own() -> None:
    modelled = run("other", {"": 0.1}, number=3, obtained="modelled")
    table = comparison([LORA, FAMILY, modelled])
    assert "weight_bytes" in table.columns
    assert "weight_bytes (modelled, not measured)" in table.columns
    counted = table.columns.index("weight_bytes")
    assert table.rows[-1][counted] is None and table.rows[0][counted] is not None
    assert [row[1] for row in table.rows] == ["", "r1", "r2", "r8", ""]
    assert "point" not in comparison([LORA, FULL]).columns


# -- comparisons -------------------------------------------------------------------------------


def test_a_comparison_tests_pairs_and_adjusts_for_the_table() -> None:
    found = compare([LORA, FAMILY, FULL])
    (loss,) = [m for m in found.metrics if m.kind.metric == "loss"]
    assert loss.kind.evaluator == "perplexity"
    assert [row.name for row in loss.rows] == [
        "lora",
        "qdylora r1",
        "qdylora r2",
        "qdylora r8",
        "full",
    ]
    findings = [row.finding for row in loss.rows]
    assert findings == ["", "higher", "higher", "cannot be told apart", "lower"]
    assert loss.rows[4].verdict.startswith("full is lower than lora by 0.0496 [")
    for row in loss.rows[1:]:
        assert row.difference and row.p_adjusted
        assert row.difference.p <= row.p_adjusted <= min(1.0, 4 * row.difference.p)


def test_points_of_one_run_are_compared_with_its_first() -> None:
    found = compare([FAMILY])
    assert [m.kind.metric for m in found.metrics] == ["loss"]
    assert [row.finding for row in found.metrics[0].rows] == ["", "lower", "lower"]
    assert "held equal" not in found.markdown()


def test_other_items_get_no_paired_test() -> None:
    found = compare([LORA, run("dora", {"": 0.3}, number=4, ids="bb")])
    row = found.metrics[0].rows[1]
    assert row.finding == "not the same items: no paired test"
    assert row.difference is None and row.p_adjusted is None
    assert row.value.value > found.metrics[0].rows[0].value.value


def test_one_run_at_one_point_has_nothing_beside_it() -> None:
    with pytest.raises(UserError, match="one run at one operating point") as error:
        compare([LORA])
    assert f"effbench runs show {LORA.key[:8]}" in error.value.hint


def test_counted_and_modelled_numbers_are_not_compared() -> None:
    found = compare([LORA, run("other", {"": 0.1}, number=3, obtained="modelled")])
    assert "weight_bytes" not in [m.kind.metric for m in found.metrics]
    assert "weight_bytes is counted in lora but modelled in other: not compared." in found.notes


def test_seeds_that_change_nothing_have_no_spread() -> None:
    """What sums of equal numbers differ by is none of the seeds'."""
    first = run("lora", {"": 0.1}, number=20)
    noisy = [replace(m, value=m.value * (1 + 4e-16)) for m in first.metrics]
    spec = {**first.spec, "seed": 1}
    second = replace(first, key="1" * 16, seeds=[1], spec=spec, metrics=noisy)
    [table] = [m for m in compare([first, second, FULL]).metrics if m.kind.metric == "loss"]
    assert table.rows[0].seeds == 2 and table.rows[0].spread == 0


def test_what_is_missing_is_said() -> None:
    found = compare([LORA, FULL, run("bare", {}, number=5)])
    assert "bare has no loss on test." in found.notes
    bare = [run(f"bare{n}", {}, number=n) for n in (5, 6)]
    assert "2 runs have no loss on test: bare5; bare6." in compare([LORA, FULL, *bare]).notes
    assert "loss on test is only in lora." in compare([LORA, run("bare", {}, number=5)]).notes


def test_budgets_say_what_was_equal() -> None:
    longer = run("full", {"": 0.0}, number=6, tokens=2000)
    equal = {b.name: b.equal for b in compare([LORA, longer]).budgets}
    assert equal["base model"] is True and equal["optimiser steps"] is True
    assert equal["training tokens"] is False
    assert equal["trainable parameters"] is None


def test_every_form_of_a_comparison() -> None:
    found = compare([LORA, FAMILY, FULL])
    brief, full, markdown = text_of(found.rich()), text_of(found.rich(full=True)), found.markdown()
    for text in (brief, full, markdown):
        assert "cannot be told apart" in text
        assert "against lora" in text
        assert "(2.00×)" in text
        assert ("method.settings.rank" in text) is (text is not brief)
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    assert len(rows) == sum(len(m.rows) for m in found.metrics)
    assert float(rows[1]["difference_low"]) < float(rows[1]["difference"])
    assert {row["obtained"] for row in rows} == {"measured", "counted"}
    whole = json.loads(found.json())
    assert whole["labels"] == ["lora", "qdylora", "full"]
    assert whole["metrics"][0]["rows"][1]["difference"]["test"] == "sign-flip permutation"
    assert {b["name"]: b["equal"] for b in whole["budgets"]}["training tokens"] is True


# -- plots -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_plot_of_a_family_and_levels(suffix: str, tmp_path: Path) -> None:
    path = comparison_plot(compare([LORA, FAMILY, FULL]), "loss", tmp_path / f"loss.{suffix}")
    assert path.stat().st_size > 2000
    if suffix == "svg":
        assert "qdylora" in path.read_text() or "<path" in path.read_text()


def test_the_axis_of_points_is_numeric_where_the_names_are() -> None:
    assert _axis(["r1", "r2", "r8"])[::2] == ({"r1": 1.0, "r2": 2.0, "r8": 8.0}, True)
    assert _axis(["4bit", "3bit"])[::2] == ({"4bit": 4.0, "3bit": 3.0}, False)
    assert _axis(["small", "large"])[0] == _axis(["r1", "d2"])[0] == {}


def test_plots_need_something_to_show(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No run has") as caught:
        comparison_plot(compare([LORA, FAMILY]), "los", tmp_path / "x.png")
    assert "'loss'" in caught.value.hint
    with pytest.raises(UserError, match="kind of picture"):
        comparison_plot(compare([LORA, FAMILY]), "loss", tmp_path / "x.docx")


# -- tasks -------------------------------------------------------------------------------------


def with_tasks(number: int, shift: float = 0.0) -> Record:
    tasks = [
        Metric("accuracy", 0.5 + shift, point=p, unit="", n=100, low=0.4, high=0.6, task=task)
        for p in ("r1", "r8")
        for task in ("piqa", "copa")
    ]
    made = run("lora", {}, number=number)
    return replace(made, metrics=[*made.metrics, *tasks])


def test_tasks_are_kept_apart() -> None:
    made = with_tasks(1)
    assert headline(made) == "accuracy of piqa 0.5000 over 2 points"
    table = tasks_table(made)
    assert table.columns == ("task", "point", "accuracy")
    assert [row[:2] for row in table.rows] == [
        ("piqa", "r1"),
        ("copa", "r1"),
        ("piqa", "r8"),
        ("copa", "r8"),
    ]
    assert tasks_table(LORA).rows == []
    heads = comparison([made], ["accuracy"]).columns
    assert heads == ("run", "point", "accuracy (piqa)", "accuracy (copa)")


def test_phases_of_a_task_have_columns_of_their_own() -> None:
    speeds = [
        Metric("mfu", value, "", phase=phase, task=task)
        for task, shift in (("b1", 0.0), ("b8", 0.1))
        for phase, value in (("prefill", 0.5 + shift), ("decode", 0.2 + shift))
    ]
    table = tasks_table(replace(LORA, metrics=[*speeds, Metric("kv", 1.0, "", task="b1")]))
    assert table.columns == ("task", "mfu_prefill", "mfu_decode", "kv")
    assert table.text().splitlines()[2].split() == ["b1", "0.5000", "0.2000", "1"]


def test_a_table_too_wide_for_a_terminal_goes_on_below() -> None:
    table = Table("", ("task", "first", "wide_column", "last"), [("b1", "1", "2" * 20, "3")])
    parts = [part.columns for part in table.fitted(40, 1)]
    assert parts == [("task", "first", "wide_column"), ("task", "last")]
    assert table.fitted(80, 1)[0].columns == table.columns
    assert [part.columns for part in table.fitted(10, 1)] == [
        ("task", name) for name in table.columns[1:]
    ]


def test_a_plot_names_its_task(tmp_path: Path) -> None:
    path = comparison_plot(compare([with_tasks(1)]), "accuracy", tmp_path / "x.svg")
    assert path.stat().st_size > 2000
    made = [m.title for m in compare([with_tasks(1), with_tasks(2)]).metrics]
    assert "accuracy of piqa" in made and "accuracy of copa" in made


# -- seeds -------------------------------------------------------------------------------------


def seeds_of(
    method: str, shift: float, first: int, count: int = 4, **settings: Any
) -> list[Record]:
    level = np.random.default_rng(first).normal(0, 0.05, count)
    return [
        run(method, {"": shift + level[s]}, number=first + s, seed=s, **settings)
        for s in range(count)
    ]


def test_runs_that_differ_in_their_seed_are_one_row() -> None:
    found = compare([*seeds_of("lora", 0.0, 10), *seeds_of("full", -0.6, 20)])
    assert found.labels == ["lora", "full"]
    (loss,) = [m for m in found.metrics if m.tested]
    first, row = loss.rows
    assert (first.seeds, row.seeds) == (4, 4)
    assert row.key.count("+") == 3
    assert row.spread == pytest.approx(0.05, rel=0.9)
    assert row.covers == "seeds and items" and row.finding == "lower"
    assert row.difference and row.items and row.over_seeds
    assert row.difference.test == "t over seeds and items"
    assert row.difference.high - row.difference.low > 3 * (row.items.high - row.items.low)
    assert row.over_seeds.pairs == 4
    assert row.over_seeds.wilcoxon == pytest.approx(0.125)
    text = found.markdown()
    assert "sd over seeds" in text and "p Wilcoxon" in text
    assert "Seeds: lora: 4; full: 4." in text
    assert "One seed only" not in text


def test_no_interval_over_seeds_is_of_less_than_no_bytes() -> None:
    runs = seeds_of("lora", 0.0, 10, count=3)
    bytes_ = [Metric("kept_bytes", value, "bytes", phase="train") for value in (1.0, 2.0, 90.0)]
    runs = [replace(r, metrics=[*r.metrics, m]) for r, m in zip(runs, bytes_, strict=True)]
    other = run("full", {"": 0.1}, number=99)
    other = replace(other, metrics=[*other.metrics, bytes_[0]])
    [table] = [t for t in compare([*runs, other]).metrics if t.kind.metric == "kept_bytes"]
    value = table.rows[0].value
    assert value.value == 31 and value.low == 0 and value.high is not None and value.high > 90


def read_out(trained: Record, number: int, seed: int = 0) -> Record:
    """Return an evaluation that goes on from a training, whose seed says nothing."""
    record = run("full", {"": -0.6}, number=number, seed=seed)
    spec = {**record.spec, "stage": "eval", "parent": trained.key}
    return replace(record, stage="eval", parent=trained.key, spec=spec)


def test_a_training_and_the_evaluation_of_another_are_paired_by_the_seeds_of_trainings() -> None:
    trained, others = seeds_of("lora", 0.0, 10), seeds_of("full", -0.6, 20)
    evaluated = [read_out(other, 30 + n) for n, other in enumerate(others)]
    found = compare([*trained, *evaluated], [*trained, *others])
    [_, row] = next(m for m in found.metrics if m.tested).rows
    assert row.over_seeds and row.over_seeds.pairs == 4
    again = [read_out(others[0], 40 + seed, seed) for seed in range(3)]
    [group] = grouped(again, others)
    assert group.made_with == group.seeds == [(0, 0), (1, 0), (2, 0)], "all that they differ in"


def test_methods_that_ran_with_the_same_seeds_are_compared_seed_by_seed() -> None:
    level = np.random.default_rng(0).normal(0, 0.5, (4, 1))
    noise = np.random.default_rng(1).normal(0, 0.05, (2, 4, 40))

    def side(group: int, shift: float, seeds: Sequence[int]) -> Side:
        rows = [level[s] + noise[group, s] + shift for s in seeds]
        made = [list(map(float, row)) for row in rows]
        outcomes = [Outcomes("perplexity", "loss", "", "test", "ids", values) for values in made]
        return Side(group, [(s,) for s in seeds], outcomes, False)

    a = side(0, 0.1, (0, 1, 2, 3))
    assert p_of_difference(a, side(1, 0.0, (3, 2, 0, 1))) < 0.001
    assert p_of_difference(a, side(1, 0.0, (1, 2, 3))) > 0.3


def test_a_difference_that_seeds_explain_is_no_finding() -> None:
    a, b = seeds_of("lora", 0.0, 10), seeds_of("full", -0.05, 20)
    alone = compare([a[0], b[0]]).metrics[0].rows[1]
    together = compare([*a, *b]).metrics[0].rows[1]
    assert alone.finding in ("lower", "higher") and alone.covers == "items"
    assert together.finding == "cannot be told apart"
    assert "One seed only: lora; full." in compare([a[0], b[0]]).markdown()


def test_seeds_of_one_spec_alone_show_their_spread() -> None:
    found = compare(seeds_of("lora", 0.0, 10))
    (table,) = [t for t in found.tables(full=False) if t.title.startswith("loss")]
    assert table.columns == ("run", "seeds", "value", "sd over seeds")
    assert table.rows[0][:2] == ("lora", 4)
    assert found.words == ["lora: 4 seeds of one spec, and nothing to compare with."]


def test_a_seed_that_is_there_twice_begins_another_group() -> None:
    again = run("lora", {"": 0.0}, number=7)
    assert [g.label for g in grouped([LORA, again])] == ["lora, 00000000", "lora, 00070000"]
    (one,) = grouped(list(reversed(seeds_of("lora", 0.0, 10))))
    assert one.seeds == [(0,), (1,), (2,), (3,)]
    three = [*seeds_of("lora", 0.0, 10, 3), run("full", {"": 0.0}, number=9, seed=1)]
    assert [g.label for g in grouped(three)] == ["lora, seed 0–2", "full, seed 1"]


def test_seeds_of_earlier_runs_do_not_count_either() -> None:
    parents = seeds_of("lora", 0.0, 10, 2)
    children = [
        replace(
            run("rtn", {"": 0.1}, number=30 + i),
            parent=p.key,
            spec={**run("rtn", {}, number=30).spec, "parent": p.key},
        )
        for i, p in enumerate(parents)
    ]
    (group,) = grouped(children, parents)
    assert group.seeds == [(0, 0), (0, 1)]
    evaluations = [replace(child, stage="eval") for child in children]
    (group, other) = grouped([*evaluations, run("rtn", {}, number=40)], parents)
    assert (group.label, other.label) == ("rtn, seed 0–1, eval", "rtn, seed 0, train")
    assert len(grouped(children)) == 2


def test_points_of_one_run_are_paired_by_their_seed() -> None:
    level = np.random.default_rng(3).normal(0, 0.5, 4)
    family = [
        run("qdylora", {"r1": 0.1 + v, "r8": 0.0 + v}, number=40 + s, seed=s)
        for s, v in enumerate(level)
    ]
    row = compare(family).metrics[0].rows[1]
    assert row.finding == "lower" and row.covers == "seeds and items"
    assert row.over_seeds and row.over_seeds.wilcoxon == pytest.approx(0.125)


def test_an_untrained_model_needs_no_seeds() -> None:
    base = replace(run("none", {"": 0.8}, number=50), stage="eval")
    row = compare([base, *seeds_of("lora", 0.0, 10)]).metrics[0].rows[1]
    assert row.finding == "lower" and row.covers == "seeds and items"
    turned = compare([*seeds_of("lora", 0.0, 10), base]).metrics[0].rows[1]
    assert turned.difference and row.difference
    assert turned.difference.low == pytest.approx(-row.difference.high)
    assert "One seed only" not in compare([base, *seeds_of("lora", 0.0, 10)]).markdown()


def test_groups_of_items_are_kept_together() -> None:
    def grouped_run(record: Record) -> Record:
        clusters = [i // 6 for i in range(120)]
        return replace(record, outcomes=[replace(o, clusters=clusters) for o in record.outcomes])

    row = compare([grouped_run(LORA), grouped_run(FULL)]).metrics[0].rows[1]
    assert row.difference and row.difference.test == "sign-flip permutation of groups"


# -- margins, letters, words -------------------------------------------------------------------


def test_margins_say_what_is_equivalent() -> None:
    found = compare([LORA, FAMILY, FULL], margins={"loss": 0.02})
    (loss,) = [m for m in found.metrics if m.tested]
    assert [r.at_margin for r in loss.rows] == [
        "",
        "not shown",
        "not shown",
        "equivalent",
        "not worse",
    ]
    text = found.markdown()
    assert "| within 0.02 |" in text
    assert "Equivalent: qdylora r8. Not worse, but not shown to be equivalent: full." in text
    with pytest.raises(UserError, match="no test of 'los'") as caught:
        compare([LORA, FULL], margins={"los": 0.1})
    assert "'loss'" in caught.value.hint


def test_margins_of_several_rows_are_adjusted() -> None:
    twins = [run(name, {"": 0.01}, number=80) for name in ("dora", "vera")]
    for margin in np.arange(0.010, 0.020, 0.0001):
        row = compare([LORA, twins[0]], margins={"": margin}).metrics[0].rows[1]
        assert row.difference and row.difference.equivalence
        if row.difference.equivalence.p < 0.045:
            break
    assert row.at_margin == "equivalent"
    both = compare([LORA, *twins], margins={"": margin}).metrics[0].rows[1:]
    assert [r.at_margin for r in both] == ["not shown", "not shown"]


def test_margins_are_numbers_above_zero() -> None:
    assert margins_of(["0.01", "loss=0.02"]) == {"": 0.01, "loss": 0.02}
    for word in ("loss", "loss=0", "loss=-1", "loss=nan", "=inf"):
        with pytest.raises(UserError, match="no number above zero"):
            margins_of([word])


def test_letters_cover_all_pairs() -> None:
    rows = compare([LORA, FAMILY, FULL]).metrics[0].rows
    marks = {row.name: row.letters for row in rows}
    assert marks == {
        "full": "a",
        "lora": "b",
        "qdylora r8": "b",
        "qdylora r2": "c",
        "qdylora r1": "d",
    }
    assert [row.letters for row in compare([LORA, FULL]).metrics[0].rows] == ["", ""]


def test_the_words_say_what_was_and_was_not_equal() -> None:
    longer = run("full", {"": 0.0}, number=6, tokens=2000)
    words = compare([LORA, longer]).words
    assert words[0].startswith(
        "loss on test (nats/token), against lora. Cannot be told apart: full"
    )
    assert "Equal: base model, dataset, optimiser steps, tuning trials, seeds." in words
    assert "Not equal: training tokens (1,000 against 2,000)." in words
    assert "Not recorded for all: layer forwards, trainable parameters." in words
    other = compare([LORA, run("dora", {"": 0.3}, number=4, ids="bb")]).words
    assert "Not the same items: no paired test: dora." in other[0]


def with_part(record: Record, part: str, **values: object) -> Record:
    """Return a record with other values in a part of its spec."""
    held = record.spec.get(part) or {}
    return replace(record, spec={**record.spec, part: {**held, **values}})


@pytest.mark.parametrize(
    "part, one, other, equal",
    [
        ("model", {"fingerprint": "a" * 32}, {"fingerprint": "b" * 32}, False),
        ("model", {"fingerprint": "a" * 32}, {"fingerprint": "a" * 32, "path": "b"}, True),
        ("model", {"fingerprint": "a" * 32}, {"fingerprint": "a" * 32, "name": "b"}, True),
        (
            "model",
            {"source": "hub", "revision": "main"},
            {"source": "hub", "revision": "v2"},
            False,
        ),
        ("model", {"source": "random"}, {"source": "random", "weights_seed": 1}, False),
        ("model", {"source": "hub"}, {"source": "hub", "shape": {"num_layers": 3}}, True),
        ("dataset", {"fingerprint": "a" * 32}, {"fingerprint": "b" * 32}, False),
        ("dataset", {"files": {"all": "a"}}, {"files": {"all": "b"}}, True),
        ("dataset", {"prompt": "{a}"}, {"prompt": "{b}"}, False),
        ("dataset", {"limit": {"test": 4}}, {"limit": {"test": 9}}, True),
        ("dataset", {"limit": {"train": 4}}, {"limit": {"train": 9}}, False),
    ],
)
def test_what_is_compared_is_the_content_and_not_its_name(
    part: str, one: dict[str, object], other: dict[str, object], equal: bool
) -> None:
    name = "base model" if part == "model" else part
    rows = [with_part(LORA, part, **one), with_part(FULL, part, **other)]
    [budget] = [b for b in compare(rows).budgets if b.name == name]
    assert budget.equal is equal
    assert len(set(budget.values)) == (1 if equal else 2), "a difference can be seen"


NAMES = {"name", "id", "path", "revision"}
"""Fields of a model that say nothing where the hash of its content is known."""


@pytest.mark.parametrize("name", [f.name for f in fields(ModelSpec)])
def test_every_field_of_a_model_but_its_names_is_compared(name: str) -> None:
    model = ModelSpec("a", "random", fingerprint="a" * 32, config={"num_hidden_layers": 2})
    values = plain(model)
    held = values[name]
    other = {"num_hidden_layers": 4} if isinstance(held, dict) else [held]
    rows = [with_part(LORA, "model", **values), with_part(FULL, "model", **{**values, name: other})]
    [budget] = [b for b in compare(rows).budgets if b.name == "base model"]
    assert budget.equal is (name in NAMES)


def test_seeds_on_copies_of_a_folder_are_one_group() -> None:
    whole, rows = {"fingerprint": "a" * 32}, []
    for seed in (0, 1):
        record = run("lora", {"": 0.0}, number=80 + seed, seed=seed)
        record = with_part(record, "model", **whole, path=f"/there/{seed}")
        rows.append(with_part(record, "dataset", **whole, files={"all": f"/there/{seed}.csv"}))
    assert len(compare(rows).labels) == 1
    assert Tried(rows).of(rows[0]) == 1
    other = with_part(rows[1], "dataset", files={"all": "/there/1.jsonl"})
    assert len(compare([rows[0], other]).labels) == 2


def test_tuning_trials_are_settings_that_were_tried_at_the_same_budget() -> None:
    tried = [run("lora", {}, number=60 + r, settings={"rank": r}) for r in (2, 4, 8)]
    tried += [run("lora", {}, number=70, settings={"rank": 8}, seed=1)]
    longer = run("lora", {}, number=71, settings={"rank": 16})
    longer.spec["train"] = {"max_steps": 120}
    other = run("full", {}, number=72)
    assert Tried([*tried, longer, other]).of(tried[0]) == 3
    assert Tried([*tried, longer, other]).of(other) == 1
    (trials,) = [b for b in compare([tried[0], other], tried).budgets if b.name == "tuning trials"]
    assert trials.values == [3, 1] and trials.equal is False


def test_tuning_trials_are_those_of_the_grids_that_were_declared_to_tune(tmp_path) -> None:
    tried = [run("lora", {}, number=60 + r, settings={"rank": r}) for r in (2, 4, 8, 16)]
    ablation, seed = tried[-1], run("lora", {}, number=90, settings={"rank": 4}, seed=1)
    for name, records in (("tuning", tried[:3]), ("ablation", tried[3:])):
        for number, record in enumerate(records):
            place = tmp_path / "sweeps" / name / str(number)
            place.mkdir(parents=True)
            (place / OUTCOME).write_text(json.dumps({"key": record.key}))
    declare_tuning(tmp_path / "sweeps" / "tuning", {"metric": "loss@validation"})
    (tmp_path / "sweeps" / "tuning" / "2" / OUTCOME).write_text("{")
    declared = tunings(tmp_path)
    assert declared == [{tried[0].key, tried[1].key}]
    assert Tried(tried, declared).of(tried[0]) == 2
    assert Tried([*tried, seed], declared).of(seed) == 2
    assert Tried(tried, declared).of(ablation) == 4, "of no declared grid: all at its budget"
    found = compare([tried[0], ablation], tried, tunings=declared).budgets
    assert [b.values for b in found if b.name == "tuning trials"] == [[2, 4]]


def test_few_items_of_a_ratio_are_said_in_the_table() -> None:
    rows = [run(name, {"": 0.0}, number=95 + i) for i, name in enumerate(("lora", "full"))]
    said = "items: where they differ much in length"
    assert said not in compare(rows).markdown()
    few = [
        replace(r, outcomes=[replace(o, values=o.values[:12])]) for r in rows for o in r.outcomes
    ]
    assert f"12 {said}" in compare(few).markdown()


def test_forms_agree_on_seeds_and_margins() -> None:
    found = compare([*seeds_of("lora", 0.0, 10), *seeds_of("full", -0.6, 20)], margins={"": 0.01})
    (line,) = [r for r in csv.DictReader(io.StringIO(found.csv())) if r["difference"]]
    row = json.loads(found.json())["metrics"][0]["rows"][1]
    assert float(line["difference"]) == row["difference"]["value"]
    assert float(line["p_wilcoxon"]) == row["over_seeds"]["wilcoxon"]
    assert float(line["p_equivalence"]) == row["difference"]["equivalence"]["p"]
    assert line["at_margin"] == row["at_margin"] == "not worse"
    assert float(line["margin"]) == 0.01 and int(line["seeds"]) == row["seeds"] == 4
    assert json.loads(found.json())["words"] == found.words
    assert all(word in found.markdown() for word in found.words)


SIX = [(method, shift) for method, shift in (("full", 0.0), ("lora", 0.1)) for _ in range(3)]


def test_a_difference_is_the_same_without_the_tests_that_cover_less() -> None:
    runs = [run(m, {"": s}, number=n, seed=n % 3) for n, (m, s) in enumerate(SIX)]
    whole, short = (compare(runs, alone=alone).metrics[0].rows[1] for alone in (True, False))
    assert whole.items and whole.over_seeds and whole.covers == "seeds and items"
    assert short == replace(whole, items=None, over_seeds=None)


def test_arms_that_differ_at_the_end_of_their_names_are_told_apart_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    names = [f"{'q_proj,k_proj,v_proj,o_proj,gate_proj,' * 3}{end}" for end in ("one", "two")]
    made = ({"targets": name.split(",")} for name in names)
    arms = [run("lora", {"": 2.0 + n}, number=n, settings=m) for n, m in enumerate(made)]
    found = compare(arms, alone=True)
    monkeypatch.setenv("COLUMNS", "80")
    print_comparison(found, full=True)
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "…" not in out and max(map(len, out.splitlines())) <= 80
    ends = [re.sub(r"\s", "", out).count(end) for end in ("one]", "two]")]
    assert min(ends) > 5


def test_a_table_that_would_lose_letters_stands_in_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    columns = ("metric", "tier", "run", "against", "difference", "allowed", "finding")
    interval = "-0.0341 [-0.0385, -0.0297]"
    row = ("loss on test", "must", 5.429, 5.463, interval, "+0.05463", "kept")
    table = Table("a gate", columns, [row], ("Adjusted after Holm.",))
    for width, parts in ((100, 1), (60, 3)):
        monkeypatch.setenv("COLUMNS", str(width))
        print_table(table, named=2)
        out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        assert all(text in out for text in ("loss on test", "5.463", interval, "+0.05463", "kept"))
        assert out.count("must") == parts and out.count("Adjusted after Holm.") == 1
        assert max(map(len, out.splitlines())) <= width
