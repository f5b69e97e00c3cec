"""Plots of differences and of losses over training, in the sizes of papers."""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from campaigns import two_arms
from matplotlib.text import Text
from test_report import run

from effbench.report.campaign import Campaign
from effbench.report.campaign_plots import plot
from effbench.report.comparison.compare import compare
from effbench.report.comparison.result import Comparison
from effbench.report.plots import seeds
from effbench.report.plots.canvas import SIZES, Look, Size, canvas
from effbench.report.plots.curves import comparison_plot
from effbench.report.plots.forest import forest_plot
from effbench.report.plots.placing import Spot, name_marks
from effbench.report.plots.rows import NAME
from effbench.report.plots.seeds import over_seeds
from effbench.util.errors import UserError

TEXT = """# Is one as good as another?
seeds: [0]
arms: {The one: [train method=lora], The other: [train method=full]}
"""


@pytest.fixture(scope="module")
def found() -> Comparison:
    """A run that is worse, and one that cannot be told apart."""
    runs = [
        run("lora", {"": 0.0}),
        run("full", {"": 0.3}, number=1),
        run("dora", {"": 0}, number=2),
    ]
    return compare(runs)


def texts(svg: Path) -> list[str]:
    """Return the texts of a picture, which matplotlib leaves as comments beside their outlines."""
    return re.findall(r"<!-- (.*?) -->", svg.read_text())


def test_a_forest_has_each_difference_with_its_numbers(found: Comparison, tmp_path: Path) -> None:
    said = texts(forest_plot(found, "loss", tmp_path / "a.svg"))
    assert "Loss on test against lora, lower is better" in said
    rows = found.metrics[0].rows[1:]
    assert [name for name in said if name in ("lora", "full", "dora")] == ["full", "dora"]
    for row in rows:
        assert row.difference and any(t.startswith(f"{row.difference.value:.2f}") for t in said)


def test_a_mark_is_filled_where_the_test_found_something(found: Comparison, tmp_path: Path) -> None:
    [table] = [t for t in found.metrics if t.kind.metric == "loss"]
    same = [replace(row, finding="cannot be told apart") for row in table.rows]
    nothing = replace(found, metrics=[replace(table, rows=same)])
    pictures = [forest_plot(f, "loss", tmp_path / "a.svg").read_text() for f in (found, nothing)]
    assert ["#d55e00" in text for text in pictures] == [True, False]


def test_the_same_numbers_give_the_same_bytes(found: Comparison, tmp_path: Path) -> None:
    for kind in ("svg", "pdf"):  # which have a date and random names by default
        a, b = (forest_plot(found, "loss", tmp_path / f"{n}.{kind}") for n in "ab")
        assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("size", ["screen", "column"])
def test_a_picture_is_as_wide_as_its_size_says(
    found: Comparison, tmp_path: Path, size: Size
) -> None:
    path = forest_plot(found, "loss", tmp_path / "a.svg", size)
    width = re.search(r'width="([\d.]+)pt"', path.read_text())
    assert width and float(width[1]) == pytest.approx(72 * SIZES[size][0], abs=0.1)


@pytest.mark.parametrize(
    ("metric", "said"), [("los", "Did you mean 'loss'"), ("weight_bytes", "paired test")]
)
def test_what_has_no_test_is_not_drawn(
    found: Comparison, tmp_path: Path, metric: str, said: str
) -> None:
    with pytest.raises(UserError) as caught:
        forest_plot(found, metric, tmp_path / "a.png")
    assert said in f"{caught.value} {caught.value.hint}"
    assert not (tmp_path / "a.png").exists()


def test_values_without_an_order_of_points_are_a_list(tmp_path: Path) -> None:
    """A line between two names would say that one comes after the other."""
    family = {f"{n}": run("qdylora", {f"{n}1": 0.0, f"{n}2": 0.1}) for n in "rd"}
    other = run("qdylora", {"d1": 0.0, "r2": 0.1})
    for record, drawn_as_list in ((family["r"], False), (family["d"], False), (other, True)):
        said = texts(comparison_plot(compare([record]), "loss", tmp_path / "a.svg"))
        assert ("operating point" in said) is not drawn_as_list
        assert any("[" in text for text in said) is drawn_as_list
    alone = compare([run("lora", {"": 0.0}), run("full", {"": 0.3}, number=1)])
    said = texts(comparison_plot(alone, "loss", tmp_path / "a.svg"))
    assert [name for name in said if name in ("lora", "full")] == ["lora", "full"]
    assert "95 % intervals of each value alone, not of differences" in said


LONG = "a method whose name takes more than a third of a column"


@pytest.mark.filterwarnings("error")
def test_a_column_has_room_for_marks_beside_long_names_and_numbers(tmp_path: Path) -> None:
    """Where there is none, matplotlib warns and leaves its layout."""
    rows = [run("full", {"": 0.3}), run(LONG, {"": 0.0}, number=1)]
    said = texts(forest_plot(compare(rows), "loss", tmp_path / "a.svg", "column"))
    lines = textwrap.wrap(LONG, NAME["column"])
    assert len(lines) > 2 and [text for text in said if text in lines] == lines
    assert any(text.startswith("[-0.") for text in said), "the interval below its number"
    assert "Loss on test against full, lower is better" in said
    said = texts(forest_plot(compare(rows[::-1]), "loss", tmp_path / "a.svg"))
    assert "lower is better" in said and max(map(len, said)) < 75, "a title fits its picture"


