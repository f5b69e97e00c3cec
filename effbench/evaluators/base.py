"""What an evaluator is: a frozen dataclass of settings that turns a model into metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from effbench.api.batch import by_length
from effbench.api.footprint import HEAD_ROWS, Pass
from effbench.api.schema import digest
from effbench.evaluators.subject import Subject
from effbench.methods.base import Method
from effbench.results.bounds import bounds_of
from effbench.results.records import Metric, Outcomes
from effbench.util.errors import UserError

if TYPE_CHECKING:
    from effbench.api.shape import AnyShape
    from effbench.api.spec import DatasetSpec, Spec
    from effbench.data.dataset import Data
    from effbench.data.overlap import Trained


LARGEST_EXPONENT = 709.0
"""Of which e to it is still a finite double."""


@dataclass
class Result:
    """Metrics of one evaluator at one operating point, and the outcome of every item."""

    metrics: list[Metric] = field(default_factory=list)
    outcomes: list[Outcomes] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Sentences for the record."""

    def add_items(
        self,
        subject: Subject,
        evaluator: str,
        metric: str,
        values: Sequence[float],
        ids: Sequence[str],
        *,
        unit: str = "",
        split: str = "",
        task: str = "",
        clusters: Sequence[int] = (),
        bounds: tuple[float, float] | None = None,
    ) -> Metric:
        """Add the mean over items with its interval, and the items themselves.

        Args:
            subject: Gives the operating point and the seed of the resampling.
            evaluator: Name of the evaluator.
            metric: Name of the metric.
            values: One outcome per item.
            ids: One id per item, in the same order.
            unit: Unit of a value.
            split: Split of the data.
            task: Benchmark task, if the evaluator brought one along.
            clusters: Group of each item, where items are not independent.
            bounds: What the mean can be at all; None takes what is known of the metric's name.
        """
        from effbench.stats import mean_interval

        limits = bounds_of(metric) if bounds is None else bounds
        mean, low, high = mean_interval(values, seed=subject.seed, clusters=clusters, bounds=limits)
        head = Metric(
            metric, mean, unit, subject.point.name, split, len(values), low, high, task=task
        )
        self.metrics.append(head)
        self.outcomes.append(
            Outcomes(
                evaluator,
                metric,
                subject.point.name,
                split,
                digest(list(ids)),
                list(values),
                task,
                list(clusters),
            )
        )
        return head

    def add_ratio(
        self,
        subject: Subject,
        evaluator: str,
        metric: str,
        sums: Sequence[float],
        counts: Sequence[float],
        ids: Sequence[str],
        *,
        unit: str = "",
        split: str = "",
        bounds: tuple[float, float] | None = None,
    ) -> Metric:
        """Add a ratio of two sums over items, such as a loss per token, and the items themselves.

        The outcome of an item is the linearised ratio R + (s - R n) / mean(n) (Woodruff 1971). Its
        mean over the items is R itself, its spread is that of R, and the difference between two
        runs on the same items is that of their ratios.

        Args:
            subject: As for `add_items`.
            evaluator: Name of the evaluator.
            metric: Name of the metric.
            sums: Of each item, s.
            counts: What each item's sum is over, n; not all zero.
            ids: One id per item, in the same order.
            unit: Unit of the ratio.
            split: Split of the data.
            bounds: As for `add_items`.
        """
        ratio = sum(sums) / sum(counts)
        size = sum(counts) / len(counts)
        values = [ratio + (s - ratio * n) / size for s, n in zip(sums, counts, strict=True)]
        head = self.add_items(
            subject, evaluator, metric, values, ids, unit=unit, split=split, bounds=bounds
        )
        self.metrics[-1] = replace(head, value=ratio)
        return self.metrics[-1]


