"""Sections of the report that need no script: items that change sides, and maps of layers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from report.test_flips import answered
from report.test_page import HOSTILE, Elements
from typer.testing import CliRunner

from effbench.cli.main import app
from effbench.report.page.layers import MATRICES, STEPS, layer_maps
from effbench.results.records import Record, write
from effbench.results.store import Store


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two runs, the second with texts and with layers of which two are alike."""
    first = answered(0, [1, 1, 0, 0, 1, 0])
    second = replace(answered(1, [0, 1, 0, 1, 0, 0]), label=HOSTILE)
    for record in (first, second):
        write(record, tmp_path / "records")
    folder = tmp_path / "runs" / second.key / "evaluations"
    folder.mkdir(parents=True)
    texts = [{"id": f"q{i}", "prompt": f"{i} {HOSTILE}", "text": str(i)} for i in range(6)]
    like = [[1.0, 0.5, 0.0], [0.5, 1.0, 0.97], [0.0, 0.97, 1.0]]
    layers = [
        {"layer": i, "score": [0.5, 0, 1], **dict.fromkeys(MATRICES, like[i])} for i in range(3)
    ]
    for name, rows in (("generation.test", texts), ("similarity.layers", layers)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return tmp_path


def report(results: Path, *words: str) -> str:
    out = results / "report.html"
    said = CliRunner().invoke(app, ["report", *words, "--results", str(results), "-o", str(out)])
    assert said.exit_code == 0, said.output
    return out.read_text()


def test_items_that_change_sides_are_there_with_their_texts(results: Path) -> None:
    text = report(results, "--against", "0000")
    part = text[text.index('<section id="flips">') : text.index('<section id="environment">')]
    assert "exact_match on test: 2 of 6 items are right in 00000000 alone, 1 in 00010000" in part
    assert "item 4, q3: 3 &lt;/script&gt;" in part, "of each way, and as text"
    assert Elements(part).tags.keys() == {"section", "h2", "details", "summary", "pre"}
    assert 'id="flips"' not in report(results), "which needs a reference"


def test_layers_are_drawn_as_dark_as_they_are_alike(results: Path) -> None:
    text = report(results)
    part = text[text.index('<section id="layers">') : text.index('<section id="environment">')]
    assert part.count("<svg") == len(MATRICES)
    shades = re.findall(r'fill-opacity="([^"]+)" d="([^"]+)"', part.partition("</svg>")[0])
    drawn = {float(shade): path.count("M") for shade, path in shades}
    assert drawn == {0: 2, 0.5: 2, 1: 5}, f"of {STEPS} shades, .97 is the darkest too"
    assert "M0 2h1" in dict(shades)["1"], "the first layer is at the bottom left"
    assert "script&gt;" in part and Elements(part).tags["img"] == 0


def test_what_is_damaged_has_no_map(results: Path) -> None:
    [path] = results.rglob("similarity.layers.jsonl")
    path.parent.parent.joinpath("manifest.jsonl").write_text("not one\n")
    records: list[Record] = [answered(1, [0.0] * 6)]
    assert layer_maps(records, Store(results)) == []