@pytest.mark.filterwarnings("error")
def test_a_method_with_several_points_is_the_heading_of_its_rows(tmp_path: Path) -> None:
    """So that points have one line each, in a column too; a heading takes none of their room."""
    rows = [run("full", {"": 0.9}), run(LONG, {"r1": 0.3, "r8": 0.1}, number=1)]
    said = texts(forest_plot(compare(rows), "loss", tmp_path / "a.svg", "column"))
    assert [said.count(text) for text in ("r1", "r8", LONG)] == [1, 1, 1]
    assert sum("[" in text for text in said) == 2
    assert not any(text.startswith("[") for text in said), "numbers have one line"


@pytest.mark.filterwarnings("error")
def test_names_stand_below_the_lines_of_a_column(tmp_path: Path) -> None:
    runs = [run(LONG, {"r1": 0.3, "r8": 0.1}), run("full", {"": 0.2}, number=1)]
    said = texts(comparison_plot(compare(runs), "loss", tmp_path / "a.svg", "column"))
    assert said[-3:] == ["95 % intervals of each value alone, not of differences", LONG, "full"]


def test_what_is_said_of_a_column_stands_above_the_names_of_its_lines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(seeds, "save", lambda figure, *_: drawn.append(figure))
    lines = {name: [([1, 2], [3, 2]), ([1, 2], [4, 2])] for name in ("lora", "full")}
    seeds.seeds_plot(lines, tmp_path / "a.svg", "column")
    [below] = drawn[0].legends
    assert below.get_title().get_text() == "bands: least and most of up to 2 seeds"
    assert [text.get_text() for text in below.get_texts()] == ["lora", "full"]


def test_no_two_of_many_series_look_alike() -> None:
    looks = [Look.of(number, "", "screen") for number in range(56)]
    assert len({(look.colour, look.marker) for look in looks}) == 56


def test_names_cover_neither_marks_nor_each_other() -> None:
    """Marks in a heap, each of them on the front, as bytes of one model often are."""
    figure, axes = canvas()
    spots = [Spot(x, y - 0.1, y, y + 0.1) for x, y in ((1, 0.5), (1.1, 0.45), (1.2, 0.4), (9, 0))]
    axes.plot([s.x for s in spots], [s.y for s in spots], "o")
    names = [(f"the {n} of several methods", spot) for n, spot in enumerate(spots)]
    name_marks(axes, names, spots, 8.0, [[(s.x, s.y) for s in spots]])
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to them
    dots = axes.transData.transform([(s.x, s.y) for s in spots])
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])
        assert not any(box.contains(x, y) for x, y in dots)
        assert axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)


# -- losses over training ----------------------------------------------------------------------


def test_lines_and_levels_have_their_names_beside_them(tmp_path: Path) -> None:
    runs = [run("full", {"": 0.3}), run("dylora", {"r1": 0.2, "r8": 0.0}, number=1)]
    said = texts(comparison_plot(compare(runs), "loss", tmp_path / "a.svg"))
    assert {"full", "dylora", "r1", "r8"} <= {*said}


def test_a_label_is_no_formula(tmp_path: Path) -> None:
    name = "$\\evil{$ _a"
    lines = [run("full", {"r1": 0.3, "r8": 0.1}), run(name, {"r1": 0.2, "r8": 0.0}, number=1)]
    rows = [run("full", {"": 0.3}), run(name, {"": 0.0}, number=1)]
    for runs in (lines, rows):
        assert name in texts(comparison_plot(compare(runs), "loss", tmp_path / "a.svg"))
    assert name in texts(forest_plot(compare(rows), "loss", tmp_path / "a.svg"))


def test_seeds_are_held_against_each_other_at_the_same_steps() -> None:
    steps, losses = over_seeds([([1, 2, 3], [3, 2, 1]), ([1, 3], [5, 3])])
    assert steps.tolist() == [1, 2, 3]
    assert losses.tolist() == [[3, 2, 1], [5, 4, 3]]


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    """A campaign of two runs with records alone."""
    return two_arms(tmp_path, TEXT)


def test_curves_are_of_the_runs_whose_folders_are_there(campaign: Campaign, tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    with pytest.raises(UserError, match="No folder of a training of ab") as caught:
        plot(campaign, tmp_path, path, "curves")
    assert caught.value.hint == "Train it here: effbench table ab --run"
    folder = tmp_path / "runs" / "0001".ljust(16, "0")
    folder.mkdir(parents=True)
    events = [{"time": 0, "event": "step", "step": n, "loss": 3 / n} for n in (1, 2, 3)]
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    said = texts(plot(campaign, tmp_path, path, "curves"))
    assert "The other" in said and "The one" not in said


def test_a_table_is_drawn_by_values_too(campaign: Campaign, tmp_path: Path) -> None:
    said = texts(plot(campaign, tmp_path, tmp_path / "a.svg", "values", "column"))
    assert "Loss on test, lower is better" in said and "The one" in said
