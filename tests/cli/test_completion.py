from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from effbench.cli.completion import complete, complete_after, leave_room_for_values, run_keys
from effbench.config.files import keys_of, options

KEYS = ["aaaa0000aaaa0000", "bbbb0000bbbb0000"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def runs(folder: Path) -> None:
    (folder / "results" / "records").mkdir(parents=True)
    for key in KEYS:
        (folder / "results" / "records" / f"{key}.json").touch()


@pytest.mark.parametrize(
    "typed, found",
    [
        ("met", ["method="]),
        ("se", ["seed="]),
        ("tr", ["train."]),
        ("method=q", ["method=qdylora", "method=qlora"]),
        ("launcher=s", ["launcher=slurm"]),
        ("method.trunc", ["method.truncation="]),
        ("train.max", ["train.max_steps="]),
        ("run.tr", ["run.tracker="]),
        ("evaluator.perplexity.s", ["evaluator.perplexity.split=", "evaluator.perplexity.stride="]),
        ("hydra", []),
        ("nothing", []),
        ("nothing.", []),
        ("seed=", []),
        ("from=", ["from=latest"]),
    ],
)
def test_what_a_word_can_become(typed: str, found: list[str]) -> None:
    assert complete(typed) == found


def test_every_method_and_every_setting_can_be_completed() -> None:
    assert complete("method=") == [f"method={n}" for n in options("method")]
    keys = {k for n, p in options("method").items() for k in keys_of("method", n, p)}
    assert complete("method.") == [f"method.{k}=" for k in sorted(keys)]


@pytest.mark.usefixtures("runs")
def test_runs_can_be_completed() -> None:
    assert run_keys("") == KEYS
    assert run_keys("bb") == KEYS[1:]
    assert complete("from=a") == ["from=aaaa0000aaaa0000"]
    assert complete("from=l") == ["from=latest"]


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("words", [["run.results=other"], ["run.results", "=", "other"]])
def test_runs_are_those_of_the_folder_that_is_named(
    words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "results").rename(folder / "other")
    assert complete_after(words, "from=a") == ["from=aaaa0000aaaa0000"]
    assert complete("from=a") == []
    monkeypatch.setenv("EFFBENCH_RESULTS", "other")
    assert complete("from=a") == ["from=aaaa0000aaaa0000"]
    assert run_keys("b") == KEYS[1:]


@pytest.mark.parametrize(
    "words, typed, found",
    [
        (["method", "="], "q", ["qdylora", "qlora"]),
        (["seed", "=", "1", "method", "="], "q", ["qdylora", "qlora"]),
        (["launcher"], "", ["joblib", "local", "ray", "slurm"]),
        (["seed=1"], "method=q", ["method=qdylora", "method=qlora"]),
        (["seed=1"], "met", ["method="]),
        ([], "met", ["method="]),
    ],
)
def test_bash_takes_an_equals_sign_for_a_word(words, typed, found) -> None:
    assert complete_after(words, typed) == found


def test_after_a_whole_word_anything_can_come() -> None:
    assert complete_after(["seed=1"], "") == complete("")
    assert complete_after([], "") == complete("")


@pytest.mark.parametrize(
    ("found", "said"), [("method=", "nospace"), ("train.", "nospace"), ("method=lora", "")]
)
def test_bash_puts_no_space_behind_what_asks_for_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch, found: str, said: str
) -> None:
    from typer import _completion_shared as shared

    monkeypatch.setattr(shared, "_completion_scripts", dict(shared._completion_scripts))
    leave_room_for_values()
    script = shared.get_completion_script(prog_name="effbench", complete_var="_X", shell="bash")
    stub = folder / "effbench"
    stub.write_text(f"#!/bin/sh\necho {found}\n")
    stub.chmod(0o755)
    lines = f"{script}\ncompopt() {{ echo nospace; }}\n_effbench_completion {stub} x"
    done = subprocess.run(["bash", "-c", lines], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == said
