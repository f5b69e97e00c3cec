"""The report page: what it holds; nothing of a record becomes markup; it stays small."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report.test_report import run
from results.test_records import record
from typer.testing import CliRunner

from effbench.cli.main import app
from effbench.report.labels import command_of
from effbench.report.page.columns import artefact_of, rows_of
from effbench.report.page.curves import thinned
from effbench.report.page.evidence import evidence
from effbench.report.page.render import PLAIN_ROWS, _folded, page
from effbench.results.records import Metric, Outcomes, Record, read_all, write
from effbench.util.errors import UserError

ROOT = Path(__file__).parents[2]
HOSTILE = "</script><img src=x onerror=alert(1)>\"'&<!--"


def named(number: int, **changes: Any) -> Record:
    """Return a record with a key and a value of its own."""
    metrics = [Metric("loss", 2 + number / 7, "nats/token", "", "test", 9, 1.5, 3.5)]
    return record(key=f"{number:016x}", **{"metrics": metrics, **changes})


def payload(text: str) -> list[Any]:
    """Return what the script reads: what there is, and the columns of each block."""
    found = re.search(r'id="data">([^<]*)</script>', text)
    assert found
    return [json.loads(gzip.decompress(base64.b64decode(line))) for line in found[1].split()]


def cells(text: str, name: str) -> list[Any]:
    """Return the values of a column as the script reads them."""
    data, *blocks = payload(text)
    place = next(i for i, c in enumerate(data["columns"]) if c["name"] == name)
    found: list[Any] = []
    for (rows, places), columns in zip(data["blocks"], blocks, strict=True):
        if place not in places:
            found += [None] * rows
            continue
        column = columns[places.index(place)]
        column = columns[column["like"]] if "like" in column else column
        if "value" in column:
            found += [column["value"]] * rows
        else:
            found += column.get("numbers") or [column["levels"][c] for c in column["codes"]]
    return found


class Elements(HTMLParser):
    """Counts the elements of a page, their event handlers, and what they load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: Counter[str] = Counter()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attrs)


# -- content -----------------------------------------------------------------------------------


def test_a_row_is_a_run_at_a_point_with_what_the_run_has_as_a_whole() -> None:
    metrics = [
        Metric("loss", 2.0, "nats/token", "r1", "test", 9, 1.5, 2.5),
        Metric("loss", 1.0, "nats/token", "r4", "test", 9, 0.5, 1.5),
        Metric("peak_bytes", 7e9, "bytes"),
    ]
    text = page([record(metrics=metrics)])
    assert cells(text, "point") == ["r1", "r4"]
    assert cells(text, "loss (test, nats/token)") == [2, 1]
    assert cells(text, "peak_bytes") == [7_000_000_000] * 2
    data, columns = payload(text)
    place = next(i for i, c in enumerate(data["columns"]) if c["name"].startswith("loss"))
    loss = columns[place]
    assert (loss["low"], loss["high"]) == ([1.5, 0.5], [2.5, 1.5])
    assert data["columns"][place]["better"] == "lower"


def test_what_was_measured_and_what_was_modelled_are_different_columns() -> None:
    metrics = [Metric("energy_j", 1, "J"), Metric("energy_j", 2, "J", obtained="modelled")]
    names = [c.name for c in rows_of([record(metrics=metrics)]).columns if "energy" in c.name]
    assert names == ["energy_j (J)", "energy_j (J, modelled, not measured)"]


def test_a_value_that_few_rows_have_is_missing_in_the_others() -> None:
    odd = named(1, metrics=[Metric("kl", 0.1, "nats/token"), Metric("loss", float("inf"), "")])
    text = page([named(0), odd])
    assert cells(text, "kl (nats/token)") == [None, 0.1]
    assert cells(text, "loss") == [None, "inf"]


def test_every_committed_record_has_its_rows() -> None:
    records = read_all(ROOT / "results" / "records", outcomes=False)
    text = page(records)
    assert set(cells(text, "key")) == {r.key for r in records}
    assert page(records) == text


