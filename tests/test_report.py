"""Tables, comparisons and plots of records made up for the purpose."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from effbench.errors import UserError
from effbench.records import SCHEMA, Metric, Outcomes, Record
from effbench.report.compare import compare
from effbench.report.labels import differences, labels
from effbench.report.plot import _axis, _running_mean, loss_plot, points_plot
from effbench.report.table import Table, Value, comparison, headline, readable, runs_table
from effbench.stats import mean_interval

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
    again = labels([LORA, run("lora", {"": 0}, number=7)])
    assert again == ["lora, 00000000", "lora, 00070000"]


def test_differences_are_dotted_and_absent_is_not_null() -> None:
    found = differences([LORA, FAMILY])
    assert found == {
        "method.name": ["lora", "qdylora"],
        "method.settings.rank": ["—", 8],
    }


# -- tables ------------------------------------------------------------------------------------


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
    text = text_of(runs_table([LORA, FAMILY]).rich(), width=200)
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


def test_counted_and_modelled_numbers_are_not_compared() -> None:
    found = compare([LORA, run("other", {"": 0.1}, number=3, obtained="modelled")])
    assert "weight_bytes" not in [m.kind.metric for m in found.metrics]
    assert "weight_bytes is counted in lora but modelled in other: not compared." in found.notes


def test_what_is_missing_is_said() -> None:
    found = compare([LORA, FULL, run("bare", {}, number=5)])
    assert "bare has no loss on test." in found.notes
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
def test_points_plot_of_a_family_and_levels(suffix: str, tmp_path: Path) -> None:
    path = points_plot([LORA, FAMILY, FULL], "loss", tmp_path / f"loss.{suffix}")
    assert path.stat().st_size > 2000
    if suffix == "svg":
        assert "qdylora" in path.read_text() or "<path" in path.read_text()


def test_the_axis_of_points_is_numeric_where_the_names_are() -> None:
    assert _axis(["r1", "r2", "r8"])[::2] == ({"r1": 1.0, "r2": 2.0, "r8": 8.0}, True)
    assert _axis(["4bit", "3bit"])[::2] == ({"4bit": 4.0, "3bit": 3.0}, False)
    assert _axis(["small", "large"])[::2] == ({"small": 0.0, "large": 1.0}, False)
    assert _axis(["r1", "d2"])[0] == {"r1": 0.0, "d2": 1.0}


def test_plots_need_something_to_show(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No run has") as caught:
        points_plot([LORA], "los", tmp_path / "x.png")
    assert "'loss'" in caught.value.hint
    with pytest.raises(UserError, match="no losses"):
        loss_plot([], tmp_path / "x.png")
    with pytest.raises(UserError, match="kind of picture"):
        points_plot([LORA], "loss", tmp_path / "x.docx")


def test_loss_plot_of_training_and_validation(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = [
        {"event": "step", "step": s, "loss": 3 / s + 2} for s in range(1, 90)
    ]
    events += [{"event": "validation", "step": s, "loss": 2.5} for s in (30, 60)]
    events += [{"event": "phase", "name": "load"}]
    assert loss_plot(events, tmp_path / "loss.png").stat().st_size > 2000


def test_the_running_mean_is_centred() -> None:
    assert _running_mean([1.0, 2.0, 3.0, 4.0, 50.0], 1) == [1.0, 2.0, 3.0, 19.0, 50.0]
    assert _running_mean([1.0, 2.0], 0) == [1.0, 2.0]
