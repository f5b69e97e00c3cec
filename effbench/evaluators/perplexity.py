"""Loss, perplexity and bits per byte of held-out text or answers.

A text is scored as a whole document, window after window where it is longer than one, so that each
of its tokens counts exactly once and none is predicted from another document. Every document keeps
its own outcome; see `Result.add_ratio` for what it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from effbench.evaluators.base import Evaluator, Result, Subject, check_splits
from effbench.lazy import torch
from effbench.records import Metric
from effbench.schema import PositiveInt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from effbench.datasets import Data, Example
    from effbench.footprint import Pass
    from effbench.methods.base import Method
    from effbench.shapes import Shape
    from effbench.spec import Spec


@dataclass(frozen=True)
class Perplexity(Evaluator):
    """Teacher-forced loss on a split of the dataset."""

    headline: ClassVar[str] = "loss"

    split: str | tuple[str, ...] = "test"
    """Which split, or a list of several."""
    window: PositiveInt | None = None
    """Most tokens that the model sees at once; null is the dataset's `max_length`."""
    stride: PositiveInt | None = None
    """Tokens that each window after a document's first one scores; null is half a window. Less is
    more context for each token, and more work."""
    batch_tokens: PositiveInt = 1024
    """Largest batch, padding included, in tokens."""

    def __post_init__(self) -> None:
        check_splits("evaluator.perplexity", self.split)

    def check(self, spec: Spec, methods: Sequence[Method], shape: Shape | None) -> None:
        """Refuse windows that the model has no positions for, or that leave no context."""
        from effbench.windows import check_sizes

        limit = spec.dataset.max_length
        check_sizes("evaluator.perplexity", self.window, self.stride, limit, shape)

    def passes(self, spec: Spec, data: Data | None = None) -> list[Pass]:
        """Return the batches of windows that it scores."""
        from effbench.windows import passes, sizes

        window, stride = sizes(self.window, self.stride, spec.dataset.max_length)
        return [
            one
            for split in self.splits()
            for one in passes(data, split, window, stride, self.batch_tokens)
        ]

    def run(self, subject: Subject) -> Result:
        """Return `loss` (nats per token), `perplexity` and `bits_per_byte` with intervals."""
        result = Result()
        for split in self.splits():
            self._add(result, subject, split)
        return result

    def _add(self, result: Result, subject: Subject, split: str) -> None:
        examples = subject.data.documents(split)
        sums, counts = self._sums(subject, examples, split)
        ids, sizes = [e.id for e in examples], [e.answer_bytes for e in examples]
        bits = [s / math.log(2) for s in sums]

        loss = result.add_ratio(
            subject, "perplexity", "loss", sums, counts, ids, unit="nats/token", split=split
        )
        result.metrics.append(_perplexity(loss))
        result.add_ratio(
            subject, "perplexity", "bits_per_byte", bits, sizes, ids, unit="bits/byte", split=split
        )
        result.metrics.append(
            Metric("loss_tokens", sum(counts), "tokens", loss.point, split, obtained="counted")
        )

    def _sums(
        self, subject: Subject, examples: Sequence[Example], split: str = "test"
    ) -> tuple[list[float], list[int]]:
        """Return each row's summed loss in nats, and how many tokens it is over."""
        from effbench.journal import pending
        from effbench.windows import check_sizes, cut, groups, sizes

        limit = subject.data.spec.max_length
        check_sizes("evaluator.perplexity", self.window, self.stride, limit, subject.shape)
        windows = cut(examples, *sizes(self.window, self.stride, limit))
        journals = subject.journals(split, [w.name(examples[w.row]) for w in windows])
        own = journals[subject.point]
        for group, points in pending(journals, groups(windows, self.batch_tokens)):
            batch = subject.batch([windows[i].sequence(examples[windows[i].row]) for i in group])
            with torch.inference_mode():
                found = subject.token_nlls(batch, points)
                sums = [nll.double().sum(1).tolist() for nll in found]
            tokens = (batch.labels[:, 1:] != -100).sum(1).tolist()
            for point, nll in zip(points, sums, strict=True):
                journals[point].add(dict(zip(group, zip(nll, tokens, strict=True), strict=True)))
            subject.progress("perplexity", len(own), len(windows))

        totals, counts = [0.0] * len(examples), [0] * len(examples)
        for window, (nll, count) in zip(windows, own.values(), strict=True):
            totals[window.row] += nll
            counts[window.row] += count
        return totals, counts


def _perplexity(loss: Metric) -> Metric:
    assert loss.low is not None
    assert loss.high is not None
    value, low, high = map(math.exp, (loss.value, loss.low, loss.high))
    return Metric("perplexity", value, "", loss.point, loss.split, loss.n, low, high)
