"""What a model makes of long texts: where it finds what was said, and what more context is worth.

Each length is a row of its own in the record. **Questions** (`effbench.evaluators.needles`) are
answered by the method's own decoding session, after a prompt of exactly so many tokens. **Loss** is
that of the same tokens of the split, the last of texts that reach back so many tokens: what carries
no loss is the prompt, so that a cache which drops parts of prompts is seen as it decodes. **Bytes**
are those of the cache's own tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from effbench.api.batch import by_length
from effbench.api.cost import cache_bytes
from effbench.api.footprint import Pass
from effbench.api.schema import NonNegativeInt, PositiveInt, digest
from effbench.evaluators import answers, needles, windows
from effbench.evaluators.base import Evaluator, Result, exponential
from effbench.evaluators.subject import Subject
from effbench.nn.decode.not_followed import not_followed
from effbench.results.records import Metric
from effbench.util.errors import UserError
from effbench.util.lazy import torch

if TYPE_CHECKING:
    from effbench.api.shape import AnyShape
    from effbench.api.spec import Spec
    from effbench.data.dataset import Data
    from effbench.methods.base import Method

HERE = "evaluator.long_context"


@dataclass(frozen=True)
class LongContext(Evaluator):
    """Exact match of answers, loss and bytes of cache, by the length of the context."""

    headline: ClassVar[str] = "exact_match"
    gives: ClassVar[tuple[str, ...]] = ("kv_saved",)
    trial: ClassVar[dict[str, Any]] = {
        "lengths": [128],
        "tasks": ["needle"],
        "items": 2,
        "scored_tokens": 4,
    }

    lengths: tuple[PositiveInt, ...] = (512, 1024)
    """Tokens of context, a question's answer included."""
    tasks: tuple[needles.Task, ...] = needles.TASKS
    """Which questions: `needle`, `keys`, `variables`; none asks nothing."""
    items: PositiveInt = 20
    """Questions of each task and length, and texts whose loss is taken."""
    keys: PositiveInt = 4
    """Names and numbers in a text of `keys`, one of which is asked for."""
    hops: PositiveInt = 2
    """Assignments from one variable to the next in `variables`."""
    scored_tokens: NonNegativeInt = 64
    """Last tokens of each text of the split that are scored; 0 takes no loss."""
    split: str = "test"
    """Whose rows, one after the other, make the texts."""
    batch_tokens: PositiveInt = 4096
    """Largest batch in tokens; a longer text goes alone."""
    seed: NonNegativeInt = 0
    """Of the questions, which are the same in runs of any seed."""

    def splits(self) -> tuple[str, ...]:
        """Return the dataset's split, if a loss is taken."""
        return (self.split,) if self.scored_tokens else ()

    def check(self, spec: Spec, methods: Sequence[Method], shape: AnyShape | None) -> None:
        """Refuse empty lists, what is named twice, and lengths that are too short or too long."""
        if not self.lengths or not (self.tasks or self.scored_tokens):
            raise UserError(
                f"{HERE} has nothing to do.",
                f"Give lengths and tasks: '{HERE}.lengths=[1024]' '{HERE}.tasks=[needle]'",
            )
        for name, listed in (("lengths", self.lengths), ("tasks", self.tasks)):
            if len(set(listed)) < len(listed):
                raise UserError(f"{HERE}.{name} names something twice.", "Once will do.")
        if shape and max(self.lengths) > shape.max_positions:
            raise UserError(
                f"{HERE}.lengths: {max(self.lengths)} tokens are more than the "
                f"{shape.max_positions} positions of the model.",
                f"Lower it, to {shape.max_positions} or less.",
            )
        if self.scored_tokens >= min(self.lengths):
            raise UserError(
                f"{HERE}.scored_tokens={self.scored_tokens} leaves no context in "
                f"{min(self.lengths)} tokens.",
                f"Lower it: {HERE}.scored_tokens={min(self.lengths) // 2}",
            )

    def check_data(self, data: Data, shape: AnyShape | None) -> None:
        """Refuse lengths that are too short for a question, and a split that is too short."""
        for length in self.lengths:
            for task in self.tasks:
                self._items(task, length, data)
        if self.scored_tokens:
            self._texts(data)

    def passes(self, spec: Spec, data: Data | None = None) -> list[Pass]:
        """Return a full batch of the longest questions, and one of the longest texts."""
        length = max(self.lengths)
        rows = min(self.items, max(1, self.batch_tokens // length))
        found = [Pass("prefill", rows, length, rows), Pass("decode", rows, length, rows)]
        scored = rows * self.scored_tokens
        return found * bool(self.tasks) + [Pass("score", rows, length, scored)] * bool(scored)

    def run(self, subject: Subject) -> Result:
        """Return `exact_match`, `kv_bytes`, `kv_saved`, `loss` and `perplexity` by length.

        Raises:
            UserError: When a question does not fit its length, or the split has too few tokens.
        """
        result = Result()
        for length in self.lengths:
            held = [self._ask(result, subject, task, length) for task in self.tasks]
            if held:
                _add_bytes(result, subject, length, max(held))
            if self.scored_tokens:
                self._score(result, subject, length)
        result.notes += not_followed(subject.model) if self.tasks else []
        return result

    # -- questions -----------------------------------------------------------------------------

    def _ask(self, result: Result, subject: Subject, task: needles.Task, length: int) -> float:
        """Add the answers of one task and length; return the most bytes of cache of a sequence."""
        asked, new = self._items(task, length, subject.data)
        name = f"{task}-{length}"
        found = self._answers(subject, name, asked, new)
        values = [float(item.right(text)) for item, (text, _) in zip(asked, found, strict=True)]
        ids = [item.id for item in asked]
        result.add_items(subject, "long_context", "exact_match", values, ids, task=name)
        rows = [
            {"id": x.id, "depth": x.depth, "answer": x.answer, "text": text, "exact_match": value}
            for x, (text, _), value in zip(asked, found, values, strict=True)
        ]
        subject.keep(name, rows)
        return max(held for _, held in found)

    def _items(self, task: needles.Task, length: int, data: Data) -> tuple[list[needles.Item], int]:
        """Return the questions of one task and length, and how many tokens to decode for each."""
        sizes = needles.Sizes(self.keys, self.hops)
        return needles.items(task, length, self.items, data.tokenizer, sizes=sizes, seed=self.seed)

    def _answers(
        self, subject: Subject, name: str, asked: Sequence[needles.Item], new: int
    ) -> list[tuple[str, float]]:
        """Return each answer, and the most bytes of cache that a sequence of its batch had."""
        sizes = [len(item.ids) + new for item in asked]
        journal = subject.journal(name, [item.id for item in asked])
        for group in journal.pending(list(by_length(sizes, self.batch_tokens))):
            texts, held = answers.answers(subject, [asked[i].ids for i in group], new)
            journal.add({i: [text, held] for i, text in zip(group, texts, strict=True)})
            subject.progress(f"long_context {name}", len(journal), len(asked))
        return [(text, held) for text, held in journal.values()]

    # -- loss ----------------------------------------------------------------------------------

    def _score(self, result: Result, subject: Subject, length: int) -> None:
        """Add the loss of the last tokens of texts of one length."""
        texts, name = [ids[-length:] for ids in self._texts(subject.data)], f"text-{length}"
        head = result.add_items(
            subject,
            "long_context",
            "loss",
            self._losses(subject, name, texts),
            [digest(text) for text in texts],
            unit="nats/token",
            split=self.split,
            task=name,
        )
        value, low, high = map(exponential, (head.value, head.low, head.high))
        result.metrics.append(
            Metric("perplexity", value, "", head.point, head.split, head.n, low, high, task=name)
        )

    def _losses(self, subject: Subject, name: str, texts: Sequence[list[int]]) -> list[float]:
        """Return the mean loss of each text's last tokens, in nats per token."""
        length, scored = len(texts[0]), self.scored_tokens
        ids = [digest(text) for text in texts]
        journal = subject.journal(name, ids)
        for group in journal.pending(list(by_length(list(map(len, texts)), self.batch_tokens))):
            rows = [(texts[i], [-100] * (length - scored) + texts[i][-scored:]) for i in group]
            with torch.inference_mode():
                sums = subject.token_nll(subject.batch(rows)).double().sum(1).tolist()
            journal.add(dict(zip(group, sums, strict=True)))
            subject.progress(f"long_context {name}", len(journal), len(texts))
        return [nll / scored for nll in journal.values()]

    def _texts(self, data: Data) -> list[list[int]]:
        """Return texts of the longest length, whose last tokens are the same at every length."""
        stream = [token for row in data.documents(self.split) for token in row.ids]
        longest = max(self.lengths)
        if len(stream) < longest:
            raise UserError(
                f"Split {self.split!r} has {len(stream)} tokens, and {HERE}.lengths asks for texts "
                f"of {longest}.",
                f"Give it more rows, dataset.limit.{self.split}; or {HERE}.scored_tokens=0.",
            )
        return windows.spread(stream, longest, self.scored_tokens, self.items)


def _add_bytes(result: Result, subject: Subject, length: int, held: float) -> None:
    """Add the bytes of one sequence's cache, and what share of a full one they are not."""
    point, task = subject.point.name, f"length-{length}"
    result.metrics.append(Metric("kv_bytes", held, "bytes", point, task=task))
    if subject.shape:
        full = cache_bytes(subject.shape, subject.dtype, length - 1)
        result.metrics.append(Metric("kv_saved", 1 - held / full, "", point, task=task))
