"""Multiple choice by log-likelihood: the answer with the highest one wins.

On the run's own dataset, `accuracy` compares summed log-likelihoods and `accuracy_norm` divides
them by the answer's bytes first; a classifier has `accuracy`, `macro_f1` and `loss`. On lm-eval's
tasks the prompts, the metrics and their names are lm-eval's own (Gao et al., doi
10.5281/zenodo.10256836).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from effbench.api.schema import NonNegativeInt, PositiveInt, digest
from effbench.api.shape import ModelShape
from effbench.evaluators.base import Evaluator, Result, answered, check_splits, exponential
from effbench.evaluators.subject import Subject
from effbench.methods.base import Method
from effbench.nn.model_kinds.base import find as find_model
from effbench.nn.scoring import prefix_tree
from effbench.results.records import Metric, Outcomes
from effbench.util.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from effbench.api.examples import Example, Tokens
    from effbench.api.footprint import Pass
    from effbench.api.shape import AnyShape
    from effbench.api.spec import DatasetSpec, Spec
    from effbench.data.dataset import Data
    from effbench.data.lm_eval_tasks import BenchmarkTask
    from effbench.data.overlap import Trained

KINDS = ("multiple_choice", "loglikelihood")
"""lm-eval's output types that need no generated text."""


@dataclass(frozen=True)
class Choices(Evaluator):
    """Multiple choice by log-likelihood on a split of the dataset, or on tasks of lm-eval."""

    headline: ClassVar[str] = "accuracy"
    gives: ClassVar[tuple[str, ...]] = ("acc", "acc_norm", "accuracy_norm", "macro_f1")
    beside: ClassVar[tuple[str, ...]] = ("loss",)
    model_kinds: ClassVar[frozenset[str]] = frozenset({"causal", "classifier", "seq2seq"})

    split: str | tuple[str, ...] = "test"
    """Which split of the dataset, or a list of several; not used with `tasks`."""
    batch_tokens: PositiveInt = 2048
    """Largest batch, padding included, in tokens."""
    tasks: list[str] = field(default_factory=list)
    """Tasks and groups of lm-eval (`effbench list tasks`); empty for the run's own dataset."""
    num_fewshot: NonNegativeInt | None = None
    """Examples before each question; null for what lm-eval defines."""
    limit: PositiveInt | None = None
    """Only the first rows of each task, in its own order; for a trial, not for a result."""
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    """Local files of rows, by task and split, in the columns that lm-eval reads."""
    fingerprint: str = ""
    """Content hash of these files; filled in when the config is composed."""

    def __post_init__(self) -> None:
        check_splits("evaluator.choices", self.split)

    def splits(self) -> tuple[str, ...]:
        """Return the dataset's splits, unless lm-eval's tasks are evaluated."""
        return () if self.tasks else super().splits()

    def passes(self, spec: Spec, data: Data | None = None) -> list[Pass]:
        """Return the batches of answers that it scores."""
        return answered(super().passes(spec, data))

    def sealed(self) -> Choices:
        """Return itself with the hash of its files."""
        from effbench.data.lm_eval_tasks import fingerprint

        return replace(self, fingerprint=fingerprint(self.files))

    def check(self, spec: Spec, methods: Sequence[Method], shape: AnyShape | None) -> None:
        """Refuse a dataset without choices, and tasks that cannot be had."""
        from effbench.data.kinds.base import find as find_kind

        kind = find_model(ModelShape.of(shape).kind) if shape else None
        if self.tasks and kind and not kind.caches:
            raise UserError(
                "lm-eval's tasks ask for the likelihood of texts that go on from others, which "
                f"a {kind.name} does not give.",
                "Leave evaluator.choices.tasks out.",
            )
        if self.tasks:
            self._check_tasks()
        elif not find_kind(spec.dataset.kind).choices:
            raise UserError(
                f"Evaluator choices needs a dataset with choices; {spec.dataset.called!r} "
                f"is of kind {spec.dataset.kind!r}.",
                "Leave it out: evaluator=perplexity, or name tasks: evaluator.choices.tasks=[piqa]",
            )

    def check_data(self, data: Data, shape: AnyShape | None) -> None:
        """Refuse tasks with questions that are longer than the model's positions."""
        from effbench.data import lm_eval_tasks as tasks

        for name in self.tasks if shape else ():
            rows = [r for t in self._loaded(name) for r in tasks.requests(t, data.tokenizer)]
            _check_lengths(name, rows, shape)

    def _check_tasks(self) -> None:
        from effbench.data import lm_eval_tasks as tasks

        for name in self.files:
            if name not in tasks.TASKS:
                raise UserError(
                    f"evaluator.choices.files.{name}: there is no task {name!r}.",
                    did_you_mean(name, tasks.TASKS),
                )
        for name in self.tasks:
            if self.tasks.count(name) > 1:
                raise UserError(f"evaluator.choices.tasks names {name!r} twice.", "Once will do.")
            tasks.check(name, self.num_fewshot, self.files)
            kind = tasks.find(tasks.members(name)[0]).kind
            if kind not in KINDS:
                raise UserError(
                    f"{name} is answered by generated text, not by a choice.",
                    f"Use: evaluator=generation 'evaluator.generation.tasks=[{name}]'",
                )

    def overlap(self, dataset: DatasetSpec, rows: Trained) -> str:
        """Return the tasks whose evaluated rows `dataset` trains on."""
        from effbench.data import lm_eval_tasks as tasks

        found = [n for n in self.tasks if tasks.overlaps(n, dataset, self.files, rows, self.limit)]
        return f"Task {', '.join(found)} of evaluator choices" if found else ""

    def run(self, subject: Subject) -> Result:
        """Return the metrics with intervals, and each item's outcome."""
        result = Result()
        for split in self.splits():
            self._own_dataset(subject, result, split)
        for name in self.tasks:
            self._task(subject, name, result)
        return result

    # -- the run's own dataset -----------------------------------------------------------------

    def _own_dataset(self, subject: Subject, result: Result, split: str) -> None:
        examples = subject.data.examples(split)
        flat = [(i, j) for i, e in enumerate(examples) for j in range(len(e.choices))]
        scores = self._scores(subject, split, [examples[i].choices[j] for i, j in flat])
        by_item: list[list[float]] = [[] for _ in examples]
        for (i, _), score in zip(flat, scores, strict=True):
            by_item[i].append(score)

        if not subject.speaks:
            _add_classes(subject, result, split, examples, by_item)
            return
        right, right_norm, picks = [], [], []
        for example, item in zip(examples, by_item, strict=True):
            sizes = [c.answer_bytes for c in example.choices]
            # An answer that is cut within its first letter has no whole byte left.
            normed = [s / max(b, 1) for s, b in zip(item, sizes, strict=True)]
            picks.append((item.index(max(item)), normed.index(max(normed))))
            right.append(float(picks[-1][0] == example.right))
            right_norm.append(float(picks[-1][1] == example.right))

        ids = [e.id for e in examples]
        cut = [
            [(c.ids[: c.prompt_length], c.ids[c.prompt_length :]) for c in e.choices]
            for e in examples
        ]
        _keep(subject, subject.data.tokenizer, split, ids, cut, picks)
        for name, values in (("accuracy", right), ("accuracy_norm", right_norm)):
            result.add_items(subject, "choices", name, values, ids, split=split)

    def _scores(self, subject: Subject, split: str, choices: Sequence[Tokens]) -> list[float]:
        """Return the summed log-likelihood of each answer."""
        requests = [
            prefix_tree.Request(c.ids[: c.prompt_length], c.ids[c.prompt_length :]) for c in choices
        ]
        scores = subject.score(requests, split, self.batch_tokens)
        return [s.loglikelihood for s in scores]

    # -- lm-eval's tasks -----------------------------------------------------------------------

    def _task(self, subject: Subject, name: str, result: Result) -> None:
        """Add the metrics of a task, or of a group and of each of its members."""
        from effbench.data import lm_eval_tasks as tasks

        loaded = self._loaded(name)
        rows = [row for task in loaded for row in tasks.requests(task, subject.tokenizer)]
        _check_lengths(name, rows, subject.shape)
        flat = iter(subject.score([r for row in rows for r in row], name, self.batch_tokens))
        scores = [[next(flat) for _ in row] for row in rows]

        whole: dict[str, list[float]] = {}
        ids: list[str] = []
        clusters: list[int] = []
        for number, task in enumerate(loaded):
            own = scores[len(ids) : len(ids) + len(task.docs)]
            values = _outcomes(task, own)
            if len(loaded) > 1:
                _add(subject, result, task, task.name, values, task.ids)
            for metric, found in values.items():
                whole.setdefault(metric, []).extend(found)
            ids += task.ids
            clusters += [number] * len(task.docs)
        _add(subject, result, loaded[0], name, whole, ids, clusters if len(loaded) > 1 else ())
        cut = [[(r.context, r.continuation) for r in row] for row in rows]
        picks = [_picks(subject.tokenizer, *both) for both in zip(cut, scores, strict=True)]
        _keep(subject, subject.tokenizer, name, ids, cut, picks)
        _add_loglikelihoods(subject, result, loaded[0].split, name, ids, scores)

    def _loaded(self, name: str) -> list[BenchmarkTask]:
        """Return a task, or each member of a group, with its rows."""
        from effbench.data import lm_eval_tasks as tasks

        return tasks.load_all(
            name, num_fewshot=self.num_fewshot, limit=self.limit, files=self.files
        )


