"""Best of n: of several answers that a policy writes, the one that the run's model scores highest.

The policy writes `n` answers to each prompt by sampling; the method's own score, the reward of a
reward model, picks one of the first 1, 2, 4, ... n. Of the pick there is what `generation` says of
an answer, and the score itself. A pick of one is the policy alone; any model has scores, so that
the likelihood of an untrained one is a baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge

from effbench.api.batch import by_length, collate
from effbench.api.examples import Example, Tokens
from effbench.api.points import UNNAMED
from effbench.api.schema import NonNegativeFloat, PositiveInt
from effbench.evaluators.base import Result
from effbench.evaluators.generation import Generation
from effbench.evaluators.subject import Subject
from effbench.methods.none import Unchanged
from effbench.nn.decode.not_followed import not_followed
from effbench.nn.scoring import finite
from effbench.util.errors import UserError
from effbench.util.lazy import torch

if TYPE_CHECKING:
    from effbench.api.footprint import Pass
    from effbench.api.spec import Spec
    from effbench.data.dataset import Data
    from effbench.evaluators.questions import Questions
    from effbench.nn.decode.generate import Generated


@dataclass(frozen=True)
class BestOfN(Generation):
    """How good the best-scored of n sampled answers is."""

    headline: ClassVar[str] = "exact_match"
    trial: ClassVar[dict[str, Any]] = {"n": 2, "limit": 3, "max_new_tokens": 4}

    tasks: tuple[str, ...] = field(default=())
    """lm-eval's generation tasks; none asks the prompts of the run's own dataset."""
    temperature: NonNegativeFloat | None = 1.0
    """Of sampling, above 0."""
    n: Annotated[int, Ge(2)] = 8
    """Answers to each prompt; of the first 1, 2, 4, ... n the best is picked."""
    policy: str = ""
    """Config name of the model that writes; empty for the one that the run started from."""
    score_tokens: PositiveInt = 2048
    """Largest batch of answers to be scored, in tokens."""

    def __post_init__(self) -> None:
        if not self.temperature:
            raise UserError(
                "evaluator.best_of_n.temperature=0 writes the same answer n times.",
                "Set it above 0.",
            )

    def others(self) -> tuple[str, ...]:
        """Return the policy, where it is another model."""
        return (self.policy,) if self.policy else ()

    def holds(self, spec: Spec) -> tuple[str, ...]:
        """Return the policy; where none is named it is the model that the run started from."""
        return (self.policy,)

    def passes(self, spec: Spec, data: Data | None = None) -> list[Pass]:
        """Return those of `generation`, and a full batch of answers that are scored."""
        from effbench.api.footprint import Pass
        from effbench.evaluators.questions import NEW_TOKENS

        length = spec.dataset.max_length + (self.max_new_tokens or NEW_TOKENS)
        rows = max(1, self.score_tokens // length)
        return [*super().passes(spec, data), Pass("score", rows, length, rows * length)]

    @property
    def sizes(self) -> list[int]:
        """1, 2, 4, ... n."""
        return [*(2**k for k in range(self.n.bit_length()) if 2**k < self.n), self.n]

    def run(self, subject: Subject) -> Result:
        """Return, for each size, the metrics of `generation` and the score of what is picked.

        Raises:
            UserError: As `generation` does.
        """
        named = self.policy
        model = subject.load_model(named) if named else subject.load_base()
        writer = replace(subject, model=model, method=Unchanged(), point=UNNAMED)
        result = Result()
        for questions in self._questions(subject.data):
            drawn = [self._draw(writer, questions, k) for k in range(self.n)]
            scores = self._scores(subject, questions, drawn)
            for size in self.sizes:
                self._add_picks(result, subject, questions, drawn[:size], scores[:size])
        result.notes += not_followed(model)
        return result

    def _draw(self, writer: Subject, questions: Questions, place: int) -> list[Generated]:
        """Return an answer to each question, from a seed of the draw's own."""
        journal = writer.journal
        own = replace(
            writer,
            seed=writer.seed * 100_003 + place,
            journal=lambda name, items: journal(f"{name} {place}", items),
        )
        return self._answers(own, questions)

    def _scores(
        self, subject: Subject, questions: Questions, drawn: Sequence[Sequence[Generated]]
    ) -> torch.Tensor:
        """Return the score of each draw's answer to each question, [n, questions]."""
        asked = self._prompts(subject, questions)
        end = subject.data.tokenizer.eos_token_id
        texts = []
        for answers in drawn:
            for prompt, answer in zip(asked, answers, strict=True):
                ids = [*prompt.ids, *answer.ids]
                whole = [*ids, end] if answer.ended and end is not None and ids[-1] != end else ids
                texts.append(Tokens(whole, len(prompt.ids), 0))
        found: dict[int, float] = {}
        for group in by_length([len(t.ids) for t in texts], self.score_tokens):
            rows = [Example(str(i), (texts[i],)) for i in group]
            batch = collate(rows, subject.pad_token_id).to(subject.device)
            run = partial(subject.method.scores, subject.model, batch, subject.point)
            with torch.inference_mode():
                scores = run()
                finite.require_finite(subject.model, scores, run)
            found |= dict(zip(group, scores.tolist(), strict=True))
            subject.progress("best_of_n scores", len(found), len(texts))
        return torch.tensor([found[i] for i in range(len(texts))]).view(len(drawn), -1)

    def _add_picks(
        self,
        result: Result,
        subject: Subject,
        questions: Questions,
        drawn: Sequence[Sequence[Generated]],
        scores: torch.Tensor,
    ) -> None:
        """Add what the best-scored of some draws is, under names that end in how many they are."""
        picks = scores.argmax(0).tolist()
        grades = [questions.grade(i, drawn[k][i].text) for i, k in enumerate(picks)]
        for grade, score in zip(grades, scores.amax(0).tolist(), strict=True):
            grade["score"] = score
        for metric in grades[0]:
            result.add_items(
                subject,
                "best_of_n",
                f"{metric}_best_of_{len(drawn)}",
                [_mean(grade[metric]) for grade in grades],
                [q.id for q in questions.asked],
                split=questions.split,
                task=questions.task,
            )


def _mean(value: float | list[float]) -> float:
    """Return a grade; the mean of one that has several counts."""
    return value if isinstance(value, float) else sum(value) / len(value)
