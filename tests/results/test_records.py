"""Records: written whole, read strictly, found by people, queried in SQL."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from effbench.results import records
from effbench.results.lookup import find
from effbench.results.query import query
from effbench.results.records import Metric, Outcomes, Record, read, read_all, write
from effbench.util.errors import UserError
from effbench.util.files import replace_folder, scratch_folder, write_atomic


def record(key: str = "0123456789abcdef", **changes: Any) -> Record:
    spec = {
        "method": {"name": "lora", "settings": {"rank": 8, "outcomes": ["x"]}},
        "model": {"name": "tiny"},
        "dataset": {"name": "arithmetic"},
        "seed": 3,
        "hardware": {"device": "cpu", "dtype": "float32"},
    }
    metrics = [
        Metric("loss", 2.25, "nats/token", "r1", "test", 2, 2.0, 2.5),
        Metric("params", 1000, "parameters", obtained="counted"),
    ]
    made = Record(
        schema=records.SCHEMA,
        key=key,
        label="train lora tiny arithmetic seed 3",
        stage="train",
        spec=spec,
        environment={"python": "3.12"},
        parent="",
        started="2025-03-01T12:00:00+00:00",
        seconds=12.5,
        metrics=metrics,
        plan={"bytes": 123},
        notes=['a note with ,"outcomes":[ in it'],
        outcomes=[Outcomes("perplexity", "loss", "r1", "test", "ff" * 8, [2.5, 2.0, 1.0])],
    )
    return replace(made, **changes)


def test_a_record_comes_back_as_it_was_from_one_line(tmp_path: Path) -> None:
    path = write(record(), tmp_path)
    assert path.name == "0123456789abcdef.json"
    text = path.read_text()
    assert text.count("\n") == 1 and text.endswith("\n")
    assert read(path) == record()
    assert isinstance(read(path).metrics[1].value, float)


def test_the_outcomes_can_be_left_unparsed(tmp_path: Path) -> None:
    path = write(record(), tmp_path)
    assert read(path, outcomes=False) == record(outcomes=[])


def test_outcomes_keep_six_digits_and_stay_short(tmp_path: Path) -> None:
    long = Outcomes("choices", "accuracy", "", "test", "aa", [1.0, 0.0, 2.123456789])
    path = write(record(outcomes=[long]), tmp_path)
    assert '"values":[1,0,2.12346]' in path.read_text()
    assert read(path).outcomes[0].values == [1.0, 0.0, 2.12346]


def test_a_diverged_run_is_still_strict_json(tmp_path: Path) -> None:
    metrics = [Metric("loss", math.nan, "nats/token", low=-math.inf, high=math.inf)]
    outcomes = [Outcomes("perplexity", "loss", "", "test", "aa", [math.inf, 1.0])]
    path = write(record(metrics=metrics, outcomes=outcomes), tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(path.read_text(), parse_constant=refuse)
    found = read(path)
    assert math.isnan(found.metrics[0].value) and found.metrics[0].low == -math.inf
    assert found.outcomes[0].values == [math.inf, 1.0]
    assert math.isnan(query(tmp_path, "SELECT value FROM metrics").rows[0][0])


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t[: len(t) // 2],
        lambda t: "",
        lambda t: "[]\n",
        lambda t: t + t,
        lambda t: t.replace('"seconds":12.5', '"seconds":"long"'),
        lambda t: t.replace('"seconds":12.5', '"seconds":null'),
        lambda t: t.replace('"obtained":"counted"', '"obtained":"guessed"'),
        lambda t: t.replace('"label":', '"lable":'),
        lambda t: t.replace('"stage":"train",', ""),
        lambda t: t.replace(f'"schema":{records.SCHEMA},', ""),
    ],
)
def test_a_damaged_record_is_named_not_skipped(tmp_path: Path, damage: Any) -> None:
    write(record("aaaa000000000000"), tmp_path)
    path = write(record(), tmp_path)
    path.write_text(damage(path.read_text()))
    for outcomes in (True, False):
        with pytest.raises(UserError, match=r"0123456789abcdef.*not a whole record"):
            read_all(tmp_path, outcomes)


def test_a_newer_record_asks_for_an_upgrade(tmp_path: Path) -> None:
    path = write(record(schema=records.SCHEMA + 1), tmp_path)
    with pytest.raises(UserError, match="newer effbench") as caught:
        read(path)
    assert "Upgrade" in caught.value.hint


def test_an_older_record_is_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(record(), tmp_path)
    now, following = records.SCHEMA, records.SCHEMA + 1
    monkeypatch.setattr(records, "SCHEMA", following)
    change = {"schema": following, "label": "migrated"}
    monkeypatch.setitem(records.RECORDS, now, lambda v: {**v, **change})
    assert read(path).label == "migrated"


def test_a_record_of_the_first_schema_is_read(tmp_path: Path) -> None:
    path = write(record(), tmp_path)
    text = path.read_text().replace(f'"schema":{records.SCHEMA}', '"schema":1')
    text = re.sub(',"digest":"[^"]*"', "", text)
    path.write_text(text.replace(',"task":""', "").replace(',"clusters":[]', ""))
    old = read(path)
    assert old.schema == records.SCHEMA
    assert {m.task for m in old.metrics} == {""} and old.outcomes[0].clusters == []


def test_find_by_key_prefix_and_latest(tmp_path: Path) -> None:
    write(record("abcd111111111111"), tmp_path)
    write(record("abcd222222222222", started="2025-03-02T12:00:00+00:00"), tmp_path)
    write(record("ffff333333333333", started="2025-02-01T12:00:00+00:00"), tmp_path)
    assert find(tmp_path, "abcd111111111111").key == "abcd111111111111"
    assert find(tmp_path, "ffff").key == "ffff333333333333"
    assert find(tmp_path, "latest").key == "abcd222222222222"
    assert find(tmp_path, "latest").outcomes
    assert [r.key[:4] for r in read_all(tmp_path)] == ["ffff", "abcd", "abcd"]
    with pytest.raises(UserError, match="fits 2 records") as caught:
        find(tmp_path, "abcd")
    assert "abcd111111111111" in caught.value.hint
    with pytest.raises(UserError, match="too short"):
        find(tmp_path, "fff")
    with pytest.raises(UserError, match="no record") as caught:
        find(tmp_path, "ffff333333333334")
    assert "ffff333333333333" in caught.value.hint
    with pytest.raises(UserError, match="no record"):
        find(tmp_path, "../records/ffff333333333333")


def test_no_records_at_all(tmp_path: Path) -> None:
    assert read_all(tmp_path / "absent") == []
    with pytest.raises(UserError, match="no records"):
        find(tmp_path, "latest")
    assert query(tmp_path, "SELECT count(*) FROM metrics").rows == [(0,)]
    with pytest.raises(UserError, match="There is no record"):
        read(tmp_path / "absent.json")


def test_queries_see_both_views_and_nothing_else(tmp_path: Path) -> None:
    write(record(), tmp_path)
    found = query(tmp_path, "SELECT method, model, dataset, seed, name, point, n FROM metrics")
    assert found.columns == ("method", "model", "dataset", "seed", "name", "point", "n")
    assert found.rows[0] == ("lora", "tiny", "arithmetic", 3, "loss", "r1", 2)
    spec = query(tmp_path, "SELECT spec->>'$.method.settings.rank', device FROM records")
    assert spec.rows == [("8", "cpu")]
    other = tmp_path / "other.csv"
    other.write_text("a\n1\n")
    for wrong in (f"SELECT * FROM '{other}'", "SELECT nope FROM records", "SELEC 1"):
        with pytest.raises(UserError, match="query failed"):
            query(tmp_path, wrong)
    assert query(tmp_path, "").rows == []


def test_reading_imports_nothing_heavy() -> None:
    script = (
        "import sys, effbench.results.records, effbench.report.table\n"
        "heavy = {'torch', 'transformers', 'numpy', 'duckdb', 'rich', 'pydantic', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# -- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomic(tmp_path / "file", "old")

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="cannot be written") as caught:
        write_atomic(tmp_path / "file", "new")
    assert caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_other_errors_are_bugs_and_show_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="broken disk"):
        write_atomic(tmp_path / "file", b"new")
    assert not list(tmp_path.iterdir())


def test_folders_are_made_and_the_umask_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, b"\0\1")
    assert path.read_bytes() == b"\0\1"
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError):
        write_atomic(tmp_path / "file" / "record.json", "x")


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    final = tmp_path / "artefact"
    for content in ("one", "two"):
        with scratch_folder(tmp_path, "artefact") as new:
            (new / "deep").mkdir()
            (new / "deep" / content).write_text(content)
            replace_folder(new, final)
    assert [p.name for p in final.rglob("*")] == ["deep", "two"]
    assert [p.name for p in tmp_path.iterdir()] == ["artefact"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "artefact"
    final.mkdir()
    (final / "old").write_text("old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UserError), scratch_folder(tmp_path, "artefact") as new:
        (new / "new").write_text("new")
        replace_folder(new, final)
    assert [p.name for p in final.iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["artefact"]


def test_what_a_terminal_would_act_upon_is_not_read(tmp_path: Path) -> None:
    path = write(record(label="a\x1b]0;owned\x07b\tc", notes=["\x9b2Jx"]), tmp_path)
    found = read(path)
    assert found.label == "a\ufffd]0;owned\ufffdb\tc" and found.notes == ["\ufffd2Jx"]


@pytest.mark.parametrize("outcomes", [True, False])
def test_another_digit_in_a_record_is_told(tmp_path: Path, outcomes: bool) -> None:
    path = write(record(), tmp_path)
    text = path.read_text()
    place = text.index('"seconds":') + len('"seconds":')
    path.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
    with pytest.raises(UserError, match="content is not what was written"):
        read(path, outcomes)


def test_the_record_of_another_run_is_told(tmp_path: Path) -> None:
    path = write(record(), tmp_path)
    path.rename(tmp_path / "ffff000000000000.json")
    with pytest.raises(UserError, match="it is that of run 0123456789abcdef"):
        read_all(tmp_path)


def test_a_run_that_goes_on_from_itself_is_told(tmp_path: Path) -> None:
    path = write(record(parent="0123456789abcdef"), tmp_path)
    with pytest.raises(UserError, match="goes on from itself"):
        read(path)