Cut = Sequence[tuple[list[int], list[int]]]
"""Prompt and answer of each choice of a row, as tokens."""


def _keep(
    subject: Subject,
    tokenizer: Any,
    name: str,
    ids: Sequence[str],
    rows: Sequence[Cut],
    picks: Sequence[tuple[int, int]],
) -> None:
    """Write each row's prompt and the answers that were picked into the run folder.

    Args:
        subject: What is evaluated.
        tokenizer: That rows were made tokens with.
        name: Of the task or split.
        ids: Of the rows.
        rows: Their choices.
        picks: Places of the likeliest answer of each row, and of the likeliest for its length.
    """
    kept = [
        {
            "id": id_,
            "prompt": _text(tokenizer, row[0][0]),
            "text": _text(tokenizer, row[plain][1]),
            "text_norm": _text(tokenizer, row[normed][1]),
        }
        for id_, row, (plain, normed) in zip(ids, rows, picks, strict=True)
    ]
    subject.keep(name, kept)


def _picks(tokenizer: Any, row: Cut, scores: Sequence[prefix_tree.Score]) -> tuple[int, int]:
    """Return the places of the likeliest answer, and of the likeliest per letter."""
    found = [s.loglikelihood for s in scores]
    sizes = [max(1, len(_text(tokenizer, answer).strip())) for _, answer in row]
    normed = [s / n for s, n in zip(found, sizes, strict=True)]
    return found.index(max(found)), normed.index(max(normed))


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _check_lengths(name: str, rows: Sequence[Any], shape: AnyShape | None) -> None:
    """Refuse what is longer than the model's positions; lm-eval would cut off its start."""
    assert shape is not None
    room = shape.max_positions
    long = [r for r in rows if max(len(q.context) + len(q.continuation) for q in r) - 1 > room]
    if long:
        raise UserError(
            f"{len(long)} of {len(rows)} items of {name} are longer than the model's "
            f"{room} positions.",
            "Give fewer examples (evaluator.choices.num_fewshot), or leave out what is long: "
            "another task, a lower evaluator.choices.limit.",
        )


