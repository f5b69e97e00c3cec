"""How often a model scores the preferred answer above the others.

The score is the method's own: the reward of a reward model, and of any other model the
log-likelihood of the answer, which makes the untrained model a baseline on the same pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from effbench.api.batch import by_length, collate
from effbench.api.schema import PositiveInt
from effbench.evaluators.base import Evaluator, Result, check_splits
from effbench.evaluators.subject import Subject
from effbench.nn.scoring import finite
from effbench.util.errors import UserError
from effbench.util.lazy import torch

if TYPE_CHECKING:
    from effbench.api.examples import Example
    from effbench.api.footprint import Pass
    from effbench.api.shape import AnyShape
    from effbench.api.spec import Spec
    from effbench.data.dataset import Data
    from effbench.methods.base import Method


@dataclass(frozen=True)
class Preference(Evaluator):
    """Pair accuracy on a split of preference pairs, or of questions with choices."""

    headline: ClassVar[str] = "pair_accuracy"
    model_kinds: ClassVar[frozenset[str]] = frozenset({"causal", "classifier", "masked"})
    gives: ClassVar[tuple[str, ...]] = ("top_accuracy", "score_margin", "answer_loss")
    version: ClassVar[int] = 3

    split: str | tuple[str, ...] = "test"
    """Which split, or a list of several."""
    batch_tokens: PositiveInt = 2048
    """Largest batch, padding included, in tokens."""

    def __post_init__(self) -> None:
        check_splits("evaluator.preference", self.split)

    def check(self, spec: Spec, methods: Sequence[Method], shape: AnyShape | None) -> None:
        """Refuse rows without an answer that is worse than another."""
        from effbench.data.kinds.base import find

        kind = find(spec.dataset.kind)
        if not (kind.choices or kind.rates):
            raise UserError(
                f"Evaluator preference compares answers; dataset {spec.dataset.called!r} is of "
                f"kind {spec.dataset.kind!r}.",
                "Leave it out, or use dataset.kind=preference or choices.",
            )

    def check_data(self, data: Data, shape: AnyShape | None) -> None:
        """Refuse rated answers without a pair among them."""
        for split in self.splits():
            if not _pairs(data, split):
                raise UserError(
                    f"Evaluator preference compares answers, and no row of split {split!r} of "
                    f"dataset {data.spec.called!r} has two.",
                    "Put pairs (chosen and rejected) among them, or leave it out.",
                )

    def passes(self, spec: Spec, data: Data | None = None) -> list[Pass]:
        """Return the batches of all answers that it scores."""
        from effbench.api.footprint import Pass

        if data is None:
            return [Pass("score", 1, self.batch_tokens, self.batch_tokens)]
        found = []
        for split in self.splits():
            units = [e.compared() for e in _pairs(data, split)]
            for group in _groups(units, self.batch_tokens):
                members = [units[i] for i in group]
                rows = sum(len(e.sequences) for e in members)
                counted = sum(e.loss_tokens for e in members)
                found.append(Pass("score", rows, max(e.longest for e in members), counted))
        return found

    def run(self, subject: Subject) -> Result:
        """Return `pair_accuracy` (ties count half), `top_accuracy`, margin and loss, by item."""
        result = Result()
        for split in self.splits():
            examples = _pairs(subject.data, split)
            scores = self._scores(subject, [e.compared() for e in examples], split)
            ids = [e.id for e in examples]
            for name, unit, values in (
                ("pair_accuracy", "", [_won(row) for row in scores]),
                ("top_accuracy", "", [float(row[0] > max(row[1:])) for row in scores]),
                ("score_margin", "", [row[0] - sum(row[1:]) / len(row[1:]) for row in scores]),
                ("answer_loss", "nats", [_surprise(row) for row in scores]),
            ):
                result.add_items(subject, "preference", name, values, ids, unit=unit, split=split)
        return result

    def _scores(self, subject: Subject, units: Sequence[Example], split: str) -> list[list[float]]:
        """Return the score of each answer, the right one first."""
        journal = subject.journal(split, [e.id for e in units])
        for group in journal.pending(_groups(units, self.batch_tokens)):
            batch = collate([units[i] for i in group], subject.pad_token_id).to(subject.device)

            run = partial(subject.method.scores, subject.model, batch, subject.point)
            with torch.inference_mode():
                scores = run()
                finite.require_finite(subject.model, scores, run)
            rows = scores.double().split(batch.sizes)
            journal.add({i: row.tolist() for i, row in zip(group, rows, strict=True)})
            subject.progress("preference", len(journal), len(units))
        return list(journal.values())


def _pairs(data: Data, split: str) -> list[Example]:
    """Return the rows with an answer that is worse than another; of most kinds all have one."""
    return [e for e in data.examples(split) if len(e.choices) != 1]


def _groups(units: Sequence[Example], batch_tokens: int) -> list[list[int]]:
    return list(by_length([e.longest * len(e.sequences) for e in units], batch_tokens))


def _won(scores: Sequence[float]) -> float:
    """Return the share of the other answers that the first one is scored above; a tie is half."""
    first, *others = scores
    return sum(1.0 if first > o else 0.5 if first == o else 0.0 for o in others) / len(others)


def _surprise(scores: Sequence[float]) -> float:
    """Return -log of the first answer's share in the softmax of scores, in nats."""
    most = max(scores)
    return most - scores[0] + math.log(sum(math.exp(score - most) for score in scores))
