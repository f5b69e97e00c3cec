"""Tuning: one grid for every arm, further where an end is best, chosen and charged by records."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from test_report import run

from effbench.api.spec import Plugin
from effbench.cli.tuning import tuning_in
from effbench.report.campaign import Campaign
from effbench.report.campaign_file import campaign_in
from effbench.report.campaign_table import rendered
from effbench.report.comparison.budgets import Tried
from effbench.report.comparison.select import Criterion, criterion_of
from effbench.report.tuned import chosen
from effbench.report.tuning import Point, Tuning, judged, trial_of, tunes
from effbench.results.records import Metric, Record, write
from effbench.results.tunings import Trials, read_trials, trials_file, tuned_together
from effbench.runner.tuning import search
from effbench.util.errors import UserError

RATES = {"train.learning_rate": [1e-3, 3e-3, 1e-2]}


def trial(key: int, *losses: float) -> Record:
    """A run of four minutes and 1,000 tokens, judged on validation at one point or several."""
    metrics = [
        Metric("loss", loss, "nats/token", f"r{n}" if len(losses) > 1 else "", "validation", 10)
        for n, loss in enumerate(losses)
    ]
    metrics += [
        Metric("train_tokens", 1000, "tokens"),
        Metric("phase_seconds", 240.0, "s", phase="train"),
    ]
    made = run("lora", {}, number=key, settings={"rate": key})
    return replace(made, metrics=metrics)


def searched(tuning: Tuning, loss: Callable[[float], float]) -> list[str]:
    """The words of all trials, with a loss that depends on the first setting."""
    seen: list[str] = []

    def one(words: str) -> Record:
        seen.append(words)
        return trial(len(seen), loss(float(words.split()[0].partition("=")[2])))

    assert list(search(tuning, one)) == seen
    return seen


def test_an_optimum_inside_the_grid_is_not_looked_beyond() -> None:
    assert len(searched(Tuning(RATES), lambda rate: abs(math.log(rate / 3e-3)))) == 3


@pytest.mark.parametrize(
    ("loss", "further"),
    [(lambda rate: -rate, ["0.0333", "0.111"]), (lambda rate: rate, ["0.000333", "0.000111"])],
    ids=["last", "first"],
)
def test_an_optimum_at_an_end_extends_the_grid(
    loss: Callable[[float], float], further: list[str]
) -> None:
    assert searched(Tuning(RATES), loss)[3:] == [f"train.learning_rate={x}" for x in further]
    assert len(searched(Tuning(RATES, extend=0), loss)) == 3, "no further than it may"


def test_a_grid_goes_on_only_until_the_optimum_is_inside() -> None:
    tried = searched(Tuning(RATES, extend=9), lambda rate: abs(math.log(rate / 0.04)))
    assert tried[-2:] == ["train.learning_rate=0.0333", "train.learning_rate=0.111"]


def test_two_settings_are_tried_in_all_combinations() -> None:
    tuning = Tuning({**RATES, "method.alpha": [0, 16]}, extend=1)
    assert len(tuning.grid()) == 6
    scores: dict[Point, float] = {p: p[1] + abs(math.log(p[0] / 3e-3)) for p in tuning.grid()}
    assert tuning.beyond(scores) == [(3e-3, -16)], "without a factor where a value is 0"


def test_the_score_is_of_the_best_point_or_of_all() -> None:
    record = trial(0, 1.0, 2.0)
    assert Tuning(RATES).score(record) == 1.0
    assert Tuning(RATES, at="mean").score(record) == 1.5
    assert Tuning(RATES).score(trial(0, math.nan)) == math.inf, "a run that diverged is last"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"over": {}}, "nothing to tune"),
        ({"over": {"a": [1.0]}}, "no grid"),
        ({"over": {"a": [2.0, 1.0]}}, "no grid"),
        ({"over": RATES, "metric": "loss@test"}, "reported"),
    ],
)
def test_what_cannot_be_tuned_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Tuning(**values)  # type: ignore[arg-type]


# -- arms --------------------------------------------------------------------------------------


def test_arms_that_train_are_tuned_unless_they_say_the_setting_themselves() -> None:
    tuning = Tuning(RATES)
    assert tunes(tuning, ["compress method=layer_drop", "train method=lora"])
    assert not tunes(tuning, ["train method=lora train.learning_rate=1e-3"])
    assert not tunes(tuning, ["eval"])


def test_a_trial_is_an_arm_up_to_its_training() -> None:
    steps = ["compress a=1", "train b=2", "eval c=3"]
    assert trial_of(steps, "train.learning_rate=0.01") == [
        "compress a=1",
        "train b=2 train.learning_rate=0.01",
    ]


def test_every_evaluator_of_a_trial_reads_the_rows_that_it_is_chosen_by() -> None:
    found = [Plugin(name, {"split": "test"}) for name in ("perplexity", "preference")]
    found.append(Plugin("speed", {"batch_size": 1}))
    by = criterion_of("loss@validation")
    assert judged(found, by, []) == [
        "evaluator.perplexity.split=validation",
        "evaluator.preference.split=validation",
    ]
    own = ["evaluator.preference.split=train"]
    assert judged(found, by, own) == ["evaluator.perplexity.split=validation"]


@pytest.mark.parametrize(
    ("metric", "evaluators", "own", "said", "hint"),
    [
        ("accuracy", ["perplexity"], "", "perplexity gives no accuracy", "evaluator=choices"),
        ("accuracy", [], "", "no evaluator is asked", "evaluator=choices"),
        ("perplexityy", ["choices"], "", "choices gives no", "Did you mean"),
        ("loss", ["perplexity"], "test", "reads other rows", "evaluator.perplexity.split=val"),
        ("decode_tokens_per_second", ["speed"], "", "reads other rows", "loss@validation"),
        ("loss", ["choices"], "", "", ""),
        ("accuracy_norm", ["perplexity", "choices"], "", "", ""),
    ],
)
def test_a_metric_that_no_trial_will_have_is_refused_before_the_first(
    metric: str, evaluators: list[str], own: str, said: str, hint: str
) -> None:
    found = [Plugin(name, {"split": "test"} if name != "speed" else {}) for name in evaluators]
    words = [f"evaluator.{e}.split={own}" for e in evaluators if own]
    if not said:
        assert judged(found, Criterion(metric, "validation"), words)
        return
    with pytest.raises(UserError, match=said) as caught:
        judged(found, Criterion(metric, "validation"), words)
    assert hint in caught.value.hint


def test_a_metric_that_trials_lack_is_answered_with_those_they_have() -> None:
    with pytest.raises(UserError, match="no accuracy on validation") as caught:
        Tuning({"a": [1.0, 2.0]}, "accuracy@validation").value(trial(1, 0.5))
    assert caught.value.hint.startswith("It has on validation: loss.")


def test_what_is_shown_of_a_trial_has_its_own_sign() -> None:
    tuning = Tuning(RATES, "accuracy@validation")
    record = replace(trial(1), metrics=[Metric("accuracy", -0.5, "", "", "validation", 10)])
    assert (tuning.value(record), tuning.score(record)) == (-0.5, 0.5)


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    """A tuned campaign of two arms, and its records."""
    runs = [run("lora", {"": 0.0}), run("full", {"": 0.3}, number=1)]
    trials = [trial(10, 2.0), trial(11, 1.0), trial(12, 1.5)]
    for record in [*runs, *trials]:
        write(record, tmp_path / "records")
    (tmp_path / "campaigns").mkdir()
    (tmp_path / "campaigns" / "ab.json").write_text(
        f'{{"The one": ["{runs[0].key}"], "The other": ["{runs[1].key}"]}}'
    )
    words = [f"train.learning_rate={rate}" for rate in ("0.001", "0.003", "0.01")]
    keys = dict(zip(words, [t.key for t in trials], strict=True))
    Trials({"The one": keys, "The other": keys}).write(trials_file(tmp_path, "ab"))
    (tmp_path / "ab.yaml").write_text(
        "# Is one as good?\nseeds: [0]\ntune: {over: {train.learning_rate: [1e-3, 3e-3, 1e-2]}}\n"
        "arms: {The one: [train method=lora], The other: [train method=full]}\n"
    )
    return campaign_in(tmp_path / "ab.yaml")


def test_a_table_says_what_was_chosen_and_what_it_cost(campaign: Campaign, tmp_path: Path) -> None:
    """Trials that arms have in common are charged once."""
    [line] = [x for x in rendered(campaign, tmp_path).splitlines() if x.startswith("Tuned")]
    assert line == (
        "Tuned: 3 trials each, by loss on validation, seed 1000: The one train.learning_rate=0.003;"
        " The other train.learning_rate=0.003. Cost of tuning: 3 runs, 3,000 tokens, 12.0 min "
        "training."
    )
    commands = campaign.tuned_arms(tmp_path)
    assert commands["The one"] == ["train method=lora train.learning_rate=0.003"]


def test_a_table_says_that_the_best_trial_is_at_an_end(campaign: Campaign, tmp_path: Path) -> None:
    write(trial(11, 3.0), tmp_path / "records")
    assert "0.01 (at the end of the grid)" in rendered(campaign, tmp_path)


def test_a_missing_trial_names_the_command(campaign: Campaign, tmp_path: Path) -> None:
    gone = next(iter(read_trials(trials_file(tmp_path, "ab")).runs()))
    (tmp_path / "records" / f"{gone}.json").unlink()
    with pytest.raises(UserError, match=f"Record {gone} of a trial") as caught:
        rendered(campaign, tmp_path)
    assert caught.value.hint == "Make it: effbench table ab --run"
    trials_file(tmp_path, "ab").write_text("[")
    with pytest.raises(UserError, match="cannot be read"):
        campaign.tuned(tmp_path)


def test_trials_are_counted_as_one_tuning(campaign: Campaign, tmp_path: Path) -> None:
    """Of other runs with other settings, which may be ablations, none is."""
    trials = [trial(10, 2.0), trial(11, 1.0), trial(12, 1.5)]
    ablation = run("lora", {}, number=20, settings={"rate": 20})
    known = [*trials, ablation]
    assert Tried(known, tuned_together(tmp_path)).of(trials[0]) == 3
    assert Tried(known).of(trials[0]) == 4


def test_the_best_of_equal_trials_is_the_first() -> None:
    keys = {"a=1": "x", "a=2": "y"}
    assert chosen(Tuning(RATES), keys, {"x": trial(1, 1.0), "y": trial(2, 1.0)}) == "a=1"


# -- the command -------------------------------------------------------------------------------


def test_words_with_several_values_are_the_grid() -> None:
    tuning, fixed = tuning_in(["method=lora", "train.learning_rate=3e-3,1e-3", "seed=2"])
    assert tuning.over == {"train.learning_rate": [1e-3, 3e-3]}
    assert (tuning.metric, fixed) == ("loss@validation", ["method=lora", "seed=2"])
    assert tuning_in(["my.yaml", "train.learning_rate=1e-3,3e-3"])[1] == ["my.yaml"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=lora"], "nothing to tune"),
        (["method=lora,qlora"], "no grid of numbers"),
        (["dataset.prompt={q}", "train.learning_rate=1e-3,2e-3"], "is not an override"),
        (["train.learning_rate=1e-3,1e-3"], "no grid"),
        (["train.learning_rate=1e-3,2e-3", "sweep.metric=loss@test"], "reported"),
        (["train.learning_rate=1e-3,2e-3", "seed=0,1"], "^seed is nothing to tune"),
    ],
)
def test_words_that_are_no_tuning_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tuning_in(words)
