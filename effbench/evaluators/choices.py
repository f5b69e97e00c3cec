"""Accuracy on multiple-choice questions: the answer with the highest log-likelihood wins.

`accuracy` compares summed log-likelihoods, `accuracy_norm` divides them by the answer's bytes first
(the two scores of lm-eval's multiple-choice tasks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from effbench.errors import UserError
from effbench.evaluators.base import Evaluator, Result, Subject, by_length
from effbench.lazy import torch
from effbench.records import Metric, Outcomes
from effbench.schema import PositiveInt, digest

if TYPE_CHECKING:
    from effbench.datasets import Choice


@dataclass(frozen=True)
class Choices(Evaluator):
    """Multiple choice by log-likelihood on a split of the dataset."""

    split: str = "test"
    """Which split."""
    batch_tokens: PositiveInt = 1024
    """Largest batch, padding included, in tokens."""

    def run(self, subject: Subject) -> Result:
        """Return `accuracy` and `accuracy_norm` with intervals, and each item's outcome.

        Raises:
            UserError: When the dataset has no choices.
        """
        from effbench.stats import mean_interval

        examples = subject.data.examples(self.split)
        if subject.data.spec.kind != "choices":
            raise UserError(
                f"Evaluator choices needs a dataset with choices; {subject.data.spec.name!r} "
                f"is of kind {subject.data.spec.kind!r}.",
                "Leave it out: evaluator=perplexity",
            )
        flat = [(i, j) for i, e in enumerate(examples) for j in range(len(e.choices or []))]
        scores = self._scores(subject, [(examples[i].choices or [])[j] for i, j in flat])
        by_item: list[list[float]] = [[] for _ in examples]
        for (i, _), score in zip(flat, scores, strict=True):
            by_item[i].append(score)

        right, right_norm = [], []
        for example, item in zip(examples, by_item, strict=True):
            sizes = [c.answer_bytes for c in example.choices or []]
            normed = [s / b for s, b in zip(item, sizes, strict=True)]
            right.append(float(item.index(max(item)) == example.right))
            right_norm.append(float(normed.index(max(normed)) == example.right))

        result = Result()
        ids = digest([e.id for e in examples])
        for name, values in (("accuracy", right), ("accuracy_norm", right_norm)):
            mean, low, high = mean_interval(values, seed=subject.seed)
            result.metrics.append(
                Metric(name, mean, "", subject.point, self.split, len(values), low, high)
            )
            result.outcomes.append(
                Outcomes("choices", name, subject.point, self.split, ids, values)
            )
        return result

    def _scores(self, subject: Subject, choices: Sequence[Choice]) -> list[float]:
        """Return the summed log-likelihood of each answer."""

        scores = [0.0] * len(choices)
        done = 0
        with torch.inference_mode():
            for group in by_length([len(c.ids) for c in choices], self.batch_tokens):
                batch = subject.batch(
                    [
                        (c.ids, [-100] * c.prompt_length + c.ids[c.prompt_length :])
                        for c in (choices[i] for i in group)
                    ]
                )
                nll = subject.method.token_nll(subject.model, batch)
                for i, total in zip(group, nll.double().sum(1).tolist(), strict=True):
                    scores[i] = -total
                done += len(group)
                subject.progress("choices", done, len(choices))
        return scores
