"""How closely a model follows a reference model on the same tokens.

The reference is the dense model that the run started from, or another one of the same vocabulary.
Label and probability loyalty are those of Xu et al., "Beyond Preserved Accuracy: Evaluating Loyalty
and Robustness of BERT Compression", EMNLP 2021, arXiv 2109.03228; the classes are all tokens that
may come next, or a question's answers. Flips are those of Dutta et al., "Accuracy is Not All You
Need", NeurIPS 2024, arXiv 2407.09141.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from effbench.api.schema import NonNegativeInt, PositiveInt
from effbench.evaluators.base import Evaluator, Result
from effbench.evaluators.subject import Subject
from effbench.methods.base import Method
from effbench.nn.losses import divergence
from effbench.nn.scoring import prefix_tree
from effbench.util.errors import UserError
from effbench.util.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from effbench.api.examples import Example
    from effbench.api.footprint import Pass
    from effbench.api.shape import AnyShape
    from effbench.api.spec import DatasetSpec, ModelSpec, Spec
    from effbench.data.dataset import Data
    from effbench.data.lm_eval_tasks import BenchmarkTask
    from effbench.data.overlap import Trained

UNITS = {"kl": "nats/token", "reverse_kl": "nats/token", "js": "nats/token"}


@dataclass(frozen=True)
class Fidelity(Evaluator):
    """Agreement with a reference model, and the distance between the two distributions."""

    headline: ClassVar[str] = "agreement"
    gives: ClassVar[tuple[str, ...]] = (
        "kl",
        "reverse_kl",
        "js",
        "logit_mse",
        "probability_loyalty",
    )

    reference: str = ""
    """Name of a model config; empty is the dense model that the run started from."""
    split: str = "test"
    """Which split."""
    window: PositiveInt | None = None
    """Most tokens that the models see at once; null is the dataset's `max_length`."""
    stride: PositiveInt | None = None
    """Tokens that each window after a document's first one counts; null is half a window."""
    batch_tokens: PositiveInt = 1024
    """Largest batch, padding included, in tokens."""
    tasks: list[str] = field(default_factory=list)
    """Multiple-choice tasks and groups of lm-eval whose answers are compared too."""
    num_fewshot: NonNegativeInt | None = None
    """Examples before each question of a task; null for what lm-eval defines."""
    limit: PositiveInt | None = None
    """Only the first rows of each task."""
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    """Local files with a task's rows, by task and split."""
    fingerprint: str = ""
    """Content hash of these files; filled in when the config is composed."""

    def sealed(self) -> Fidelity:
        """Return itself with the hash of its files."""
        from effbench.data.lm_eval_tasks import fingerprint

        return replace(self, fingerprint=fingerprint(self.files))

    def others(self) -> tuple[str, ...]:
        """Return the reference, where it is another model."""
        return (self.reference,) if self.reference else ()

    def holds(self, spec: Spec) -> tuple[str, ...]:
        """Return the reference; where none is named it is the model that the run started from."""
        return (self.reference,)

    def overlap(self, dataset: DatasetSpec, rows: Trained) -> str:
        """Return the tasks whose evaluated rows `dataset` trains on."""
        from effbench.data import lm_eval_tasks as tasks

        found = [n for n in self.tasks if tasks.overlaps(n, dataset, self.files, rows, self.limit)]
        return f"Task {', '.join(found)} of evaluator fidelity" if found else ""

    def check(self, spec: Spec, methods: Sequence[Method], shape: AnyShape | None) -> None:
        """Refuse a reference of another vocabulary, and windows that cannot be."""
        from effbench.evaluators.windows import check_sizes

        limit = spec.dataset.max_length
        check_sizes("evaluator.fidelity", self.window, self.stride, limit, shape)
        self._check_tasks()
        if not self.reference:
            return
        theirs = self._told(spec.others).shape
        check_sizes("evaluator.fidelity", self.window, self.stride, limit, theirs)
        if theirs and shape and theirs.vocab_size != shape.vocab_size:
            raise self._other_vocabulary(f"{theirs.vocab_size} entries, not {shape.vocab_size}")

    def _check_tasks(self) -> None:
        from effbench.data import lm_eval_tasks as tasks

        for name in self.tasks:
            tasks.check(name, self.num_fewshot, self.files)
            if tasks.find(tasks.members(name)[0]).kind != "multiple_choice":
                raise UserError(
                    f"{name} has no choices that two models could answer alike.",
                    "Name multiple-choice tasks: evaluator.fidelity.tasks=[piqa]",
                )

    def check_data(self, data: Data, shape: AnyShape | None) -> None:
        """Refuse tasks with questions that are longer than the model's positions."""
        from effbench.data import lm_eval_tasks as tasks

        for name in self.tasks:
            rows = [r for t in self._loaded(name) for r in tasks.requests(t, data.tokenizer)]
            check_lengths(name, rows, shape)

    def _loaded(self, name: str) -> list[BenchmarkTask]:
        """Return a task, or each member of a group, with its rows."""
        from effbench.data import lm_eval_tasks as tasks

        return tasks.load_all(
            name, num_fewshot=self.num_fewshot, limit=self.limit, files=self.files
        )

    def passes(self, spec: Spec, data: Data | None = None) -> list[Pass]:
        """Return the batches of windows that it scores."""
        from effbench.evaluators.windows import passes, sizes

        window, stride = sizes(self.window, self.stride, spec.dataset.max_length)
        found = passes(data, self.split, window, stride, self.batch_tokens)
        return [replace(one, compared=min(one.counted, divergence.CHUNK)) for one in found]

    def run(self, subject: Subject) -> Result:
        """Return the metrics over tokens, and those over answers where the dataset has them."""
        other = self._reference(subject)
        examples = subject.data.documents(self.split)
        result = Result()
        self._add_tokens(result, subject, other, examples)
        if subject.data.kind.choices:
            self._add_answers(result, subject, other, examples)
        for name in self.tasks:
            self._add_task(result, subject, other, name)
        return result

    def _reference(self, subject: Subject) -> Subject:
        """Return the same subject with the reference as its model."""
        model = subject.load_model(self.reference) if self.reference else subject.load_base()
        ours, theirs = (
            m.get_input_embeddings().num_embeddings  # type: ignore[operator]
            for m in (subject.model, model)
        )
        if ours != theirs:
            raise self._other_vocabulary(f"{theirs} entries, not {ours}")
        if self.reference:
            from effbench.models.load import load_tokenizer

            tokenizer = load_tokenizer(self._told(subject.others))
            if tokenizer.get_vocab() != subject.data.tokenizer.get_vocab():
                raise self._other_vocabulary("other tokens")
        return replace(subject, model=model, method=Method())

    def _told(self, others: Sequence[ModelSpec]) -> ModelSpec:
        """Return the reference among the other models of a run, as its key knows it."""
        return next(model for model in others if model.name == self.reference)

    def _other_vocabulary(self, what: str) -> UserError:
        return UserError(
            f"evaluator.fidelity.reference={self.reference} has another vocabulary: {what}.",
            "Choose a reference with the same tokenizer, or leave it out for the run's own base.",
        )

    # -- tokens --------------------------------------------------------------------------------

    def _add_tokens(
        self, result: Result, subject: Subject, other: Subject, examples: Sequence[Example]
    ) -> None:

        rows = self._row_sums(subject, other, examples)
        counts, ids = [row[-1] for row in rows], [e.id for e in examples]
        for place, name in enumerate(divergence.FIELDS):
            result.add_ratio(
                subject,
                "fidelity",
                name,
                [row[place] for row in rows],
                counts,
                ids,
                unit=UNITS.get(name, ""),
                split=self.split,
            )

    def _row_sums(
        self, subject: Subject, other: Subject, examples: Sequence[Example]
    ) -> list[list[float]]:
        """Return each row's sums of `divergence.FIELDS` and its number of positions."""
        from effbench.evaluators.windows import cut, groups, sizes

        limit = subject.data.spec.max_length
        windows = cut(examples, *sizes(self.window, self.stride, limit))
        journal = subject.journal(self.split, [w.name(examples[w.row]) for w in windows])
        for group in journal.pending(groups(windows, self.batch_tokens)):
            batch = subject.batch([windows[i].sequence(examples[windows[i].row]) for i in group])
            with torch.inference_mode():
                found = divergence.row_sums(
                    other.logits(batch), subject.logits(batch), batch.labels
                )
            journal.add(dict(zip(group, found.tolist(), strict=True)))
            subject.progress("fidelity", len(journal), len(windows))

        rows = [[0.0] * (len(divergence.FIELDS) + 1) for _ in examples]
        for window, values in zip(windows, journal.values(), strict=True):
            rows[window.row] = [a + b for a, b in zip(rows[window.row], values, strict=True)]
        return rows

    # -- answers -------------------------------------------------------------------------------

    def _add_answers(
        self, result: Result, subject: Subject, other: Subject, examples: Sequence[Example]
    ) -> None:

        rows = [
            [
                prefix_tree.Request(c.ids[: c.prompt_length], c.ids[c.prompt_length :])
                for c in e.choices
            ]
            for e in examples
        ]
        ours, theirs = self._scores(subject, other, rows, self.split)
        right = [
            [chosen(s) == e.right for s, e in zip(side, examples, strict=True)]
            for side in (ours, theirs)
        ]
        self._add_outcomes(result, subject, ours, theirs, right, [e.id for e in examples])

    def _add_task(self, result: Result, subject: Subject, other: Subject, name: str) -> None:
        """Add what both models answer to a task; right is what lm-eval's `acc` says."""
        from effbench.data import lm_eval_tasks as tasks

        loaded = self._loaded(name)
        places = [(task, index) for task in loaded for index in range(len(task.docs))]
        rows = [row for task in loaded for row in tasks.requests(task, subject.data.tokenizer)]
        check_lengths(name, rows, subject.shape)
        ours, theirs = self._scores(subject, other, rows, name)
        right = [
            [
                bool(task.results(index, [(x, False) for x in s])["acc"])
                for (task, index), s in zip(places, side, strict=True)
            ]
            for side in (ours, theirs)
        ]
        ids = [i for task in loaded for i in task.ids]
        self._add_outcomes(result, subject, ours, theirs, right, ids, name, loaded[0].split)

    def _scores(
        self,
        subject: Subject,
        other: Subject,
        rows: Sequence[Sequence[prefix_tree.Request]],
        name: str,
    ) -> tuple[list[list[float]], list[list[float]]]:
        """Return each answer's log-likelihood under the model and under the reference."""
        flat = [request for row in rows for request in row]
        sides = []
        for who, title in ((subject, "answers"), (other, "reference")):
            scores = iter(who.score(flat, f"{name}.{title}", self.batch_tokens))
            sides.append([[next(scores).loglikelihood for _ in row] for row in rows])
        return sides[0], sides[1]

    def _add_outcomes(
        self,
        result: Result,
        subject: Subject,
        ours: Sequence[Sequence[float]],
        theirs: Sequence[Sequence[float]],
        right: Sequence[Sequence[bool]],
        ids: Sequence[str],
        task: str = "",
        split: str = "",
    ) -> None:
        outcomes = {
            "label_loyalty": [
                float(chosen(p) == chosen(q)) for p, q in zip(theirs, ours, strict=True)
            ],
            "answer_loyalty": [answer_loyalty(p, q) for p, q in zip(theirs, ours, strict=True)],
            "flips": [float(a != b) for a, b in zip(*right, strict=True)],
        }
        for name, values in outcomes.items():
            result.add_items(
                subject, "fidelity", name, values, ids, split=split or self.split, task=task
            )


def chosen(scores: Sequence[float]) -> int:
    """Return the index of the highest log-likelihood, the first of equal ones."""
    return list(scores).index(max(scores))


def answer_loyalty(reference: Sequence[float], model: Sequence[float]) -> float:
    """Return 1 - sqrt(JS) between two softmax distributions over a question's answers.

    Args:
        reference: Log-likelihood of each answer under the reference.
        model: The same under the model.
    """
    p, q = (torch.tensor([list(s)], dtype=torch.float64) for s in (reference, model))
    return float(divergence.divergences(p, q)[0, divergence.FIELDS.index("probability_loyalty")])


def check_lengths(
    name: str, rows: Sequence[Sequence[prefix_tree.Request]], shape: AnyShape | None
) -> None:
    """Refuse a task whose questions are longer than the model's positions.

    Raises:
        UserError: Naming the task.
    """
    longest = max(len(r.context) + len(r.continuation) - 1 for row in rows for r in row)
    if shape and longest > shape.max_positions:
        raise UserError(
            f"{name} has a question of {longest} tokens, more than the {shape.max_positions} "
            "positions of the model.",
            "Lower evaluator.fidelity.num_fewshot, or leave the task out.",
        )
