"""Evaluation of a model as it is, or of what an earlier run made."""

from __future__ import annotations

from effbench.runner.evaluation import evaluate
from effbench.runner.open import open_data, open_model
from effbench.runner.run import Run, count_model, count_trained, hold_against_plan


def perform(run: Run) -> None:
    """Load and evaluate; nothing is changed and nothing is saved but the results."""
    run.events.cut()
    data = open_data(run)
    opened = open_model(run)
    opened.model.requires_grad_(False)
    count_model(run, opened.model)
    count_trained(run, opened.model)
    evaluate(run, opened, data)
    hold_against_plan(run, opened.base, opened.base_bytes)
