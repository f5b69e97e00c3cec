"""The commands as functions: typed results, without pandas and before torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from results.test_records import record

import effbench
from effbench.cli.calls import Run
from effbench.results.records import write
from effbench.util.errors import UserError


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for number, key in enumerate(("aaaa0000aaaa0000", "bbbb0000bbbb0000")):
        write(
            record(key=key, started=f"2026-01-0{number + 1}T00:00:00+00:00"), tmp_path / "records"
        )
    return tmp_path


def test_the_package_offers_its_commands() -> None:
    assert {"train", "evaluate", "compress", "compare", "runs"} <= set(effbench.__all__)
    assert all(callable(getattr(effbench, name)) for name in effbench.__all__[1:])
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        effbench.trian  # noqa: B018


def test_runs_are_a_sequence_and_a_table(results: Path) -> None:
    found = effbench.runs(results)
    assert [run.key[:4] for run in found] == ["bbbb", "aaaa"], "the latest first"
    assert len(found[:1]) == 1
    assert found[0].key in repr(found)
    assert found._repr_html_().count("<tr>") == 3
    frame = found.to_pandas()
    assert list(frame["key"]) == [run.key for run in found]
    assert not effbench.runs(results / "none")


def test_a_run_has_its_metrics(results: Path) -> None:
    run = effbench.runs(results)[0]
    first = run.metrics[0]
    assert run.metric(first.name) == first
    assert run.to_pandas()["value"][0] == first.value
    assert len(run.to_pandas()) == len(run.metrics)
    assert "<table>" in run._repr_html_()
    assert run.key in repr(run)
    with pytest.raises(UserError, match="has no metric 'lss'") as caught:
        run.metric("lss")
    assert "'loss'" in caught.value.hint


def test_a_comparison_is_words_and_a_table(results: Path) -> None:
    first, second = effbench.runs(results)
    found = effbench.compare(first, second.key, results=results)
    assert found.comparison.keys == [first.key, second.key]
    frame = found.to_pandas()
    assert {"metric", "value", "difference", "finding"} <= set(frame.columns)
    assert "<table>" in found._repr_html_()
    assert repr(found) == found.comparison.markdown()


def test_pandas_is_only_wanted_where_it_is_used(results: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    run = effbench.runs(results)[0]
    with pytest.raises(UserError, match="pandas is not installed"):
        run.to_pandas()


def test_mistakes_are_told_as_on_the_command_line() -> None:
    with pytest.raises(UserError, match="no model called 'tniy'") as caught:
        effbench.train("model=tniy")
    assert "'tiny'" in str(caught.value)
    assert Run


def test_what_is_no_word_or_run_is_named(results: Path) -> None:
    asked: Any = effbench
    with pytest.raises(UserError, match=r"^\['model=tiny'\] is no word"):
        asked.train(["model=tiny"])
    for given in ((), (None, "latest"), (["latest"],)):
        with pytest.raises(UserError, match="What is compared are runs"):
            asked.compare(*given, results=results)
    for margin in ("x", -1, 0, float("nan")):
        with pytest.raises(UserError, match="no number above zero"):
            asked.compare(*effbench.runs(results)[:2], margins={"loss": margin})
    with pytest.raises(UserError, match="There is no folder method=lora"):
        effbench.runs("method=lora")
