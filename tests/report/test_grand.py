"""The grand table: rows of all tables, held against each other only where they can be."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_report import run
from typer.testing import CliRunner

from effbench.cli.main import app
from effbench.cli.tables import campaigns
from effbench.report.campaign import Campaign
from effbench.report.campaign_file import campaign_in
from effbench.report.claims import Claim
from effbench.report.grand import Grand, gathered
from effbench.report.grand_table import END, MARK, in_readme, pareto, rendered, short
from effbench.report.plots.canvas import SIZES
from effbench.report.plots.pareto import Place, front
from effbench.report.table import Value
from effbench.results import reader
from effbench.results.records import Metric, Record, read, write
from effbench.util.errors import UserError

ROOT = Path(__file__).parents[2]
TEXT = """# Is {0} better?
seeds: [0]
paper: [{{claim: It is, source: Table 1, sure: read, scale: 7B}}]
verdict:
  state: direction
  reason: It is.
  rests_on: [{{row: {0}, against: Base, finding: lower}}]
arms:
  Base: [train method=lora]
  {0}: [train method=full]
  Neither: [train method=dora]
"""


def untouched(number: int) -> Record:
    """Return the record of a model evaluated as it is."""
    record = run("none", {"": 0.5}, number=number)
    return replace(record, stage="eval", spec={**record.spec, "stage": "eval"})


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Campaign]:
    """Return a function that writes a table of three arms and their records."""
    (tmp_path / "campaigns").mkdir()

    def make(name: str, number: int, base: Record | None = None, **options: Any) -> Campaign:
        runs = [
            base or run("lora", {"": 0.3}, number=number, **options),
            run("full", {"": 0.1}, number=number + 1, **options),
            run("dora", {"": 0.0}, number=number + 2, **options),
        ]
        for record in runs:
            write(record, tmp_path / "records")
        keys = dict(zip(("Base", name, "Neither"), ([r.key] for r in runs), strict=True))
        (tmp_path / "campaigns" / f"{name}.json").write_text(json.dumps(keys))
        path = tmp_path / f"{name}.yaml"
        path.write_text(TEXT.format(name))
        return campaign_in(path)

    return make


@pytest.fixture
def gather(tmp_path: Path) -> Callable[..., Grand]:
    """Return a function that gathers tables."""
    path = tmp_path / "all.yaml"
    path.write_text("# What is better?\ngathers: {model: tiny}\n")
    return lambda *tables: gathered(path, tmp_path, tables)


def names(grand: Grand) -> list[list[str]]:
    return [[row.name for row in group.rows] for group in grand.groups]


def test_rows_are_those_that_verdicts_rest_on(table: Any, gather: Any) -> None:
    """The third arm is better than both, and is not shown for that."""
    grand = gather(table("A", 1))
    assert names(grand) == [["Base", "A"]]
    [system] = grand.systems
    assert (system.state, system.ours) == ("direction", "offline")


def test_only_rows_on_the_same_items_are_held_against_each_other(table: Any, gather: Any) -> None:
    grand = gather(table("A", 1), table("B", 4), table("C", 7, ids="bb"))
    assert names(grand) == [["Base", "A", "Base", "B"], ["Base", "C"]]
    for group in grand.groups:
        assert all(row.difference is not None for row in group.rows[1:])
    assert len({group.ground.ids for group in grand.groups}) == 2


def test_other_lengths_and_dtypes_are_groups_of_their_own(
    table: Any, gather: Any, tmp_path: Path
) -> None:
    tables = [table("A", 1), table("B", 4), table("C", 7)]
    for number, part in ((4, ("dataset", "max_length", 8)), (7, ("hardware", "dtype", "float16"))):
        for more, method in enumerate(("lora", "full", "dora")):
            record = run(method, {"": 0.3 - 0.2 * more}, number=number + more)
            own = {**record.spec.get(part[0], {}), part[1]: part[2]}
            write(replace(record, spec={**record.spec, part[0]: own}), tmp_path / "records")
    assert sorted(names(gather(*tables))) == [["Base", "A"], ["Base", "B"], ["Base", "C"]]


def test_the_untouched_model_is_what_others_are_held_against(table: Any, gather: Any) -> None:
    """It stands once, though two tables have it."""
    bare = untouched(20)
    grand = gather(table("A", 1), table("B", 4, bare), table("C", 7, bare))
    assert names(grand) == [["Base", "Base", "A", "B", "C"]]
    assert grand.groups[0].rows[0].value.value == pytest.approx(bare.metrics[0].value)


def test_each_record_is_read_once(table: Any, gather: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The untouched model is in all tables, and no verdict rests on the third arm of any."""
    bare = untouched(20)
    tables = [table("A", 1), table("B", 4, bare), table("C", 7, bare)]
    gather(*tables)  # the index of records reads all of them
    seen: list[str] = []

    def counted(path: Path, outcomes: bool = True) -> Record:
        seen.append(path.stem)
        return read(path, outcomes)

    monkeypatch.setattr(reader, "read", counted)
    found = gather(*tables)
    assert sorted(seen) == sorted(run("", {}, number=n).key for n in (1, 2, 5, 8, 20))
    assert sum(len(group.rows) for group in found.groups) == 5


