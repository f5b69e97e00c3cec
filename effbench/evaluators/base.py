"""What an evaluator is: a frozen dataclass of settings that turns a model into metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from effbench.errors import UserError
from effbench.footprint import Pass
from effbench.lazy import torch
from effbench.methods.base import Batch, Cost, Method
from effbench.records import Metric, Outcomes
from effbench.schema import digest
from effbench.spec import Machine

if TYPE_CHECKING:
    from effbench.datasets import Data
    from effbench.journal import Journal
    from effbench.nn.scoring import Plan, Request, Score
    from effbench.shapes import Shape
    from effbench.spec import DatasetSpec, Spec


def _no_journal(name: str, items: Sequence[str]) -> Journal:
    from effbench.journal import Journal

    return Journal(None, items)


def _no_model(name: str) -> torch.nn.Module:
    raise UserError(f"There is no way to load {name!r} here.")


def _no_base() -> torch.nn.Module:
    raise UserError("There is no way to load the base model here.")


@dataclass
class Subject:
    """A model at one operating point, ready to be evaluated."""

    model: torch.nn.Module
    method: Method
    point: str
    data: Data
    device: torch.device
    seed: int
    pad_token_id: int
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    """Called with what is done, how many and of how many."""
    tokenizer: Any = None
    shape: Shape | None = None
    """Sizes of the base model."""
    dtype: str = "float32"
    """Compute dtype, a key of `shapes.DTYPE_BYTES`."""
    cost: Cost | None = None
    """What the model needs at this point, counted from shapes."""
    whole: Cost | None = None
    """What all of the model needs, of which the point may be a part."""
    machine: Machine = field(default_factory=Machine)
    """Stated ceilings of the hardware; zeros where nothing is stated."""
    journal: Callable[[str, Sequence[str]], Journal] = _no_journal
    """Opens the journal `name` of an evaluation over some items: what an interrupted evaluation had
    finished is in it. Kept in memory when there is no run folder."""
    beside: Mapping[str, Callable[[str, Sequence[str]], Journal]] = field(default_factory=dict)
    """Operating points still to be evaluated, each with what opens its journals: where the method
    lets a batch go through the model at several points at once, they are filled beside this one's.
    """
    keep: Callable[[str, Sequence[Mapping[str, Any]]], None] = lambda name, rows: None
    """Writes rows that are too much for the record into the run folder, one JSON line each."""
    load_model: Callable[[str], torch.nn.Module] = _no_model
    """Loads another model by its config name, frozen, on the device."""
    load_base: Callable[[], torch.nn.Module] = _no_base
    """Loads the dense model that the run started from, whatever made `model` of it; frozen, on the
    device."""
    base_bytes: int = 0
    """Memory of the process before the model was loaded."""
    job: dict[str, Any] = field(default_factory=dict)
    """The job of the run as plain values, for an evaluator that repeats it in another process."""

    def batch(self, sequences: Sequence[tuple[list[int], list[int]]]) -> Batch:
        """Return `(ids, labels)` pairs as one padded batch on the device."""
        return make_batch(sequences, self.pad_token_id).to(self.device)

    def token_nll(self, batch: Batch) -> torch.Tensor:
        """Return each predicted token's negative log-likelihood, [B, T - 1], in nats.

        Raises:
            UserError: When one is not a finite number; it names the first layer that gave such a
                number.
        """
        from effbench.nn.finite import require_finite

        def run() -> torch.Tensor:
            return self.method.token_nll(self.model, batch)

        nll = run()
        require_finite(self.model, nll, run)
        return nll

    def token_nlls(self, batch: Batch, points: Sequence[str]) -> list[torch.Tensor]:
        """Return `token_nll` at each of some points of `journals`, in one pass.

        Raises:
            UserError: As `token_nll` does.
        """
        from effbench.nn.finite import require_finite
        from effbench.nn.lockstep import nll_at

        if list(points) == [self.point]:
            return [self.token_nll(batch)]

        def run(some: Sequence[str]) -> list[torch.Tensor]:
            inputs = batch.input_ids, batch.attention_mask, batch.labels
            return nll_at(self.model, self._at(some), *inputs)

        found = run(points)
        for point, nll in zip(points, found, strict=True):
            require_finite(self.model, nll, partial(run, [point]))
        return found

    def journals(self, name: str, items: Sequence[str]) -> dict[str, Journal]:
        """Return this point's journal, and after it those of the points that go in one pass."""
        opened = {self.point: self.journal(name, items)}
        if self.beside and self._in_one_pass():
            opened |= {point: opening(name, items) for point, opening in self.beside.items()}
        return opened

    def _in_one_pass(self) -> bool:
        from effbench.nn.lockstep import can_walk

        plain = all(self.method.plain_logits(p) for p in (self.point, *self.beside))
        own = type(self.method).token_nll is not Method.token_nll
        return self.method.in_one_pass and plain and not own and can_walk(self.model)

    def _at(self, points: Sequence[str]) -> list[Callable[[], AbstractContextManager[Any]]]:
        return [partial(self.method.at, self.model, point) for point in points]

    def score(
        self, requests: Sequence[Request], name: str, batch_tokens: int = 2048
    ) -> list[Score]:
        """Return the log-likelihood of each continuation after its context.

        What requests share is computed once, unless the method has logits of its own or the model
        takes no mask of ours; then each request is a padded row.

        Args:
            requests: What to score.
            name: Names the journal and the progress line; unique within one evaluator.
            batch_tokens: Largest batch, padding included, in tokens.

        Raises:
            UserError: When a result is not a finite number; it names the first layer that gave
                such a number.
        """
        from effbench.nn.scoring import Score, has_trees, padded_scores

        ids = [digest([r.context, r.continuation]) for r in requests]
        if self.method.plain_logits(self.point) and has_trees(self.model):
            return self._score_trees(requests, ids, name, batch_tokens)
        journal = self.journal(name, ids)
        lengths = [len(r.context) + len(r.continuation) for r in requests]
        pending = journal.pending(list(by_length(lengths, batch_tokens)))
        for scores in padded_scores(self.logits, self.batch, requests, pending):
            journal.add(_plain_scores(scores))
            self.progress(name, len(journal), len(requests))
        return [Score(*value) for value in journal.values()]

    def _score_trees(
        self, requests: Sequence[Request], ids: Sequence[str], name: str, batch_tokens: int
    ) -> list[Score]:
        from effbench.nn.scoring import Plan, Score

        plan = Plan(requests, batch_tokens)
        stems = any(g.stem for g in plan.groups)  # whose caches would be there once for each point
        journals = {self.point: self.journal(name, ids)} if stems else self.journals(name, ids)
        own = journals[self.point]
        for found in self._tree_passes(plan, journals):
            for point, scores in found.items():
                journals[point].add(_plain_scores(scores))
            self.progress(name, len(own), len(requests))
        return [Score(*value) for value in own.values()]

    def _tree_passes(
        self, plan: Plan, journals: Mapping[str, Journal]
    ) -> Iterator[dict[str, dict[int, Score]]]:
        """Yield the scores of each group of a plan, by the points whose journals lack it."""
        from effbench.journal import pending
        from effbench.nn.lockstep import scores_at
        from effbench.nn.scoring import tree_scores

        todo = pending(journals, [g.requests for g in plan.groups])
        if len(journals) == 1:
            groups = plan.of(asked for asked, _ in todo)
            for scores in tree_scores(self.model, plan, groups, self.device):
                yield {self.point: scores}
            return
        for asked, points in todo:
            [group] = plan.of([asked])
            with torch.inference_mode():
                found = scores_at(self.model, self._at(points), plan, group, self.device)
            yield dict(zip(points, found, strict=True))

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return teacher-forced logits, [B, T, V].

        Raises:
            UserError: When one is not a finite number, as `token_nll` does.
        """
        from effbench.nn.finite import require_finite

        def run() -> torch.Tensor:
            return self.method.logits(self.model, batch)

        logits = run()
        require_finite(self.model, logits, run)
        return logits


@dataclass
class Result:
    """Metrics of one evaluator at one operating point, and the outcome of every item."""

    metrics: list[Metric] = field(default_factory=list)
    outcomes: list[Outcomes] = field(default_factory=list)

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
        """
        from effbench.stats import mean_interval

        mean, low, high = mean_interval(values, seed=subject.seed, clusters=clusters)
        head = Metric(metric, mean, unit, subject.point, split, len(values), low, high, task=task)
        self.metrics.append(head)
        self.outcomes.append(
            Outcomes(
                evaluator,
                metric,
                subject.point,
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
        bounds: tuple[float, float] = (-math.inf, math.inf),
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
            bounds: What the ratio can be at all; its interval ends there.
        """
        ratio = sum(sums) / sum(counts)
        size = sum(counts) / len(counts)
        values = [ratio + (s - ratio * n) / size for s, n in zip(sums, counts, strict=True)]
        head = self.add_items(subject, evaluator, metric, values, ids, unit=unit, split=split)
        least, most = bounds
        low, high = max(least, _number(head.low)), min(most, _number(head.high))
        self.metrics[-1] = replace(head, value=ratio, low=low, high=high)
        return self.metrics[-1]


@dataclass(frozen=True)
class Evaluator:
    """Base of all evaluators."""

    name: ClassVar[str] = ""
    """The name of its file and its config; set by the registry."""
    headline: ClassVar[str] = ""
    """The metric that it is there for, zero or more; the contract tests look for it."""
    version: ClassVar[int] = 1
    """Raised when the same settings would give other numbers; from then on in the key."""
    itemwise: ClassVar[bool] = True
    """Whether it works item by item through `Subject.journal`, so that it resumes at an item."""
    trial: ClassVar[dict[str, Any]] = {}
    """Settings with which it takes a moment on a tiny model, for the contract tests."""

    def check(self, spec: Spec, methods: Sequence[Method], shape: Shape | None) -> None:
        """Refuse what cannot be evaluated, before any weight is loaded.

        Args:
            spec: The run.
            methods: The methods that make what is evaluated, first to last.
            shape: The model's shape; None when it can be known only after a download.

        Raises:
            UserError: When the evaluator does not apply, with what to change.
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

    def overlap(self, dataset: DatasetSpec) -> str:
        """Return what of its own data are the rows that a run on `dataset` trains on, if any."""
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
            found += [Pass("prefill", rows, prompt, rows), Pass("decode", rows, total, rows)]
        return found


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


def _plain_scores(scores: Mapping[int, Score]) -> dict[int, list[Any]]:
    return {i: [s.loglikelihood, s.greedy] for i, s in scores.items()}


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


def _number(value: float | None) -> float:
    assert value is not None
    return value


def make_batch(sequences: Sequence[tuple[list[int], list[int]]], pad_token_id: int) -> Batch:
    """Return `(ids, labels)` pairs as one batch [B, T], padded on the right."""
    width = max(len(ids) for ids, _ in sequences)

    def padded(rows: list[list[int]], filler: int) -> Any:
        return torch.tensor([r + [filler] * (width - len(r)) for r in rows])

    return Batch(
        input_ids=padded([ids for ids, _ in sequences], pad_token_id),
        attention_mask=padded([[1] * len(ids) for ids, _ in sequences], 0),
        labels=padded([labels for _, labels in sequences], -100),
        rows=list(range(len(sequences))),
    )


def by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield positions in groups of similar length, each at most `batch_tokens` when padded."""
    group: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if group and lengths[group[0]] * (len(group) + 1) > batch_tokens:
            yield group
            group = []
        group.append(position)
    if group:
        yield group
