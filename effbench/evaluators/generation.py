"""Exact match of written answers: lm-eval's generation tasks, or the run's own dataset.

Answers come from the method's own decoding session, so a method that decodes differently from its
teacher-forced pass is judged as it decodes. Tasks keep lm-eval's prompts, filters and metrics.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Interval

from effbench.api.batch import by_length
from effbench.api.schema import ModelText, NonNegativeFloat, NonNegativeInt, PositiveInt, digest
from effbench.evaluators.base import Evaluator, Result
from effbench.evaluators.subject import Subject
from effbench.nn.decode import generate
from effbench.nn.decode.not_followed import not_followed
from effbench.nn.model_kinds.base import CAUSAL, ModelKind, kind_of
from effbench.nn.model_kinds.base import find as find_kind
from effbench.nn.scoring import finite
from effbench.results.records import Metric
from effbench.util.errors import UserError
from effbench.util.lazy import torch

if TYPE_CHECKING:
    from effbench.api.footprint import Pass
    from effbench.api.shape import AnyShape
    from effbench.api.spec import DatasetSpec, Spec
    from effbench.data.dataset import Data
    from effbench.data.overlap import Trained
    from effbench.evaluators.questions import Questions
    from effbench.methods.base import Method


TASK_PROMPT = 1024
"""Tokens of a task's prompt with its examples, about what eight of GSM8K have."""