def test_a_command_is_the_one_that_was_given_or_names_the_run() -> None:
    kept = record(environment={"command": "effbench train method=lora"})
    assert command_of(kept) == "effbench train method=lora"
    assert command_of(record()) == "effbench train --like 0123456789abcdef --fresh"


def test_an_evaluation_is_of_the_artefact_that_it_went_on_from() -> None:
    assert artefact_of(record(stage="eval", parent="aa" * 8)) == "aa" * 8
    assert artefact_of(record(stage="train", parent="aa" * 8)) == "0123456789abcdef"


def test_a_thinned_curve_keeps_its_mean_and_its_order() -> None:
    steps, losses = [float(i) for i in range(1000)], [float(i % 10) for i in range(1000)]
    thin_steps, thin_losses = thinned((steps, losses), 50)
    assert len(thin_steps) == 50 and thin_steps == sorted(thin_steps)
    assert sum(thin_losses) / 50 == pytest.approx(4.5)
    assert thinned((steps, losses), 1000) == (steps, losses)


def test_runs_are_held_against_the_reference_where_they_saw_the_same_items() -> None:
    def with_items(number: int, ids: str, shift: float) -> Record:
        values = [2.0 + i / 10 + shift * (1 + i % 2) for i in range(30)]
        loss = Metric("loss", sum(values) / 30, "nats/token", "", "test", 30)
        kept = Outcomes("perplexity", "loss", "", "test", ids, values)
        method = {"name": "lora", "settings": {"rank": number}}
        return named(
            number,
            metrics=[loss],
            outcomes=[kept],
            spec={**record().spec, "method": method},
        )

    records = [with_items(1, "aa", 0.0), with_items(2, "aa", 0.5), with_items(3, "bb", 0.5)]
    found = evidence(records, records[0], records)
    [metric] = found.forest
    [[_, value, low, high, _, finding, key]] = metric["rows"]
    assert (finding, key) == ("higher", records[1].key)
    assert value == pytest.approx(0.75) and low < value < high
    assert any("Higher" in line for line in found.words)
    assert found.notes[0].endswith("1 run.")
    text = page(records, found)
    assert "Higher" in text and payload(text)[0]["forest"] == found.forest


def test_many_rows_are_counted_in_a_sentence() -> None:
    """One of ten is alike, and the metric is a loss."""
    shifts = [0.0, 0.0, *(0.5 + n / 10 for n in range(7)), -0.5, -0.6]
    runs = [run(f"m{n}", {"": s}, number=n) for n, s in enumerate(shifts)]
    counted = (
        "loss on test, 10 rows against m0: 2 lower (better), 7 higher, 1 cannot be told apart."
    )
    assert evidence(runs, runs[0], runs).words[0] == counted
    assert "rows against" not in " ".join(evidence(runs[:5], runs[0], runs).words)


# -- safety ------------------------------------------------------------------------------------


def test_nothing_of_a_record_becomes_markup() -> None:
    spec = {"method": {"name": HOSTILE, "settings": {HOSTILE: HOSTILE}}, "seed": 0}
    metric = Metric(HOSTILE, 1.0, HOSTILE, HOSTILE, HOSTILE, task=HOSTILE)
    hostile = named(
        1,
        label=HOSTILE,
        spec=spec,
        metrics=[replace(metric, name="loss"), metric],
        environment={HOSTILE: HOSTILE, "command": HOSTILE},
        notes=[HOSTILE],
        plan={"phases": {HOSTILE: {"peak_bytes": 1, "measured_bytes": 2, "error": HOSTILE}}},
    )
    found = evidence([hostile], hostile, [])
    words = [HOSTILE, f"{HOSTILE}. {HOSTILE * 20}"]
    text = page([hostile], replace(found, words=words, notes=words))
    elements = Elements(text)
    assert elements.tags["script"] == 2 and text.count("</script>") == 2
    assert not elements.tags.keys() & {"img", "iframe", "link", "object", "embed", "a"}
    assert not [a for a in elements.attributes if a.startswith("on") or a in ("src", "style")]
    assert cells(text, "method") == [HOSTILE]


