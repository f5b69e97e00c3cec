"""Campaigns: what they begin with, what is tried for each arm, and what is run at the end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from effbench.api.spec import Job
from effbench.config.compose import compose
from effbench.report.campaign_file import campaign_in
from effbench.results.records import SCHEMA, Metric, Record, write
from effbench.results.store import MARKER, Store
from effbench.runner import campaign
from effbench.runner.ahead import ahead
from effbench.util.errors import UserError

TEXT = """# Is one as good?
experiment: sorted_lora_mini
start: mini
seeds: [0]
tune: {over: {train.learning_rate: [1e-3, 3e-3, 1e-2]}, extend: 1}
arms:
  Tuned: [train method=lora, 'eval method.eval_ranks=[1]']
  Fixed: [train method=lora train.learning_rate=1e-2]
  Untouched: [eval]
"""


def finished(job: Job) -> Record:
    """A run without weights, whose loss falls with its learning rate."""
    run = Store(Path(job.runtime.results)).run(job.spec.key)
    run.create(job.spec)
    (run.path / MARKER).write_text("1\n")
    loss = Metric("loss", -float(job.spec.train.learning_rate or 0), "nats/token", "", "validation")
    spec = json.loads((run.path / "spec.json").read_text())
    own = Record(SCHEMA, run.key, "", job.spec.stage, spec, {}, job.spec.parent, "", 1.0, [loss])
    write(own, Path(job.runtime.results) / "records")
    return own


def test_a_command_that_does_not_go_on_from_the_start_is_said_before_any_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ab.yaml").write_text(TEXT.replace("[eval]", "[eval method=none]"))
    found, made = campaign_in(tmp_path / "ab.yaml"), list[Job]()
    monkeypatch.setattr(campaign, "execute", lambda job: made.append(job) or finished(job))
    with pytest.raises(UserError, match="already fixes the method"):
        campaign.run(found, tmp_path, lambda line: None)
    assert [job.spec.model.name for job in made] == ["mini"]


def test_all_arms_begin_with_the_start_and_have_the_best_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ab.yaml").write_text(TEXT)
    found, made = campaign_in(tmp_path / "ab.yaml"), list[Job]()
    monkeypatch.setattr(campaign, "execute", lambda job: made.append(job) or finished(job))
    campaign.run(found, tmp_path, lambda line: None)
    assert not any(job.runtime.progress for job in made)
    start, *trials, tuned, read_out, fixed, untouched = [job.spec for job in made]
    assert (start.model.name, start.method.name) == ("mini", "full")
    assert [spec.parent for spec in (tuned, fixed, untouched)] == [start.key] * 3
    assert read_out.parent == tuned.key, "each line goes on from the one before it"
    rates = [spec.train.learning_rate for spec in trials]
    assert rates == [1e-3, 3e-3, 1e-2, 0.0333], "the best is at the end, which is extended once"
    assert {spec.seed for spec in trials} == {1000} and tuned.seed == 0
    splits = {str(spec.evaluators[0].settings["split"]) for spec in trials}
    assert splits == {"validation"}, "trials see no row that is reported"
    assert (tuned.train.learning_rate, fixed.train.learning_rate) == (0.0333, 1e-2)
    assert untouched.dataset.name == "papers"
    noted = json.loads((tmp_path / "campaigns" / "ab.json").read_text())
    assert list(noted.values()) == [[read_out.key], [fixed.key], [untouched.key]]
    campaign.run(found, tmp_path, lambda line: None)
    again = [job.spec.key for job in made[len(trials) + 5 :]]
    assert again == [start.key], "nothing is run twice; its start is only asked for"


def test_the_most_that_it_takes_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ab.yaml").write_text(TEXT)
    said = list[str]()
    monkeypatch.setattr(campaign, "execute", lambda job: pytest.fail("began") or finished(job))
    with pytest.raises(pytest.fail.Exception, match="began"):
        campaign.run(campaign_in(tmp_path / "ab.yaml"), tmp_path, said.append)
    trained, start = 6 * 120 * 2 * 256, 2200 * 8 * 256
    assert said[0] == (
        f"At most 9 runs (4 of them trials) and {trained + start:,} training tokens. "
        "What is finished is not run again."
    ), "three trials and one beyond, two arms that train, one read out, one untouched, the start"


def test_in_a_terminal_each_run_shows_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ab.yaml").write_text("# Q?\nexperiment: mini\nseeds: [0]\narms: {A: [train]}")
    made = list[Job]()
    monkeypatch.setattr(campaign, "execute", lambda job: made.append(job) or finished(job))
    monkeypatch.setattr(campaign.sys.stderr, "isatty", lambda: True)
    campaign.run(campaign_in(tmp_path / "ab.yaml"), tmp_path, lambda line: None)
    assert [job.runtime.progress for job in made] == [True]


def test_a_run_of_two_arms_counts_once_and_bad_words_are_refused_before_any_run(
    tmp_path: Path,
) -> None:
    shared = (
        "arms: {A: [train], B: [train, 'eval method=none'], C: [compress method=gqa, train %s]}"
    )
    path = tmp_path / "ab.yaml"
    path.write_text(
        f"# Q?\nexperiment: sorted_lora_mini\nseeds: [0, 1]\n{shared % 'train.epochs=1'}"
    )
    taken = ahead(campaign_in(path), tmp_path)
    assert (taken.trials, taken.others, taken.uncounted) == (0, 8, 2)
    assert taken.tokens == 2 * 120 * 2 * 256
    assert "and 2 runs of unknown length" in taken.sentence()
    finished(compose(None, ["experiment=mini", f"run.results={tmp_path}"]))
    path.write_text("# Q?\nexperiment: sorted_lora_mini\nseeds: [0]\narms: {A: [train from=mini]}")
    assert ahead(campaign_in(path), tmp_path).tokens == 120 * 2 * 256, "a run of that folder"
    path.write_text("# Q?\nexperiment: mini\nseeds: [0]\narms: {A: [train method.rang=4]}")
    with pytest.raises(UserError, match="rang"):
        ahead(campaign_in(path), tmp_path)


def test_a_run_is_named_by_its_experiment(tmp_path: Path) -> None:
    words = ["from=mini", "method=lora", "dataset=papers", f"run.results={tmp_path}"]
    with pytest.raises(UserError, match="experiment=mini") as caught:
        compose("train", words)
    assert caught.value.hint == "Make it: effbench train experiment=mini"
    job = compose(None, ["experiment=mini", f"run.results={tmp_path}"])
    finished(job)
    assert compose("train", words).spec.parent == job.spec.key
    other = replace(job, spec=replace(job.spec, seed=1))
    finished(other)
    assert compose("train", words).spec.parent == job.spec.key, "a run of another seed is another"
