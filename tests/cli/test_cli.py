from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from effbench.cli.main import _only, app

RUN = ["model=tiny", "dataset=arithmetic", "run.progress=false", "dataset.limit.test=8"]
STEPS = ["train.max_steps=1", "train.batch_size=2", "method.rank=2"]
TRAIN = ["train", *RUN, *STEPS]


def records() -> list[Path]:
    return sorted(Path("results/records").glob("*.json"), key=lambda p: p.stat().st_mtime_ns)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with two runs of other seeds, made by two commands."""
    from effbench.testing.bench import Bench, forget_accelerator

    root = tmp_path_factory.mktemp("two") / "results"
    for seed in (0, 1):
        forget_accelerator()
        Bench(root).run("train", *RUN, *STEPS, f"seed={seed}")
    return root


@pytest.fixture
def keys(two: Path) -> list[str]:
    found = [json.loads(p.read_text()) for p in (two / "records").glob("*.json")]
    return [r["key"] for r in sorted(found, key=lambda r: r["spec"]["seed"])]


# -- running ---------------------------------------------------------------------------------------


def test_a_dry_run_plans_and_makes_nothing(cli) -> None:
    for words in (TRAIN, ["eval", *RUN], ["compress", *RUN]):
        status, out, _ = cli(*words, "--dry-run")
        assert status == 0
        assert "peak" in out
        assert "It fits" in out
    assert cli("plan", *RUN)[1].startswith("train lora tiny arithmetic seed 0 (key ")
    assert not list(Path().iterdir())


def test_a_key_is_printed_alone_and_nothing_is_made(cli) -> None:
    status, out, said = cli(*TRAIN, "--print-key")
    assert (status, said.strip()) == (0, "")
    assert len(out.strip()) == 16
    assert f"(key {out.strip()})" in cli(*TRAIN, "--dry-run")[1]
    assert not list(Path().iterdir())


def test_a_finished_command_is_read_and_fresh_runs_it_anew(cli, inline) -> None:
    status, first, _ = cli(*TRAIN)
    assert status == 0
    assert inline == [0]
    [record] = records()
    key = json.loads(record.read_text())["key"]
    assert f"Key {key}: train lora tiny arithmetic seed 0" in first
    status, again, said = cli(*TRAIN)
    assert (status, again, inline) == (0, first, [0])
    assert f"Done before, nothing to run (--fresh runs it anew): {key}" in said
    before = record.stat().st_mtime_ns
    status, _, said = cli(*TRAIN, "--fresh")
    assert (status, inline) == (0, [0, 0])
    assert "Done before" not in said
    [record] = records()
    assert record.stat().st_mtime_ns > before


def test_a_run_that_fails_gives_its_status(cli, monkeypatch) -> None:
    def broken(*_: object) -> int:
        Path("results/runs/begun").mkdir(parents=True)
        return 7

    monkeypatch.setattr("effbench.runner.local._run_process", broken)
    assert cli(*TRAIN)[0] == 7
    assert Path("results/runs/begun").is_dir(), "what a bug left is kept"


def test_a_run_without_a_record_is_no_success(cli, monkeypatch) -> None:
    monkeypatch.setattr("effbench.runner.local._run_process", lambda *_: 0)
    status, _, said = cli(*TRAIN)
    assert status == 2
    assert "ended without a record" in said
    assert "--fresh" in said


def test_the_installed_command_runs_in_processes_of_its_own(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("effbench")
    done = subprocess.run(
        [str(command), "eval", *RUN], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "loss (test, nats/token)" in done.stdout
    [run] = (tmp_path / "results" / "runs").glob("[!.]*")
    assert (run / "FINISHED").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["results"]


# -- looking ---------------------------------------------------------------------------------------


def test_runs_lists_shows_and_finds(cli, two: Path, keys) -> None:
    at = ["--results", str(two)]
    status, out, _ = cli("runs", *at)
    assert status == 0
    assert [k for k in keys if k[:8] in out] == keys
    assert "lora" in out
    out = cli("runs", "show", keys[1], *at)[1]
    assert f"Key {keys[1]}: train lora tiny arithmetic seed 1" in out
    assert "train_loss_last" in out
    assert "perplexity" not in out
    full = cli("runs", "show", keys[1], "--full", *at)[1]
    assert "perplexity" in full
    assert re.search(r"(\d+) more metrics: effbench runs show", out)
    assert "more metrics" not in full
    assert json.loads(cli("runs", "show", keys[1], "--spec", *at)[1])["seed"] == 1
    assert cli("runs", "path", keys[0][:6], *at)[1].strip() == str(two / "runs" / keys[0])
    assert cli("runs", "path", "latest", *at)[1].strip().endswith(keys[1])


def test_the_results_folder_may_come_from_the_environment(cli, two, keys, monkeypatch) -> None:
    monkeypatch.setenv("EFFBENCH_RESULTS", str(two))
    assert keys[0][:8] in cli("runs")[1]


def test_unfinished_runs_are_listed_as_such(cli, bench) -> None:
    job = bench.job("train", *STEPS)
    bench.folder(job).create(job.spec)
    status, out, _ = cli("runs", "--results", str(bench.root))
    assert status == 0
    assert re.search(rf"{job.spec.key[:8]} .* interrupted", out)


def test_a_query_answers_in_rows(cli, two, keys) -> None:
    at = ["--results", str(two)]
    sql = "select key, seed from records order by seed"
    lines = cli("runs", "query", sql, *at)[1].split()
    assert [w for w in lines if w in keys] == keys
    status, _, said = cli("runs", "query", "select no_such from records", *at)
    assert status == 2
    assert "no_such" in said
    assert "records has key" in said


@pytest.mark.parametrize("form", ["text", "md", "csv", "json"])
def test_a_comparison_has_four_forms(cli, two, keys, form) -> None:
    status, out, _ = cli("compare", *keys, "--results", str(two), "--format", form)
    assert status == 0
    if form == "json":
        assert json.loads(out)
    elif form == "csv":
        table = list(csv.reader(io.StringIO(out)))
        assert len({len(row) for row in table if row}) == 1
    elif form == "md":
        assert "| " in out
    assert "loss" in out


def test_a_comparison_can_be_drawn(cli, two, keys, tmp_path: Path) -> None:
    status, _, said = cli("compare", *keys, "--results", str(two), "--plot", "curve.png")
    assert status == 0, said
    assert (tmp_path / "curve.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "words",
    [
        ["compare", "zzzz"],
        ["runs", "show", "zzzz"],
        ["runs", "path", "zzzz"],
        ["export", "zzzz", "x"],
    ],
)
def test_a_run_that_is_not_there(cli, two, words) -> None:
    status, _, said = cli(*words, "--results", str(two))
    assert status == 2
    assert "'zzzz'" in said
    assert "effbench runs" in said


@pytest.mark.parametrize(
    "kind, name",
    [
        ("methods", "qdylora"),
        ("models", "tiny"),
        ("datasets", "arithmetic"),
        ("evaluators", "perplexity"),
        ("hardware", "cpu"),
        ("launchers", "slurm"),
        ("experiments", "qdylora_paper"),
        ("tables", "apt"),
    ],
)
def test_every_kind_can_be_listed_with_a_line_each(cli, kind, name) -> None:
    status, out, _ = cli("list", kind)
    assert status == 0
    lines = [line.split(maxsplit=1) for line in out.strip().splitlines()]
    assert name in [words[0] for words in lines]
    assert all(len(words) == 2 for words in lines), "a config without a line about it"
    assert cli("list", kind, name)[1].split()[0] == name


def test_a_page_says_source_settings_and_points(cli) -> None:
    out = cli("show", "method", "qdylora")[1]
    for part in ("QDyLoRA", "effbench train method=qdylora", "Points", "method.rank = 16"):
        assert part in out
    assert "evaluator.perplexity.split = test" in cli("show", "evaluator", "perplexity")[1]
    assert "hidden_size: 64" in cli("show", "model", "tiny")[1]
    assert "memory_gib: 30" in cli("show", "hardware", "v100-32gb")[1]


# -- handing on ------------------------------------------------------------------------------------


def test_an_export_is_a_new_folder_or_an_error(cli, two, keys, tmp_path: Path) -> None:
    at = ["--results", str(two)]
    status, _, said = cli("export", keys[0], "adapter", *at)
    assert status == 0
    assert "Written: adapter" in said
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2
    status, _, said = cli("export", keys[0], "adapter", *at)
    assert status == 2
    assert "adapter is there already" in said
    status, _, said = cli("export", keys[0], "other", "--point", "r9", *at)
    assert status == 2
    assert "has no point 'r9'" in said
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_exported_says_so_and_leaves_no_folder(cli, inline) -> None:
    assert cli("eval", *RUN)[0] == 0
    status, _, said = cli("export", "latest", "out")
    assert status == 2
    assert "made nothing to export" in said
    assert not Path("out").exists()


def test_a_campaign_says_what_it_would_take(cli: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = cli("table", "sorted_lora_mini", "--run", "--dry-run")
    assert status == 0
    first, shared, *arms = out.splitlines()
    assert first.startswith("At most ") and "training tokens" in first
    assert "experiment=sorted_lora_mini" in shared and "experiment=mini" in shared
    assert "Sorted-LoRA" in arms and any(x.startswith("  effbench train method=") for x in arms)
    assert not Path("results").exists()


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    code = "import time; time.sleep(0.3); from effbench.cli.main import main; main()"
    line = f"{sys.executable} -c '{code}' list methods | true"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.stderr == ""


@pytest.mark.parametrize("name", [*get_command(app).commands, "no-such", "--help"])  # type: ignore[attr-defined]
def test_a_command_is_the_same_without_the_others(name: str) -> None:
    alone, beside = (CliRunner().invoke(it, [name, "--help"]) for it in (_only([name, "x"]), app))
    assert (alone.exit_code, alone.output) == (beside.exit_code, beside.output)
    others = {c for c in get_command(_only([name])).commands if c != name}  # type: ignore[attr-defined]
    assert bool(others) == (name in ("no-such", "--help"))