@dataclass(frozen=True)
class Evaluator:
    """Base of all evaluators."""

    name: ClassVar[str] = ""
    """The name of its file and its config; set by the registry."""
    headline: ClassVar[str] = ""
    """The metric that it is there for, zero or more; the contract tests look for it."""
    gives: ClassVar[tuple[str, ...]] = ()
    """Further metrics, by which it is named where somebody asks for one that nobody measured."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Metrics that come along and can be chosen by, which other evaluators are there for."""
    version: ClassVar[int] = 1
    """Raised when the same settings would give other numbers; from then on in the key."""
    itemwise: ClassVar[bool] = True
    """Whether it works item by item through `Subject.journal`, so that it resumes at an item."""
    needs_model: ClassVar[bool] = True
    """Whether it asks a loaded model; a `Simulator` does not."""
    model_kinds: ClassVar[frozenset[str]] = frozenset({"causal"})
    """Kinds of models that it can ask, files in `nn/model_kinds`."""
    trial: ClassVar[dict[str, Any]] = {}
    """Settings with which it takes a moment on a tiny model, for the contract tests."""

    @classmethod
    def suited(cls, dataset: DatasetSpec) -> dict[str, Any]:
        """Return settings that suit a dataset, in the place of defaults that nobody changed.

        Args:
            dataset: Of the run.
        """
        return {}

    def remark(self, dataset: DatasetSpec) -> str:
        """Return what is to be said where it asks something else than a dataset; empty for none."""
        return ""

    def check(self, spec: Spec, methods: Sequence[Method], shape: AnyShape | None) -> None:
        """Refuse what cannot be evaluated, before any weight is loaded.

        Args:
            spec: The run.
            methods: The methods that make what is evaluated, first to last.
            shape: The model's shape; None when it can be known only after a download.

        Raises:
            UserError: When the evaluator does not apply, with what to change.
        """

    def check_data(self, data: Data, shape: AnyShape | None) -> None:
        """Refuse rows that it or the model cannot take, before a weight is loaded.

        Args:
            data: The run's own, with the model's tokenizer.
            shape: As for `check`.

        Raises:
            UserError: With what to change.
        """

    def splits(self) -> tuple[str, ...]:
        """Return the splits of the run's dataset that it reads."""
        split: str | Sequence[str] = getattr(self, "split", "")
        named = (split,) if isinstance(split, str) else tuple(split)
        return tuple(name for name in named if name)

    def sealed(self) -> Evaluator:
        """Return itself with a hash of the local files that it reads, so that they are in the key.

        Raises:
            UserError: When a file is missing.
        """
        return self

    def others(self) -> tuple[str, ...]:
        """Return the config names of the other models that it loads: what they are is in the key.

        No other can be loaded.
        """
        return ()

    def holds(self, spec: Spec) -> tuple[str, ...]:
        """Return the config names of the other models that are in memory while it asks.

        An empty name is the dense model that the run started from.
        """
        return ()

    def context(self) -> int:
        """Return the longest context that its settings ask for, in tokens.

        Default: the largest `prompt_tokens` and, behind them, the largest `new_tokens`.
        """
        return _largest(self, "prompt_tokens") + _largest(self, "new_tokens")

    def libraries(self) -> tuple[str, ...]:
        """Return the modules that it imports to ask a model, so that no peak counts them.

        Default: lm-eval's, where it has `tasks`.
        """
        return ("lm_eval.tasks", "datasets") if getattr(self, "tasks", ()) else ()

    def overlap(self, dataset: DatasetSpec, rows: Trained) -> str:
        """Return what of its own data was trained on, `rows` of `dataset`; empty for none."""
        return ""

    def run(self, subject: Subject) -> Result:
        """Return what was measured.

        Raises:
            UserError: When the evaluator does not apply to the data or the model.
        """
        raise NotImplementedError

    def passes(self, spec: Spec, data: Data | None = None) -> list[Pass]:
        """Return the largest passes that it makes, for the prediction of its peak.

        Default: batches of `batch_tokens` that are scored whole, as the split has them where the
        data is given; `batch_size` prompts of `prompt_tokens` and `new_tokens` after them.
        """
        found = []
        if budget := getattr(self, "batch_tokens", 0):
            for split in self.splits() or ("",):
                found += scored(data, split, budget)
        if prompt := getattr(self, "prompt_tokens", 0):
            rows = getattr(self, "batch_size", 1)
            total = prompt + getattr(self, "new_tokens", 0)
            found += [
                Pass("prefill", rows, prompt, rows, after=total - prompt),
                Pass("decode", rows, total, rows, prompt),
            ]
        return found

    def work(self, spec: Spec, data: Data | None = None) -> list[Pass]:
        """Return its largest passes, each with the models that are in memory beside it."""
        beside = self.holds(spec)
        return [replace(one, beside=beside) for one in self.passes(spec, data)]


def check_splits(where: str, split: str | Sequence[str]) -> None:
    """Refuse a list of splits that is empty or names one twice.

    Args:
        where: The evaluator's place in the config.
        split: Its setting.

    Raises:
        UserError: Naming the setting.
    """
    if not split or (not isinstance(split, str) and len(set(split)) < len(split)):
        raise UserError(
            f"{where}.split={split if isinstance(split, str) else list(split)} is not possible.",
            f"Name different splits: '{where}.split=[test,validation]'",
        )


def scored(data: Data | None, split: str, batch_tokens: int) -> list[Pass]:
    """Return the batches of a split's rows, or the largest possible one without data."""
    if data is None or split not in data.texts:
        return [Pass("score", 1, batch_tokens, batch_tokens)]
    examples = data.examples(split)
    counted = [sum(label != -100 for label in e.labels()[1:]) for e in examples]
    lengths = [len(e.ids) for e in examples]
    return [
        Pass("score", len(group), lengths[group[0]], sum(counted[i] for i in group))
        for group in by_length(lengths, batch_tokens)
    ]


def answered(passes: Sequence[Pass]) -> list[Pass]:
    """Return passes that score answers: the head reads few of their positions at once."""
    return [replace(one, counted=min(one.counted, HEAD_ROWS)) for one in passes]


def exponential(value: float | None) -> float:
    """Return e to a number, infinity where that is more than a float can be."""
    return math.exp(_number(value)) if _number(value) < LARGEST_EXPONENT else math.inf


def _largest(evaluator: Evaluator, name: str) -> int:
    """Return a setting that is a number or a grid of numbers; 0 where it is not there."""
    asked: int | list[int] = getattr(evaluator, name, 0)
    return max(asked, default=0) if isinstance(asked, list) else asked


def _number(value: float | None) -> float:
    assert value is not None
    return value