def _add_classes(
    subject: Subject,
    result: Result,
    split: str,
    examples: Sequence[Example],
    scores: Sequence[Sequence[float]],
) -> None:
    """Add accuracy, macro F1 and the mean negative log-likelihood of the right class.

    Args:
        subject: What is evaluated.
        result: Where it goes.
        split: Of the dataset.
        examples: Its rows.
        scores: Log-likelihoods of the classes, by row.
    """
    ids, right = [e.id for e in examples], [e.right for e in examples]
    chosen = [row.index(max(row)) for row in scores]
    for name, values in (
        ("accuracy", [float(c == r) for c, r in zip(chosen, right, strict=True)]),
        ("macro_f1", linearised_macro_f1(chosen, right)),
        ("loss", [-row[place] for row, place in zip(scores, right, strict=True)]),
    ):
        unit = "nats/row" if name == "loss" else ""
        result.add_items(subject, "choices", name, values, ids, unit=unit, split=split)


def linearised_macro_f1(chosen: Sequence[int], right: Sequence[int]) -> list[float]:
    """Return a value for each row whose mean is macro F1, and whose spread is that of it.

    F1 of a class is the ratio 2 TP / (2 TP + FP + FN) of two sums over rows; macro F1 is the mean
    over the classes that are right or chosen anywhere. Ratios are linearised as in
    `Result.add_ratio`.

    Args:
        chosen: The class of each row as the model has it.
        right: As it is.
    """
    classes, rows = sorted({*chosen, *right}), len(right)
    values = [0.0] * rows
    for label in classes:
        pairs = [(c == label, r == label) for c, r in zip(chosen, right, strict=True)]
        tops, counts = [2 * (c and r) for c, r in pairs], [c + r for c, r in pairs]
        ratio = sum(tops) / sum(counts)
        for place, (top, count) in enumerate(zip(tops, counts, strict=True)):
            values[place] += (ratio + (top - ratio * count) * rows / sum(counts)) / len(classes)
    return values


