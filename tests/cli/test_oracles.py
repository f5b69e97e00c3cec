"""The oracles hold, and each of them fails when the number that it guards is broken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from effbench.api.spec import DatasetSpec
from effbench.cli.selfcheck import base, oracles
from effbench.cli.selfcheck.base import Check
from effbench.config.compose import compose
from effbench.evaluators.base import Result
from effbench.evaluators.subject import Subject
from effbench.methods.adapters.lora import LoRA
from effbench.nn.adapters.peft_lora import peft_adapters
from effbench.nn.decode import generate
from effbench.nn.losses import divergence, token
from effbench.nn.scoring.prefix_tree import Score
from effbench.resources.energy import Energy, Meter
from effbench.stats import Interval

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def sums() -> DatasetSpec:
    words = ["model=tiny", "dataset=arithmetic", "+dataset.limit.test=6"]
    return compose("eval", words).spec.dataset


@pytest.fixture
def made_up(sums: DatasetSpec, tmp_path: Path) -> DatasetSpec:
    return oracles.write_questions(sums, tmp_path / "questions.jsonl")


def failing(checks: Iterable[Check]) -> set[str]:
    return {c.name for c in checks if not c.passed}


def test_all_of_them_hold() -> None:
    checks = [check for _, check in base.run(["oracles"], short=True)]
    assert failing(checks) == set()
    text = " ".join(c.name for c in checks)
    for word in ("forgetting", "agreement", "kl", "flips", "speed", "energy", "bits", "match"):
        assert word in text


def test_there_are_more_identities_than_two() -> None:
    assert {"none", "lora", "full", "dylora", "lora_drop"} <= set(oracles.identities())


# -- what is broken fails ----------------------------------------------------------------------


def test_a_method_that_changes_something_forgets(sums: DatasetSpec, monkeypatch: Patch) -> None:
    prepare = LoRA.prepare

    def moved(self: LoRA, model: torch.nn.Module, ctx: Any) -> torch.nn.Module:
        model = prepare(self, model, ctx)
        for _, _, b in peft_adapters(model):
            torch.nn.init.constant_(b.weight, 0.01)
        return model

    monkeypatch.setattr(LoRA, "prepare", moved)
    assert "forgetting of lora" in failing(oracles.identity("lora", sums))


def _blurred(reference: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    return DIVERGENCES(reference, model + 1e-3 * torch.arange(model.shape[-1]))


def _turned(reference: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    return DIVERGENCES(model, reference)


DIVERGENCES = divergence.divergences


def test_a_blurred_divergence_is_found(sums: DatasetSpec, monkeypatch: Patch) -> None:
    monkeypatch.setattr(divergence, "divergences", _blurred)
    found = failing(oracles.identity("none", sums))
    assert {f"{name} of none" for name in ("kl", "js", "logit_mse", "answer_loyalty")} <= found


def test_a_turned_divergence_is_found(made_up: DatasetSpec, monkeypatch: Patch) -> None:
    assert oracles.distance(made_up).passed
    monkeypatch.setattr(divergence, "divergences", _turned)
    assert not oracles.distance(made_up).passed


def test_wrong_bytes_are_found(sums: DatasetSpec, monkeypatch: Patch) -> None:
    add = Result.add_ratio

    def wrong(
        self: Result, subject: Any, evaluator: str, metric: str, *rest: Any, **kw: Any
    ) -> Any:
        sums, counts, ids = rest
        if metric == "bits_per_byte":
            counts = [n + 1 for n in counts]
        return add(self, subject, evaluator, metric, sums, counts, ids, **kw)

    assert oracles.bits(sums).passed
    monkeypatch.setattr(Result, "add_ratio", wrong)
    assert not oracles.bits(sums).passed


def _negated(score: Callable[..., list[Score]]) -> Callable[..., list[Score]]:
    def negated(self: Subject, *words: Any) -> list[Score]:
        return [dataclasses.replace(s, loglikelihood=-s.loglikelihood) for s in score(self, *words)]

    return negated


def test_a_wrong_choice_is_found(made_up: DatasetSpec, monkeypatch: Patch) -> None:
    monkeypatch.setattr(Subject, "score", _negated(Subject.score))
    found = failing(oracles.forced(made_up))
    assert "accuracy of a model that says 'y'" in found


def test_a_shortened_answer_is_found(made_up: DatasetSpec, monkeypatch: Patch) -> None:
    whole = generate._generated

    def cut(*words: Any) -> generate.Generated:
        made = whole(*words)
        return dataclasses.replace(made, text=made.text[:-1])

    monkeypatch.setattr(generate, "_generated", cut)
    assert failing(oracles.forced(made_up)) == {"exact_match of a model that says 'y'"}


def test_a_wrong_loss_is_found(made_up: DatasetSpec, monkeypatch: Patch) -> None:
    nll = token.answer_nll
    monkeypatch.setattr(token, "answer_nll", lambda *words: 1.001 * nll(*words))
    assert failing(oracles.uniform(made_up)) == {"perplexity of a uniform model"}


def test_energy_that_does_not_add_up_is_found(monkeypatch: Patch) -> None:
    assert oracles.energy(0.05).passed

    class Doubled(Meter):
        @property
        def energy(self) -> Energy:
            found = super().energy
            return dataclasses.replace(found, joules=found.joules + 1)

    monkeypatch.setattr(oracles, "Meter", Doubled)
    assert not oracles.energy(0.05).passed


def test_a_biased_clock_is_found(monkeypatch: Patch) -> None:
    interleaved = oracles.interleaved

    def biased(*words: Any, **settings: Any) -> Any:
        found = interleaved(*words, **settings)
        return dataclasses.replace(found, speedup=Interval(1.1, 1.05, 1.2))

    monkeypatch.setattr(oracles, "interleaved", biased)
    assert not oracles.speed(3).passed