def test_the_policy_names_the_style_and_the_script_by_their_hashes() -> None:
    text = page([record()])
    [policy] = re.findall(r'Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; ")
    for kind in ("style", "script"):
        [content] = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy
    assert "unsafe" not in policy and "http" not in policy


def test_the_script_writes_no_markup() -> None:
    script = (ROOT / "effbench" / "report" / "page" / "page.js").read_text()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(", script
    )


# -- size --------------------------------------------------------------------------------------


def test_without_javascript_the_first_rows_are_a_table() -> None:
    records = [named(i) for i in range(PLAIN_ROWS + 5)]
    text = page(records)
    assert text.count("\n<tr><td>") + text.count("<tbody><tr><td>") == PLAIN_ROWS
    assert f"<td>{records[0].key}</td>" in text and f"<td>{records[-1].key}</td>" not in text
    assert f"The first {PLAIN_ROWS} of {PLAIN_ROWS + 5} rows." in text


def many(count: int) -> list[Record]:
    """Return records like committed ones: numbers, settings and times of their own."""
    random.seed(0)
    [like] = [r for r in read_all(ROOT / "results" / "records", False) if r.key[:8] == "0231c9af"]
    made = []
    for number in range(count):
        metrics = [replace(m, value=m.value * random.uniform(0.9, 1.1)) for m in like.metrics[-9:]]
        same = like.metrics[:-9]
        settings = {"name": f"method{number % 40}", "settings": {"rank": number % 32}}
        spec = {**like.spec, "method": settings, "seed": number % 5}
        key = f"{random.getrandbits(64):016x}"
        made.append(replace(like, key=key, spec=spec, metrics=[*same, *metrics]))
    return made


@pytest.mark.slow
def test_ten_thousand_records_make_a_small_file() -> None:
    assert len(page(many(10_000)).encode()) < 1.5e6


# -- the command -------------------------------------------------------------------------------


def test_the_command_writes_a_file_and_replaces_an_older_one(tmp_path: Path) -> None:
    write(record(), tmp_path / "records")
    out = tmp_path / "new" / "report.html"
    for _ in range(2):
        said = CliRunner().invoke(app, ["report", "--results", str(tmp_path), "-o", str(out)])
        assert said.exit_code == 0
    assert cells(out.read_text(), "key") == ["0123456789abcdef"]
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    "words, newer, said",
    [
        (["ffff"], False, "no record 'ffff'"),
        (["--against", "ffff"], False, "no record 'ffff'"),
        (["--results", "elsewhere"], False, "no records in elsewhere"),
        ([], True, "written by a newer effbench"),
    ],
)
def test_bad_input_is_named_and_leaves_the_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], newer: bool, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(record(), Path("results/records"))
    if newer:
        write(named(1, schema=99), Path("results/records"))
    Path("report.html").write_text("older")
    with pytest.raises(UserError, match=said):
        CliRunner().invoke(app, ["report", *words], catch_exceptions=False)
    assert Path("report.html").read_text() == "older"


@pytest.mark.parametrize(
    ("line", "summary"),
    [
        (f"Seeds: {'lora, rank=8: 3; ' * 40}", "Seeds"),
        (f"loss, against none. Higher: {'lora; ' * 90}", "loss, against none"),
        (
            f"2 runs have no {'loss, ' * 60}acc: lora; lora.",
            f"2 runs have no {'loss, ' * 19}loss, …",
        ),
        ("word " * 200, f"{'word ' * 27}word … {'word ' * 13}"),
    ],
)
def test_a_long_sentence_is_folded_under_a_short_line(line: str, summary: str) -> None:
    folded = _folded(line)
    assert f"<summary>{summary}</summary>" in folded
    assert all(folded.count(word) >= line.count(word) for word in ("lora", "word", "Higher"))
    assert _folded("short: a. b") == "short: a. b"
