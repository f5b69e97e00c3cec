from __future__ import annotations

import time
from pathlib import Path

import pytest

from effbench.runner.grid.words import check_size, is_launched, jobs_in, listed, points, spelled_out
from effbench.util.errors import UserError


@pytest.fixture
def own(tmp_path: Path) -> list[Path]:
    """Return a folder of one's own configs, with a grid."""
    (tmp_path / "sweep").mkdir()
    text = "# Mine\ncommand: train\nwords: [method=lora, 'method.rank=2,4', seed=0]\n"
    (tmp_path / "sweep" / "mine.yaml").write_text(text)
    return [tmp_path]


def test_a_grid_has_a_name_and_typed_words_stand_for_those_of_its_config(own) -> None:
    words = ["method=lora", "method.rank=2,4", "seed=0"]
    assert spelled_out("train", ["sweep=mine"], own) == ("mine", words)
    _, words = spelled_out("train", ["seed=1,2", "sweep=mine", "sweep.jobs=2"], own)
    assert words == ["method=lora", "method.rank=2,4", "seed=1,2", "sweep.jobs=2"]
    assert spelled_out("train", ["seed=1"]) == ("", ["seed=1"])
    assert "method=lora" in spelled_out("train", ["sweep=lora_rates"])[1]


@pytest.mark.parametrize(
    ("stage", "name", "part"),
    [("train", "mien", "Did you mean 'mine'"), ("eval", "mine", "effbench train -m sweep=mine")],
)
def test_a_grid_that_is_not_there_or_of_another_command(stage, name, part, own) -> None:
    with pytest.raises(UserError) as caught:
        spelled_out(stage, [f"sweep={name}"], own)
    assert part in str(caught.value)


@pytest.mark.parametrize("text", ["words: 3", "[]", "words: [1, 2]", "", "words: {a: b}"])
def test_a_grid_without_words_is_refused(text: str, own) -> None:
    (own[0] / "sweep" / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml lists no words"):
        spelled_out("train", ["sweep=mine"], own)


def test_ranges_choices_and_globs_are_listed(own) -> None:
    assert points(["seed=range(1,4)"]) == [["seed=1"], ["seed=2"], ["seed=3"]]
    assert points(["seed=choice(5,7)", "method.rank=2"]) == [
        ["seed=5", "method.rank=2"],
        ["seed=7", "method.rank=2"],
    ]
    [word] = listed(["method=glob([*lora],exclude=[q*])"])
    found = points([word])
    assert found and ["method=lora"] in found and ["method=qlora"] not in found
    assert points(["train.learning_rate=interval(1e-4,1e-2)"]) is None
    with pytest.raises(UserError, match="fits nothing"):
        listed(["method=glob(lroa*)"])
    assert listed(["seed=1", "'=glob("]) == ["seed=1", "'=glob("]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["seed=range(3,3)"], r"seed=range\(3,3\) has no value"),
        (["seed=range(100000)"], "The grid has 100,000 runs"),
        (["seed=range(0,10000000000)", "method.rank=2,4"], "The grid has 20,000,000,000 runs"),
        (["train.warmup=range(0.1,0.9,0.0001)"], "The grid has 8,00"),
    ],
)
def test_a_grid_of_no_runs_or_too_many_is_refused_at_once(words: list[str], part: str) -> None:
    begun = time.process_time()
    with pytest.raises(UserError, match=part):
        check_size(words, agreed=False)
    assert time.process_time() - begun < 1


def test_many_runs_can_be_asked_for() -> None:
    check_size(["seed=range(100000)"], agreed=True)
    check_size(["seed=range(0,2000)", "seed=1"], agreed=False)
    check_size(["train.learning_rate=interval(1e-4,1e-2)"], agreed=False)


def test_how_many_go_on_at_once() -> None:
    assert jobs_in(["seed=1", "sweep.jobs=3"]) == (3, ["seed=1"])
    assert jobs_in(["seed=1"]) == (1, ["seed=1"])
    for wrong in ("0", "-1", "two", "", "99999"):
        with pytest.raises(UserError, match=f"sweep.jobs={wrong} is not possible"):
            jobs_in([f"sweep.jobs={wrong}"])


@pytest.mark.parametrize(
    ("words", "launched"),
    [
        (["seed=0,1", "experiment=qdylora"], False),
        (["launcher=local"], False),
        (["launcher=joblib"], True),
        (["hydra/sweeper=optuna"], True),
        (["experiment=far"], True),
        (["experiment=qdylora,far"], True),
    ],
)
def test_what_needs_hydra_to_run_it_is_known(words: list[str], launched: bool, own) -> None:
    (own[0] / "experiment").mkdir()
    text = "# @package _global_\ndefaults: [override /hydra/launcher: joblib]\n"
    (own[0] / "experiment" / "far.yaml").write_text(text)
    assert is_launched(words, own) is launched