def test_a_verdict_on_what_is_counted_has_no_rows(table: Any, gather: Any) -> None:
    campaign = table("A", 1)
    pair = replace(campaign.verdict.rests_on[0], metric="weight_bytes", finding="equal")
    grand = gather(replace(campaign, verdict=replace(campaign.verdict, rests_on=[pair])))
    assert grand.groups == [] and grand.systems[0].state == "direction"


def test_versions_that_made_the_rows_are_named(table: Any, gather: Any, tmp_path: Path) -> None:
    tables = [table("A", 1), table("B", 4)]
    record = run("full", {"": 0.1}, number=5)
    newer = {**record.spec, "versions": {"train": 2}}
    write(replace(record, spec=newer), tmp_path / "records")
    said = "Rows come from different versions of train: 1 (A: Base, A: A, B: Base); 2 (B: B)."
    grand = gather(*tables)
    assert grand.groups[0].versions == [said]
    assert said in rendered(grand, "markdown")


def test_other_models_are_left_out(table: Any, gather: Any, tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text("# What?\ngathers: {model: llama2-7b}\n")
    grand = gather(table("A", 1))
    assert not grand.groups and [s.campaign.name for s in grand.systems] == ["A"]


@pytest.mark.parametrize(
    ("dtype", "cells", "row"), [("float16", 1, None), (None, 1, 41.5), (None, 2, None)]
)
def test_a_speed_may_be_that_of_another_run_of_the_artefact(
    table: Any, gather: Any, tmp_path: Path, dtype: str | None, cells: int, row: float | None
) -> None:
    """On the same hardware and in one cell alone; else it is said how the row gets one."""
    tables = table("A", 1)
    [own, *_] = tables.records(tmp_path)["A"]
    hardware = {"dtype": dtype} if dtype else own.spec.get("hardware")
    speed = Metric("decode_tokens_per_second", 41.5, "tokens/s", phase="decode")
    timed = replace(run("full", {}, number=9), stage="eval", parent=own.key)
    timed = replace(
        timed, metrics=[replace(speed, value=41.5 + n, task=f"b{n}") for n in range(cells)]
    )
    write(replace(timed, spec={**own.spec, "hardware": hardware}), tmp_path / "records")
    grand = gather(tables)
    [base, other] = grand.groups[0].rows
    assert base.tokens_per_second is None
    assert (other.tokens_per_second and other.tokens_per_second.value) == row
    said = rendered(grand, "markdown")
    assert ("1 of 2 rows have no tokens/s" if row else "No row has tokens/s") in said
    assert "evaluator=speed" in said and "| tokens/s |" in said
    assert max(map(len, rendered(grand).splitlines())) <= 80


def test_a_speed_beside_the_dense_model_is_a_ratio(table: Any, gather: Any, tmp_path: Path) -> None:
    """The tokens a second beside it may be those of a shared machine."""
    tables = table("A", 1)
    [own, *_] = tables.records(tmp_path)["A"]
    plugin = {"name": "speed", "settings": {"baseline": "dense"}}
    metrics = [
        Metric("decode_tokens_per_second", 41.5, "tokens/s", phase="decode"),
        Metric("decode_speedup", 0.816, "", phase="decode", low=0.79, high=0.84),
    ]
    timed = replace(run("full", {}, number=9), stage="eval", parent=own.key, metrics=metrics)
    write(replace(timed, spec={**own.spec, "evaluators": [plugin]}), tmp_path / "records")
    grand = gather(tables)
    row = grand.groups[0].rows[1]
    assert row.tokens_per_second is None and row.speedup == Value(0.816, "", 0.79, 0.84)
    said = rendered(grand)
    assert "× dense" in said and "0.82" in said and "41.5" not in said and "tok/s" not in said
    assert max(map(len, said.splitlines())) <= 80
    assert "0.816" in rendered(grand, "csv") and r"$\times$ dense" in rendered(grand, "latex")


def test_what_has_not_run_says_so(table: Any, gather: Any, tmp_path: Path) -> None:
    campaign = table("A", 1)
    waiting = replace(campaign, name="B", verdict=replace(campaign.verdict, state="not run yet"))
    grand = gather(campaign, waiting)
    assert "Not run yet: effbench table B --run" in rendered(grand)
    rows = list(csv.DictReader(io.StringIO(rendered(grand, "csv"))))
    assert [row["table"] for row in rows] == ["A", "A", "B"]
    assert (rows[2]["value"], rows[2]["verdict"]) == ("", "not run yet")


def test_a_verdict_is_not_said_where_its_records_are_not(
    table: Any, gather: Any, tmp_path: Path
) -> None:
    long = Claim("It is so.", "Table 1", "read", scale="a model of many billion parameters " * 3)
    campaign = replace(table("A", 1), paper=[long])
    (tmp_path / "campaigns" / "A.json").unlink()
    grand = gather(campaign)
    said = rendered(grand)
    assert "no records here" in said and "direction" not in said and "at most 0" not in said
    assert "No records here: A. Make them: effbench table NAME --run" in said
    assert "…" in said and long.scale.strip() in rendered(grand, "latex"), (
        "cut for a terminal alone"
    )
    with pytest.raises(UserError, match="No rows of its tables are here"):
        pareto(grand, tmp_path / "a.png")


def test_stale_verdicts_are_named(table: Any, gather: Any, tmp_path: Path) -> None:
    campaign = table("A", 1)
    write(run("full", {"": 0.9}, number=2), tmp_path / "records")
    said = rendered(gather(campaign))
    assert "STALE: direction" in said and "Stale: A." in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gathers: {modl: tiny}", "Unknown key 'all.yaml.gathers.modl'"),
        ("gathers: {}", "gathers.model is missing.\nWrite it into all.yaml: gathers.model"),
        ("gathers: {model: tiny}\narms: {}", "Unknown key 'arms'"),
    ],
)
def test_mistakes_in_the_file_are_named(gather: Any, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "all.yaml").write_text(f"# What?\n{text}\n")
    with pytest.raises(UserError, match=said):
        gather()


