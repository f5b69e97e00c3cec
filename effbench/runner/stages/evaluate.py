"""Evaluation of a model as it is, or of what an earlier run made."""

from __future__ import annotations

from effbench.runner.evaluation import evaluate
from effbench.runner.open import open_data, open_model
from effbench.runner.run import Bench, count_model, count_trained


def evaluate_only(bench: Bench) -> None:
    """Load and evaluate; nothing is changed and nothing is saved but the results."""
    data = open_data(bench)
    model = open_model(bench).requires_grad_(False)
    count_model(bench, model)
    count_trained(bench, model)
    evaluate(bench, model, data)
