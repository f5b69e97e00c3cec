"""Loss, perplexity and bits per byte of held-out text or answers.

A text is scored as a whole document, window after window where it is longer than one, so that each
of its tokens counts exactly once and none is predicted from another document. Every document keeps
its own outcome; see `Result.add_ratio` for what it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from effbench.api.schema import PositiveInt
from effbench.evaluators.base import Evaluator, Result, check_splits, exponential
from effbench.evaluators.subject import Subject
from effbench.results.records import Metric
from effbench.util.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from effbench.api.batch import Batch
    from effbench.api.examples import Example
    from effbench.api.footprint import Pass
    from effbench.api.shape import AnyShape
    from effbench.api.spec import Spec
    from effbench.data.dataset import Data
    from effbench.methods.base import Method


@dataclass(frozen=True)
class Perplexity(Evaluator):
    """Teacher-forced loss on a split of the dataset."""

    headline: ClassVar[str] = "loss"
    gives: ClassVar[tuple[str, ...]] = ("perplexity", "bits_per_byte")
    model_kinds: ClassVar[frozenset[str]] = frozenset({"causal", "seq2seq"})

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

    def check(self, spec: Spec, methods: Sequence[Method], shape: AnyShape | None) -> None:
        """Refuse windows that the model has no positions for, or that leave no context."""
        from effbench.evaluators.windows import check_sizes

        limit = spec.dataset.max_length
        check_sizes("evaluator.perplexity", self.window, self.stride, limit, shape)

    def passes(self, spec: Spec, data: Data | None = None) -> list[Pass]:
        """Return the batches of windows that it scores."""
        from effbench.evaluators.windows import passes, sizes

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
        sums, counts, parts = self._sums(subject, examples, split)
        ids, sizes = [e.id for e in examples], [e.answer_bytes for e in examples]
        bits = [s / math.log(2) for s in sums]

        def add(metric: str, values: list[float], over: list[int], unit: str) -> Metric:
            return result.add_ratio(
                subject, "perplexity", metric, values, over, ids, unit=unit, split=split
            )

        loss = add("loss", sums, counts, "nats/token")
        result.metrics.append(_perplexity(loss))
        add("bits_per_byte", bits, sizes, "bits/byte")
        result.metrics.append(
            Metric("loss_tokens", sum(counts), "tokens", loss.point, split, obtained="counted")
        )
        for name in dict.fromkeys(name for row in parts for name in row):
            found = [row.get(name, (0.0, 0)) for row in parts]
            if any(tokens for _, tokens in found):
                add(f"loss_{name}", [f[0] for f in found], [f[1] for f in found], "nats/token")

    def _sums(
        self, subject: Subject, examples: Sequence[Example], split: str = "test"
    ) -> tuple[list[float], list[int], list[dict[str, tuple[float, int]]]]:
        """Return each row's summed loss in nats, how many tokens it is over, and both by kind."""
        from effbench.evaluators.windows import check_sizes, cut, groups, sizes
        from effbench.results.journal import pending

        limit = subject.data.spec.max_length
        check_sizes("evaluator.perplexity", self.window, self.stride, limit, subject.shape)
        windows = cut(examples, *sizes(self.window, self.stride, limit), subject.data.model)
        journals = subject.journals(split, [w.name(examples[w.row]) for w in windows])
        own = journals[subject.point]
        for group, points in pending(journals, groups(windows, self.batch_tokens)):
            batch = subject.batch([windows[i].sequence(examples[windows[i].row]) for i in group])
            with torch.inference_mode():
                for point, nll in zip(points, subject.token_nlls(batch, points), strict=True):
                    kinds = subject.method.parts(subject.model, batch) if len(points) == 1 else {}
                    rows = _of_each(nll.double(), batch, kinds)
                    journals[point].add(dict(zip(group, rows, strict=True)))
            subject.progress("perplexity", len(own), len(windows))

        totals, counts = [0.0] * len(examples), [0] * len(examples)
        parts: list[dict[str, tuple[float, int]]] = [{} for _ in examples]
        for window, (nll, count, *kinds) in zip(windows, own.values(), strict=True):
            totals[window.row] += nll
            counts[window.row] += count
            for name, (part, many) in kinds[0].items() if kinds else ():
                before = parts[window.row].get(name, (0.0, 0))
                parts[window.row][name] = before[0] + part, before[1] + many
        return totals, counts, parts


def _of_each(nll: torch.Tensor, batch: Batch, kinds: Mapping[str, torch.Tensor]) -> list[list[Any]]:
    """Return each row's summed loss and tokens, and both by kind where its tokens are of kinds."""
    counted = batch.labels[:, 1:] != -100
    found: list[list[Any]] = [
        list(row) for row in zip(nll.sum(1).tolist(), counted.sum(1).tolist(), strict=True)
    ]
    for index, row in enumerate(found) if kinds else ():
        of_row = {name: mask[index] & counted[index] for name, mask in kinds.items()}
        row.append({n: [nll[index][m].sum().item(), m.sum().item()] for n, m in of_row.items()})
    return found


def _perplexity(loss: Metric) -> Metric:
    value, low, high = map(exponential, (loss.value, loss.low, loss.high))
    return Metric("perplexity", value, "", loss.point, loss.split, loss.n, low, high)
