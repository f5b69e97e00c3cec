"""Each operating point against the first run's at the same point."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import run, text_of

from effbench.cli.tables import campaign_named
from effbench.report.campaign_file import campaign_in
from effbench.report.campaign_written import write_tables
from effbench.report.comparison.compare import compare
from effbench.report.comparison.entries import NO_POINT
from effbench.report.comparison.metric_table import MetricTable, Row
from effbench.report.comparison.result import Comparison
from effbench.report.plots.curves import comparison_plot
from effbench.results.lookup import find
from effbench.results.records import Metric, Record, write
from effbench.stats import holm
from effbench.util.errors import UserError

AGAINST = "against the first run (lora) at the same point"


def family(method: str, shifts: dict[str, float], number: int, seed: int = 0) -> Record:
    """Return a record with a loss at each point, and a count that is the number in its name."""
    made = run(method, shifts, number=number, seed=seed)
    counts = [
        Metric("params", (number + 1) * float(point[1:] or 0), "", point, obtained="counted")
        for point in shifts
        if point
    ]
    return replace(made, metrics=[*made.metrics, *counts])


FIRST = family("lora", {"r1": 0.5, "r2": 0.2, "r8": 0.0}, 0)
SECOND = family("dylora", {"r1": 0.3, "r2": 0.2033, "r8": 0.1}, 1)
OTHER = family("full", {"r2": 0.201, "r4": 0.1}, 2)
PLAIN = run("none", {"": 0.9}, number=3)


def seeds(method: str, shifts: dict[str, float], first: int, count: int = 4) -> list[Record]:
    level = np.random.default_rng(first).normal(0, 0.05, (count, len(shifts)))
    made = []
    for seed, own in enumerate(level):
        shifted = {p: v + d for (p, v), d in zip(shifts.items(), own, strict=True)}
        made.append(family(method, shifted, first + seed, seed))
    return made


def only(record: Record, point: str) -> Record:
    """Return a record with what it has at one point alone."""
    return replace(
        record,
        metrics=[m for m in record.metrics if m.point in ("", point)],
        outcomes=[o for o in record.outcomes if o.point == point],
    )


def table(found: Comparison, metric: str = "loss") -> MetricTable:
    (own,) = [m for m in found.metrics if m.kind.metric == metric]
    return own


def same(records: Sequence[Record], **options: Any) -> dict[str, Row]:
    rows = table(compare(records, same_points=True, **options)).rows
    return {row.name: row for row in rows}


# -- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["r1", "r2", "r8"])
def test_a_difference_is_that_of_the_two_points_alone(point: str) -> None:
    row = same([FIRST, SECOND])[f"dylora {point}"]
    alone = table(compare([only(FIRST, point), only(SECOND, point)])).rows[1]
    assert row.difference is not None and row.difference == alone.difference
    assert (row.ratio, row.covers) == (alone.ratio, "items")
    assert row.ratio == row.value.value / same([FIRST, SECOND])[f"lora {point}"].value.value


@pytest.mark.parametrize("point", ["r1", "r8"])
def test_with_seeds_it_is_that_of_the_two_groups_alone(point: str) -> None:
    a = seeds("lora", {"r1": 0.5, "r8": 0.0}, 10)
    b = seeds("dylora", {"r1": 0.1, "r8": 0.3}, 20)
    rows = same([*a, *b])
    row = rows[f"dylora {point}"]
    alone = table(compare([only(r, point) for r in (*a, *b)])).rows[1]
    assert row.difference == alone.difference and row.items == alone.items
    assert row.over_seeds is not None and row.over_seeds == alone.over_seeds
    assert row.covers == "seeds and items" and row.ratio == alone.ratio
    assert (row.finding, row.seeds) == ("lower" if point == "r1" else "higher", 4)
    assert rows[f"lora {point}"].difference is None


def test_the_first_runs_rows_are_held_against_none() -> None:
    rows = same([FIRST, SECOND])
    for point in ("r1", "r2", "r8"):
        row = rows[f"lora {point}"]
        assert (row.difference, row.p_adjusted, row.finding, row.verdict) == (None, None, "", "")
        assert row.ratio == 1


def test_holm_is_for_the_rows_that_are_tested() -> None:
    """Four of them: three points of the second run and one of the third, whose other is missing."""
    rows = list(same([FIRST, SECOND, OTHER]).values())
    tested = [row for row in rows if row.difference]
    assert [row.name for row in tested] == ["dylora r1", "dylora r2", "dylora r8", "full r2"]
    raw = [row.difference.p for row in tested if row.difference]
    assert [row.p_adjusted for row in tested] == holm(raw)
    smallest = min(range(4), key=raw.__getitem__)
    assert tested[smallest].p_adjusted == 4 * raw[smallest] > 0
    told = [row.finding for row in tested]
    assert told == ["lower", "cannot be told apart", "higher", "cannot be told apart"]
    assert raw[1] < 0.05  # so that it is the correction that says so


def test_a_margin_is_at_the_same_point() -> None:
    found = compare([FIRST, SECOND], margins={"loss": 0.05}, same_points=True)
    assert [r.at_margin for r in table(found).rows[3:]] == ["not worse", "equivalent", "not shown"]
    assert "Equivalent: dylora r2." in found.markdown()


def test_other_items_at_the_same_point_get_no_test() -> None:
    found = same([FIRST, run("dylora", {"r1": 0.3}, number=4, ids="bb")])
    assert found["dylora r1"].finding == "not the same items: no paired test"
    assert found["dylora r1"].difference is None and found["dylora r1"].ratio


# -- points that are missing -------------------------------------------------------------------


def test_a_point_that_the_first_run_lacks_says_so() -> None:
    found = compare([FIRST, SECOND, OTHER, PLAIN], same_points=True)
    rows = {row.name: row for row in table(found).rows}
    for name in ("full r4", "none"):
        row = rows[name]
        assert (row.finding, row.verdict) == (NO_POINT, NO_POINT)
        assert (row.difference, row.p_adjusted, row.ratio) == (None, None, None)
    assert "The first run has no value at this point: full r4; none." in found.words[0]
    # A number without a test has no ratio either.
    params = {row.name: row.ratio for row in table(found, "params").rows}
    assert params == {
        **{f"lora {p}": 1 for p in ("r1", "r2", "r8")},
        **{f"dylora {p}": 2 for p in ("r1", "r2", "r8")},
        "full r2": 3,
        "full r4": None,
    }
    assert not table(found, "params").tested


def test_a_metric_that_only_the_first_run_has_shows_its_points() -> None:
    bare = replace(SECOND, metrics=[m for m in SECOND.metrics if m.name != "params"])
    found = compare([FIRST, bare], same_points=True)
    assert [row.ratio for row in table(found, "params").rows] == [1, 1, 1]
    assert "dylora has no params." in found.notes


@pytest.mark.parametrize(
    ("records", "points"),
    [
        ([FIRST, family("full", {"r4": 0}, 2)], "lora has r1, r2, r8; full has r4."),
        ([FIRST, PLAIN], "lora has r1, r2, r8; none has none."),
        ([PLAIN, FIRST], "none has none; lora has r1, r2, r8."),
    ],
)
def test_no_point_in_common_is_refused(records: list[Record], points: str) -> None:
    with pytest.raises(UserError, match="No run has an operating point of the first") as caught:
        compare(records, same_points=True)
    assert points in caught.value.message
    assert "without --same-points" in caught.value.hint


def test_one_run_has_nothing_to_be_held_against() -> None:
    for records in ([FIRST], seeds("lora", {"r1": 0, "r8": 0}, 10)):
        with pytest.raises(UserError, match="no second run to hold against lora"):
            compare(records, same_points=True)


def test_runs_without_points_are_compared_as_ever() -> None:
    plain = table(compare([PLAIN, run("full", {"": 0}, number=5)])).rows
    assert list(same([PLAIN, run("full", {"": 0}, number=5)]).values()) == plain


# -- forms -------------------------------------------------------------------------------------


def test_every_form_says_what_it_is_held_against() -> None:
    found = compare([FIRST, SECOND, OTHER], same_points=True)
    verdicts = [row.verdict for row in table(found).rows]
    assert verdicts[3].startswith("dylora r1 is lower than lora r1 by 0.198 [")
    assert verdicts[5].startswith("dylora r8 is higher than lora r8 by 0.")
    begins = f"loss on test (nats/token), {AGAINST}. Lower: dylora r1, by -0.198 ["
    assert found.words[0].startswith(begins)
    for shown in (text_of(found.rich()), text_of(found.rich(full=True)), found.markdown()):
        text = " ".join(shown.split())
        assert f"Difference: {AGAINST}, mean over items" in text
        assert f"×: {AGAINST}." in text
        assert "against lora r1" not in text
    assert "| dylora r8 | 16 (2.00×) |" in found.markdown()
    assert "| full r4 | 12 |" in found.markdown()
    usual = compare([FIRST, SECOND, OTHER]).markdown()
    assert "against lora r1, mean over items" in usual and "×:" not in usual


@pytest.mark.parametrize("same_points", [True, False])
def test_csv_and_json_name_the_reference_of_each_row(same_points: bool) -> None:
    found = compare([FIRST, SECOND, OTHER], same_points=same_points)
    lines = [r for r in csv.DictReader(io.StringIO(found.csv())) if r["metric"] == "loss"]
    (loss,) = [m for m in json.loads(found.json())["metrics"] if m["metric"] == "loss"]
    assert loss["same_points"] is same_points
    against = ["", "", "", "lora r1", "lora r2", "lora r8", "lora r2", ""]
    against = against if same_points else ["", *["lora r1"] * 7]
    assert [r["against"] for r in lines] == [r["against"] for r in loss["rows"]] == against
    values = {f"{r['run']} {r['point']}": float(r["value"]) for r in lines}
    for line, row in zip(lines, loss["rows"], strict=True):
        if not row["difference"]:
            assert line["difference"] == "" and line["p_adjusted"] == ""
            continue
        expected = float(line["value"]) - values[line["against"]]
        assert float(line["difference"]) == pytest.approx(expected)
        assert row["difference"]["value"] == pytest.approx(expected)
        assert row["ratio"] == float(line["value"]) / values[line["against"]]
        assert f"{line['against']}" in line["verdict"] and line["verdict"] == row["verdict"]
    assert (lines[-1]["finding"] == loss["rows"][-1]["finding"] == NO_POINT) is same_points


def test_letters_are_for_the_other_form() -> None:
    assert all(row.letters for row in table(compare([FIRST, SECOND])).rows)
    found = compare([FIRST, SECOND], same_points=True)
    assert not any(row.letters for row in table(found).rows)
    assert "etters" not in found.markdown()


def test_the_plot_is_of_values_and_so_the_same(tmp_path: Path) -> None:
    paths = [
        comparison_plot(found, "loss", tmp_path / f"{number}.png")
        for number, found in enumerate(
            compare([FIRST, SECOND, OTHER], same_points=how) for how in (False, True)
        )
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_names_that_are_given_are_used_everywhere() -> None:
    names = {FIRST.key: "A", SECOND.key: "B"}
    bare = replace(SECOND, metrics=[m for m in SECOND.metrics if m.name != "params"])
    found = compare([FIRST, bare], names=names, same_points=True)
    assert found.labels == ["A", "B"] and "B has no params." in found.notes
    assert table(found).rows[3].verdict.startswith("B r1 is lower than A r1 by")
    assert "(A) at the same point. Lower: B r1" in found.words[0]


# -- commands ----------------------------------------------------------------------------------


def test_the_command(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    for record in (FIRST, SECOND, PLAIN):
        write(record, tmp_path / "results" / "records")
    keys = ["0000", "0001"]
    status, out, _ = cli("compare", *keys, "--same-points", "--format", "json")
    assert status == 0
    stored = [find(tmp_path / "results" / "records", key) for key in keys]
    assert json.loads(out) == json.loads(compare(stored, same_points=True).json())
    status, out, _ = cli("compare", *keys, "--same-points")
    assert status == 0 and AGAINST in out
    assert AGAINST not in cli("compare", *keys)[1]
    status, _, said = cli("compare", "0000", "0003", "--same-points")
    assert status == 2 and "lora has r1, r2, r8; none has none" in said
    status, _, said = cli("compare", *keys, "--same-points", "--select", "loss@validation")
    assert status == 2 and "Leave one of the two out" in said


@pytest.fixture
def campaign(tmp_path: Path) -> Callable[[str], Any]:
    """Return a function that makes the tables of a campaign with a line of its own in its file."""
    for record in (FIRST, SECOND):
        write(record, tmp_path / "records")
    (tmp_path / "campaigns").mkdir()
    keys = {"The one": [FIRST.key], "The other": [SECOND.key]}
    (tmp_path / "campaigns" / "ab.json").write_text(json.dumps(keys))

    def tables(line: str) -> Any:
        arms = "arms:\n  The one:\n    - train\n  The other:\n    - train\n"
        (tmp_path / "ab.yaml").write_text(f"# One against another\nseeds: [0]\n{line}\n{arms}")
        write_tables(campaign_in(tmp_path / "ab.yaml"), tmp_path)
        return {path.name for path in (tmp_path / "tables").iterdir()}

    return tables


def test_a_campaign_has_a_second_table_where_it_asks(campaign: Any, tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    assert campaign("") == {"ab.md", "ab.csv", "ab_loss.png"}
    first = {name: (folder / name).read_text() for name in ("ab.md", "ab.csv")}
    made = campaign("points: same")
    assert made == {"ab.md", "ab.csv", "ab_loss.png", "ab_points.md", "ab_points.csv"}
    assert {name: (folder / name).read_text() for name in first} == first
    assert "against The one r1, mean over items" in first["ab.md"]
    text = (folder / "ab_points.md").read_text()
    assert "each arm against The one at the same operating point" in text
    assert "against the first run (The one) at the same point, mean over items" in text
    lines = list(csv.DictReader(io.StringIO((folder / "ab_points.csv").read_text())))
    assert {r["against"] for r in lines if r["point"] == "r8"} == {"", "The one r8"}
    with pytest.raises(UserError, match=r"ab\.yaml\.points"):
        campaign("points: equal")


def test_the_campaign_of_depths_asks_for_both_tables() -> None:
    assert campaign_named("sorted_lora").points and not campaign_named("apt").points