@dataclass(frozen=True)
class Generation(Evaluator):
    """Exact match of written answers, and how long they are."""

    headline: ClassVar[str] = "exact_match"
    gives: ClassVar[tuple[str, ...]] = ("output_tokens", "truncated")
    model_kinds: ClassVar[frozenset[str]] = frozenset({"causal", "seq2seq"})
    trial: ClassVar[dict[str, Any]] = {"tasks": [], "limit": 3, "max_new_tokens": 4}

    tasks: tuple[str, ...] = ("gsm8k_cot",)
    """lm-eval's generation tasks; none asks the prompts of the run's own dataset, and so does the
    default where these are other prompts than the task's."""
    num_fewshot: NonNegativeInt | None = None
    """Examples before each question of a task; null is what lm-eval defines."""
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    """Local files with a task's rows, by task and split."""
    fingerprint: str = ""
    """Content hash of these files; filled in when the config is composed."""
    split: str = "test"
    """Which split of the run's own dataset; not used with `tasks`."""
    pattern: str = ""
    """For the own dataset: regular expression of what counts in an answer, its last match or the
    first group of that; empty for the whole answer."""
    until: tuple[ModelText, ...] = ()
    """Strings that end an answer, besides those of a task and the end token."""
    limit: PositiveInt | None = 100
    """Only the first so many questions of each task; null for all."""
    max_new_tokens: PositiveInt | None = None
    """Most tokens of an answer; null is what the task defines, else 256."""
    temperature: NonNegativeFloat | None = None
    """0 takes the most likely token; null is what the task defines, else 0."""
    top_k: NonNegativeInt = 0
    """When sampling, only the k most likely tokens; 0 for all."""
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """When sampling, only the most likely tokens that together reach this probability."""
    chat: bool = False
    """Whether a task's prompts go through the model's chat template (`dataset.chat` says so for the
    own dataset)."""
    batch_tokens: PositiveInt = 8192
    """Largest batch, prompts and the longest possible answers, in tokens."""

    @classmethod
    def suited(cls, dataset: DatasetSpec) -> dict[str, Any]:
        """Return that a dataset is asked which has prompts, unless it is that of the task.

        Pairs of answers, and rated ones, are none that could be right word for word.
        """
        from effbench.data.kinds.base import find

        subjects = {task.partition("_")[0] for task in cls.tasks}
        kind = find(dataset.kind)
        own = kind.asks and kind.name != "preference" and not kind.rates
        return {"tasks": []} if own and dataset.name.partition("-")[0] not in subjects else {}

    def remark(self, dataset: DatasetSpec) -> str:
        """Return that the default task is asked, and no row of somebody's own dataset."""
        if dataset.source != "file" or not self.tasks or self.tasks != type(self).tasks:
            return ""
        return (
            f"Evaluator {self.name} asks {', '.join(self.tasks)}, no rows of {dataset.called}: "
            f"evaluator.{self.name}.tasks=[...] names other tasks."
        )

    def splits(self) -> tuple[str, ...]:
        """Return the dataset's split, unless tasks are asked."""
        return () if self.tasks else (self.split,)

    def sealed(self) -> Generation:
        """Return itself with the hash of its files."""
        from effbench.data.lm_eval_tasks import fingerprint

        return replace(self, fingerprint=fingerprint(self.files))

    def overlap(self, dataset: DatasetSpec, rows: Trained) -> str:
        """Return the tasks whose evaluated rows `dataset` trains on."""
        from effbench.data import lm_eval_tasks as tasks

        found = [n for n in self.tasks if tasks.overlaps(n, dataset, self.files, rows, self.limit)]
        return f"Task {', '.join(found)} of evaluator generation" if found else ""

    def check(self, spec: Spec, methods: Sequence[Method], shape: AnyShape | None) -> None:
        """Refuse tasks that cannot be had or generate nothing, and a pattern that is none."""
        from effbench.data.kinds.base import find

        if not self.tasks and not find(spec.dataset.kind).asks:
            raise UserError(
                f"Evaluator generation has no prompts in {spec.dataset.called!r}: it is plain "
                "text.",
                "Name tasks: evaluator.generation.tasks=[gsm8k_cot]",
            )
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(
                f"evaluator.generation.pattern={self.pattern!r} is no regular expression: {error}."
            ) from None
        if shape and (self.max_new_tokens or 0) >= shape.max_positions:
            place = f"evaluator.{self.name}.max_new_tokens"
            raise UserError(
                f"{place}={self.max_new_tokens} leaves no position of {shape.max_positions} for a "
                "prompt.",
                f"Lower {place}.",
            )
        if self.tasks:
            self._check_tasks()

    def check_data(self, data: Data, shape: AnyShape | None) -> None:
        """Refuse questions that cannot be graded, or need more positions than the model has."""
        for questions in self._questions(data):
            self._check_positions(data, questions, self._sizes(data, questions), shape)

    def _check_tasks(self) -> None:
        from effbench.data import lm_eval_tasks as tasks
        from effbench.data.lm_eval_rows import find

        for name in self.tasks:
            for member in tasks.members(name):
                if find(member).kind != "generate_until":
                    raise UserError(
                        f"{name} is no generation task.",
                        f"Known: {', '.join(tasks.names('generate_until'))}. "
                        "Others belong to evaluator=choices.",
                    )
            tasks.check(name, self.num_fewshot, self.files)

    def passes(self, spec: Spec, data: Data | None = None) -> list[Pass]:
        """Return the batches of prompts and answers, or a full one where no data is given."""
        from effbench.api.footprint import Pass
        from effbench.evaluators.questions import NEW_TOKENS

        if data is not None:
            return [one for asked in self._questions(data) for one in self._batches(data, asked)]
        new = self.max_new_tokens or NEW_TOKENS
        prompt = TASK_PROMPT if self.tasks else spec.dataset.max_length
        rows = max(1, self.batch_tokens // (prompt + new))
        return [
            Pass("prefill", rows, prompt, rows, after=new),
            Pass("decode", rows, prompt + new, rows, prompt),
        ]

    def _batches(self, data: Data, questions: Questions) -> Iterator[Pass]:
        """Yield the passes of a task's questions, in the batches in which they are answered."""
        from effbench.api.footprint import Pass

        sizes = self._sizes(data, questions)
        for group in by_length(list(map(sum, sizes)), self.batch_tokens):
            rows, prompt = len(group), max(sizes[i][0] for i in group)
            total = prompt + max(sizes[i][1] for i in group)
            yield Pass("prefill", rows, prompt, rows, after=total - prompt)
            yield Pass("decode", rows, total, rows, prompt)

    def _sizes(self, data: Data, questions: Questions) -> list[tuple[int, int]]:
        """Return the tokens of each question's prompt, and the most of its answer."""
        kind = find_kind(data.model.kind if data.model else CAUSAL)
        prompts = _prompt_ids(data.tokenizer, questions, kind)
        longest = [self.max_new_tokens or q.max_new_tokens for q in questions.asked]
        return [(len(ids), new) for ids, new in zip(prompts, longest, strict=True)]

    def run(self, subject: Subject) -> Result:
        """Return each task's own metrics, `output_tokens` and `truncated`, with intervals.

        Raises:
            UserError: When a prompt and its answer need more positions than the model has.
        """
        result = Result()
        for questions in self._questions(subject.data):
            self._add(result, subject, questions, self._answers(subject, questions))
        result.notes += not_followed(subject.model)
        return result

    def _questions(self, data: Data) -> Iterator[Questions]:
        from effbench.data import lm_eval_tasks as tasks
        from effbench.data.lm_eval_rows import find, rows_of
        from effbench.evaluators.questions import of_dataset, of_ifeval, of_task

        if not self.tasks:
            yield of_dataset(data, self.split, self.limit, self.pattern)
        chat = data.tokenizer if self.chat else None
        for name in self.tasks:
            if name == "ifeval" and name in self.files:
                yield of_ifeval(rows_of(find(name), "train", self.files), self.limit, chat)
                continue
            for task in tasks.load_all(
                name, num_fewshot=self.num_fewshot, limit=self.limit, files=self.files
            ):
                yield of_task(task, chat)

    # -- answers -------------------------------------------------------------------------------

    def _answers(self, subject: Subject, questions: Questions) -> list[generate.Generated]:
        """Return the answer to each question, finished ones from the journal."""
        prompts = self._prompts(subject, questions)
        sampling = self._sampling(questions)
        ids = [
            digest([vars(p) | {"stop_ids": sorted(p.stop_ids)}, vars(sampling)]) for p in prompts
        ]
        name = questions.task or questions.split
        journal = subject.journal(name, ids)
        sizes = [len(p.ids) + p.max_new_tokens for p in prompts]
        for group in journal.pending(list(by_length(sizes, self.batch_tokens))):
            made = self._generate(subject, [prompts[i] for i in group], sampling)
            journal.add({i: [g.ids, g.text, g.ended] for i, g in zip(group, made, strict=True)})
            subject.progress(f"generation {name}", len(journal), len(prompts))
        return [generate.Generated(*value) for value in journal.values()]

    def _generate(
        self, subject: Subject, prompts: Sequence[generate.Prompt], sampling: generate.Sampling
    ) -> list[generate.Generated]:

        def check(logits: torch.Tensor) -> None:
            batch = subject.batch([(p.ids, p.ids) for p in prompts])
            method, model, point = subject.method, subject.model, subject.point
            finite.require_finite(model, logits, lambda: method.logits(model, batch, point))

        tokenizer = subject.data.tokenizer
        with torch.inference_mode():
            return generate.generate(
                subject.session(),
                prompts,
                lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
                device=subject.device,
                pad_token_id=subject.pad_token_id,
                sampling=sampling,
                check=check,
            )

    def _sampling(self, questions: Questions) -> generate.Sampling:

        temperature = self.temperature
        if temperature is None:
            temperature = questions.asked[0].temperature
        return generate.Sampling(temperature, self.top_k, self.top_p)

    def _prompts(self, subject: Subject, questions: Questions) -> list[generate.Prompt]:
        tokenizer = subject.data.tokenizer
        ends, added = end_tokens(subject), tokenizer.get_added_vocab()
        kind = kind_of(subject.model)
        prompts = []
        for q, ids in zip(questions.asked, _prompt_ids(tokenizer, questions, kind), strict=True):
            stop = (*q.until, *self.until)
            prompts.append(
                generate.Prompt(
                    ids,
                    self.max_new_tokens or q.max_new_tokens,
                    ends | {added[s] for s in stop if s in added},
                    tuple(s for s in stop if s),
                    int(digest([subject.seed, q.id], 15), 16),
                )
            )
        sizes = [(len(p.ids), p.max_new_tokens) for p in prompts]
        self._check_positions(subject.data, questions, sizes, subject.shape)
        return prompts

    def _check_positions(
        self,
        data: Data,
        questions: Questions,
        sizes: Sequence[tuple[int, int]],
        shape: AnyShape | None,
    ) -> None:
        prompt, new = max(sizes, key=sum)
        if shape and prompt + new > shape.max_positions:
            name = questions.task or data.spec.called
            own = f", or ask the own dataset: evaluator.{self.name}.tasks=[]" if self.tasks else ""
            raise UserError(
                f"{name}: a prompt of {prompt} tokens and an answer of up to {new} are more than "
                f"the {shape.max_positions} positions of the model.",
                f"{questions.shorten}, or evaluator.{self.name}.max_new_tokens{own}.",
            )

    # -- metrics -------------------------------------------------------------------------------

    def _add(
        self,
        result: Result,
        subject: Subject,
        questions: Questions,
        answers: Sequence[generate.Generated],
    ) -> None:
        grades = [questions.grade(i, a.text) for i, a in enumerate(answers)]
        for grade, answer in zip(grades, answers, strict=True):
            grade["output_tokens"] = float(len(answer.ids))
            grade["truncated"] = float(not answer.ended)
        for metric in grades[0]:
            values, ids, clusters = flattened(
                [g[metric] for g in grades], [q.id for q in questions.asked]
            )
            result.add_items(
                subject,
                "generation",
                metric,
                values,
                ids,
                unit="tokens" if metric == "output_tokens" else "",
                split=questions.split,
                task=questions.task,
                clusters=clusters,
            )
        if questions.left_out:
            result.metrics.append(
                Metric(
                    "left_out",
                    questions.left_out,
                    "questions",
                    subject.point.name,
                    questions.split,
                    obtained="counted",
                    task=questions.task,
                )
            )
        rows = [
            {"id": q.id, "prompt": q.prompt, "text": a.text, **grade}
            for q, a, grade in zip(questions.asked, answers, grades, strict=True)
        ]
        subject.keep(questions.task or questions.split, rows)


def flattened(
    values: Sequence[float | list[float]], ids: Sequence[str]
) -> tuple[list[float], list[str], list[int]]:
    """Return values, ids and clusters; the values that one item has several of are its cluster."""
    lists = [v if isinstance(v, list) else [v] for v in values]
    several = any(isinstance(v, list) for v in values)
    return (
        [x for part in lists for x in part],
        [
            f"{i}:{n}" if several else i
            for i, part in zip(ids, lists, strict=True)
            for n in range(len(part))
        ],
        [place for place, part in enumerate(lists) for _ in part] if several else [],
    )


def end_tokens(subject: Subject) -> frozenset[int]:
    """Return the tokens that end a text, after the tokenizer and the model's own settings."""
    settings: Any = getattr(subject.model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    found = [subject.data.tokenizer.eos_token_id, *listed]
    return frozenset(int(t) for t in found if t is not None)


def _prompt_ids(tokenizer: Any, questions: Questions, kind: ModelKind) -> list[list[int]]:
    """Return the tokens of each question's prompt, as a kind of model reads it."""
    from effbench.data.tokens import Encoder

    encoder = Encoder(tokenizer)
    texts = [encoder.context(q.prompt, q.special) for q in questions.asked]
    return [kind.prompt(ids, encoder.end) for ids in texts]
