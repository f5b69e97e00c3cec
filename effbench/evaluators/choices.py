"""Accuracy on multiple-choice questions: the answer with the highest log-likelihood wins.

`accuracy` compares summed log-likelihoods, `accuracy_norm` divides them by the answer's bytes first
(the two scores of lm-eval's multiple-choice tasks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from effbench.errors import UserError
from effbench.evaluators.base import Evaluator, Result, Subject
from effbench.methods.base import Method
from effbench.schema import PositiveInt

if TYPE_CHECKING:
    from effbench.datasets import Choice
    from effbench.shapes import Shape
    from effbench.spec import Spec


@dataclass(frozen=True)
class Choices(Evaluator):
    """Multiple choice by log-likelihood on a split of the dataset."""

    headline: ClassVar[str] = "accuracy"

    split: str = "test"
    """Which split."""
    batch_tokens: PositiveInt = 1024
    """Largest batch, padding included, in tokens."""

    def check(self, spec: Spec, methods: Sequence[Method], shape: Shape | None) -> None:
        """Refuse a dataset without choices."""
        if spec.dataset.kind != "choices":
            raise UserError(
                f"Evaluator choices needs a dataset with choices; {spec.dataset.name!r} "
                f"is of kind {spec.dataset.kind!r}.",
                "Leave it out: evaluator=perplexity",
            )

    def run(self, subject: Subject) -> Result:
        """Return `accuracy` and `accuracy_norm` with intervals, and each item's outcome."""
        examples = subject.data.examples(self.split)
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
        ids = [e.id for e in examples]
        for name, values in (("accuracy", right), ("accuracy_norm", right_norm)):
            result.add_items(subject, "choices", name, values, ids, split=self.split)
        return result

    def _scores(self, subject: Subject, choices: Sequence[Choice]) -> list[float]:
        """Return the summed log-likelihood of each answer."""
        from effbench.nn.scoring import Request

        requests = [Request(c.ids[: c.prompt_length], c.ids[c.prompt_length :]) for c in choices]
        scores = subject.score(requests, self.split, self.batch_tokens)
        return [s.loglikelihood for s in scores]