def _outcomes(
    task: BenchmarkTask, scores: Sequence[Sequence[prefix_tree.Score]]
) -> dict[str, list[float]]:
    """Return lm-eval's value of each metric for every row."""
    values: dict[str, list[float]] = {}
    for index, row in enumerate(scores):
        found = task.results(index, [(s.loglikelihood, s.greedy) for s in row])
        for metric, value in found.items():
            values.setdefault(metric, []).append(float(value))
    return values


def _add(
    subject: Subject,
    result: Result,
    task: BenchmarkTask,
    name: str,
    values: dict[str, list[float]],
    ids: Sequence[str],
    clusters: Sequence[int] = (),
) -> None:
    """Add the metrics of one task or group, and which version of it with how many examples."""
    for metric, found in values.items():
        perplexity = metric == "perplexity"  # of which lm-eval's value per row is a log-likelihood
        head = result.add_items(
            subject,
            "choices",
            "loglikelihood" if perplexity else metric,
            found,
            ids,
            unit="nats" if perplexity else "",
            split=task.split,
            task=name,
            clusters=clusters,
        )
        if perplexity:
            assert head.low is not None and head.high is not None
            low, high = exponential(-head.high), exponential(-head.low)
            made = task.aggregate(metric, found)
            result.metrics.append(
                replace(head, name=metric, value=made, low=low, high=high, unit="")
            )
    facts = {"num_fewshot": float(task.num_fewshot)}
    with_number = task.version.replace(".", "", 1).isdigit()
    facts |= {"task_version": float(task.version)} if with_number else {}
    for fact, value in facts.items():
        result.metrics.append(
            Metric(fact, value, "", subject.point.name, task=name, obtained="counted")
        )


def _add_loglikelihoods(
    subject: Subject,
    result: Result,
    split: str,
    name: str,
    ids: Sequence[str],
    scores: Sequence[Sequence[prefix_tree.Score]],
) -> None:
    """Keep the log-likelihood of every answer, for other estimates from the same run."""
    places = [(i, j) for i, row in enumerate(scores) for j in range(len(row))]
    result.outcomes.append(
        Outcomes(
            "choices",
            "loglikelihoods",
            subject.point.name,
            split,
            digest([f"{ids[i]}.{j}" for i, j in places]),
            [scores[i][j].loglikelihood for i, j in places],
            name,
            [i for i, _ in places],
        )
    )