def test_a_grand_table_runs_nothing() -> None:
    for words in (["--run"], ["--scale", "paper"]):
        found = CliRunner().invoke(app, ["table", "grand", *words])
        assert isinstance(found.exception, UserError) and "runs nothing" in str(found.exception)


@pytest.mark.filterwarnings("error")
def test_rows_are_drawn_over_their_bytes_in_the_sizes_of_papers(
    table: Any, gather: Any, tmp_path: Path
) -> None:
    found = gather(table("A", 1))
    for size in SIZES:
        text = pareto(found, tmp_path / "a.svg", size).read_text()
        assert "bytes of the weights (MiB)" in text and "lower is better" in text
        assert f'width="{72 * SIZES[size][0]:g}' in text


def test_the_front_has_what_no_row_beats_in_both() -> None:
    sizes = {"a": (3, 0.1), "b": (1, 0.5), "worse": (2, 0.6), "c": (2, 0.3)}
    places = [Place(name, "", x, Value(y)) for name, (x, y) in sizes.items()]
    assert [place.name for place in front(places)] == ["b", "c", "a"]


def test_a_page_without_a_place_is_refused(gather: Any) -> None:
    with pytest.raises(UserError, match="no place"):
        in_readme(f"{MARK} alone", gather())


# -- what is committed -------------------------------------------------------------------------


TABLES = ROOT / "results" / "tables"


@pytest.fixture(scope="module")
def grand() -> Grand:
    """The grand table of the records in this repository, of the tables that it was made of."""
    with (TABLES / "grand.csv").open() as file:
        made_of = {row["table"] for row in csv.DictReader(file)}
    found = [table for table in campaigns() if table.name in made_of]
    return gathered(ROOT / "conf" / "table" / "grand.yaml", ROOT / "results", found)


def test_the_committed_table_is_what_the_records_give(grand: Grand) -> None:
    assert (TABLES / "grand.md").read_text().endswith(rendered(grand, "markdown"))
    assert (TABLES / "grand.csv").read_text() == rendered(grand, "csv")
    assert (TABLES / "grand.tex").read_text() == rendered(grand, "latex")
    readme = (ROOT / "README.md").read_text()
    assert f"{MARK}\n{short(grand).markdown()}{END}" in readme, "give `make tables`"


def test_it_has_every_table_with_a_verdict_and_records(grand: Grand) -> None:
    judged = [c for c in campaigns() if c.verdict and c.manifest(ROOT / "results").is_file()]
    shown = {row.table for group in grand.groups for row in group.rows}
    model = grand_model()
    own = {c.name for c in judged if first_record(c).spec["model"]["name"] == model}
    assert shown == own, "give `make tables`"


def grand_model() -> str:
    return str(yaml.safe_load((ROOT / "conf/table/grand.yaml").read_text())["gathers"]["model"])


def first_record(table: Campaign) -> Record:
    return next(iter(table.records(ROOT / "results").values()))[0]


def test_it_fits_a_terminal_of_80_columns(grand: Grand) -> None:
    for full in (False, True):
        _, *lines = rendered(grand, full=full).splitlines()
        assert max(map(len, lines)) <= 80
