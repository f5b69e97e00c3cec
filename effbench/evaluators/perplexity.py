"""Loss, perplexity and bits per byte of held-out text or answers.

Every item keeps its own outcome. The loss per token, L, is a ratio of two sums over items: of their
losses s and of their loss tokens n. The stored outcome of an item is L + (s - L n) / mean(n), the
linearisation of that ratio (Woodruff 1971). Its mean over the items is L itself, its spread is that
of L, and the difference between two runs on the same items is that of their losses per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from effbench.evaluators.base import Evaluator, Result, Subject, by_length
from effbench.lazy import torch
from effbench.records import Metric, Outcomes
from effbench.schema import PositiveInt, digest


@dataclass(frozen=True)
class Perplexity(Evaluator):
    """Teacher-forced loss on a split of the dataset."""

    headline: ClassVar[str] = "loss"

    split: str = "test"
    """Which split."""
    batch_tokens: PositiveInt = 1024
    """Largest batch, padding included, in tokens."""

    def run(self, subject: Subject) -> Result:
        """Return `loss` (nats per token), `perplexity` and `bits_per_byte` with intervals."""
        from effbench.stats import mean_interval

        examples = subject.data.examples(self.split)
        sums = [0.0] * len(examples)
        counts = [0] * len(examples)
        done = 0
        with torch.inference_mode():
            for group in by_length([len(e.ids) for e in examples], self.batch_tokens):
                batch = subject.batch([(examples[i].ids, examples[i].labels()) for i in group])
                nll = subject.token_nll(batch)
                tokens = (batch.labels[:, 1:] != -100).sum(1)
                for i, total, count in zip(
                    group, nll.double().sum(1).tolist(), tokens.tolist(), strict=True
                ):
                    sums[i], counts[i] = total, count
                done += len(group)
                subject.progress("perplexity", done, len(examples))

        tokens_per_item = sum(counts) / len(counts)
        ratio = sum(sums) / sum(counts)
        values = [
            ratio + (s - ratio * n) / tokens_per_item for s, n in zip(sums, counts, strict=True)
        ]
        loss, low, high = mean_interval(values, seed=subject.seed)
        bits = sum(counts) / math.log(2) / sum(e.answer_bytes for e in examples)

        def metric(name: str, unit: str, value: float, low: float, high: float) -> Metric:
            return Metric(name, value, unit, subject.point, self.split, len(values), low, high)

        return Result(
            [
                metric("loss", "nats/token", loss, low, high),
                metric("perplexity", "", math.exp(loss), math.exp(low), math.exp(high)),
                metric("bits_per_byte", "bits/byte", loss * bits, low * bits, high * bits),
                Metric(
                    "loss_tokens",
                    sum(counts),
                    "tokens",
                    subject.point,
                    self.split,
                    obtained="counted",
                ),
            ],
            [
                Outcomes(
                    "perplexity",
                    "loss",
                    subject.point,
                    self.split,
                    digest([e.id for e in examples]),
                    values,
                )
            ],
        )
