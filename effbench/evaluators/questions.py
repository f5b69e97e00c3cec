"""What a model is asked to write an answer to, when it may stop, and how the answer is graded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from effbench.api.schema import digest
from effbench.data.dataset import Data
from effbench.data.tokens import chat_prompt, moved
from effbench.util.errors import UserError

if TYPE_CHECKING:
    from effbench.data.lm_eval_tasks import BenchmarkTask

NEW_TOKENS = 256
"""Most tokens of an answer, where a task does not say (lm-eval's own default)."""

IFEVAL_TOKENS = 1280
"""Most tokens of an answer to IFEval, as lm-eval has it."""

Grades = dict[str, float | list[float]]
"""Value by metric; a list where one answer is graded on several counts."""


@dataclass(frozen=True)
class Question:
    """One prompt, and until when the model goes on."""

    id: str
    """Content hash, 16 hexadecimal digits."""
    prompt: str
    until: tuple[str, ...] = ()
    """Strings at which the answer ends."""
    max_new_tokens: int = NEW_TOKENS
    temperature: float = 0.0
    special: bool = True
    """Whether the tokenizer puts its own special tokens around the prompt."""


@dataclass(frozen=True)
class Questions:
    """A set of questions with one way to grade them."""

    task: str
    """Name of the benchmark; empty for the run's own dataset."""
    split: str
    asked: list[Question]
    grade: Callable[[int, str], Grades]
    """From a question's index and the text of its answer."""
    shorten: str = ""
    """What makes the prompts shorter, for messages."""
    left_out: int = 0
    """Questions that cannot be graded here."""


# -- the run's own dataset -----------------------------------------------------------------------


def of_dataset(data: Data, split: str, limit: int | None, pattern: str) -> Questions:
    """Return the prompts of a split; the right answer is that of the row.

    Args:
        data: Of kind `pairs` or `choices`.
        split: Which split.
        limit: Only the first rows.
        pattern: Regular expression of what counts in an answer: its last match, or the first group
            of it. Empty when the whole answer counts, but for white space around it.

    Raises:
        UserError: When the pattern finds no text in a row's own answer: in any other it might find
            as little, which would be right.
    """
    rows, chat = data.rows(split)[:limit], data.spec.chat
    for row in rows:
        if not extracted(row.answer, pattern):
            raise UserError(
                f"evaluator.generation.pattern={pattern!r} matches nothing in the answer "
                f"{row.answer[:60]!r} of dataset {data.spec.called!r}.",
                "Correct the pattern, so that it cannot match the empty text, or leave it out.",
            )
    prompts = [
        chat_prompt(r.asked_in_chat(), data.tokenizer) if chat else moved(r.prompt, "")[0]
        for r in rows
    ]
    asked = [
        Question(r.id, prompt, special=not chat) for r, prompt in zip(rows, prompts, strict=True)
    ]

    def grade(index: int, text: str) -> Grades:
        right = extracted(rows[index].answer, pattern)
        return {"exact_match": float(extracted(text, pattern) == right)}

    return Questions("", split, asked, grade, "Give shorter prompts")


def extracted(text: str, pattern: str) -> str | None:
    """Return what counts in an answer; None when the pattern matches nothing.

    Args:
        text: The answer.
        pattern: As for `of_dataset`.
    """
    if not pattern:
        return text.strip()
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    last = matches[-1]
    return (last[1] or "") if last.re.groups else last[0]


# -- lm-eval's tasks -----------------------------------------------------------------------------


def of_task(task: BenchmarkTask, chat: Any = None) -> Questions:
    """Return the questions of a task as lm-eval asks and grades them.

    Args:
        task: Of output type `generate_until`.
        chat: Tokenizer whose chat template takes each prompt as the user's turn; None for the
            prompts as they are.
    """
    asked = []
    for id_, instances in zip(task.ids, task.instances(), strict=True):
        prompt, settings = instances[0].args
        if chat is not None:
            prompt = chat_prompt(prompt, chat)
        asked.append(_question(id_, prompt, settings, special=chat is None))

    def grade(index: int, text: str) -> Grades:
        found = task.results(index, [text])
        return {_metric(name): _plain(value) for name, value in found.items()}

    return Questions(task.name, task.split, asked, grade, "Lower evaluator.generation.num_fewshot")


def of_ifeval(rows: Sequence[Mapping[str, Any]], limit: int | None, chat: Any = None) -> Questions:
    """Return IFEval's questions, judged by the rules of `ifeval`.

    Args:
        rows: With the columns of the published file.
        limit: Only the first rows.
        chat: As for `of_task`.
    """
    from effbench.evaluators import ifeval

    kept = [row for row in rows[:limit] if ifeval.supported(row)]
    asked = [
        Question(
            digest(row),
            row["prompt"] if chat is None else chat_prompt(row["prompt"], chat),
            max_new_tokens=IFEVAL_TOKENS,
            special=chat is None,
        )
        for row in kept
    ]

    def grade(index: int, text: str) -> Grades:
        return ifeval.grades(kept[index], text)

    left_out = len(rows[:limit]) - len(kept)
    return Questions("ifeval", "train", asked, grade, "Give shorter prompts", left_out)


def _question(id_: str, prompt: str, settings: Mapping[str, Any], special: bool) -> Question:
    """Return a question with lm-eval's settings for its answer."""
    until = settings.get("until") or []
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    longest = next((settings[n] for n in names if settings.get(n)), NEW_TOKENS)
    greedy = settings.get("do_sample") is False
    return Question(
        id_,
        prompt,
        tuple([until] if isinstance(until, str) else until),
        int(longest),
        0.0 if greedy else float(settings.get("temperature") or 0.0),
        special,
    )


def _metric(name: str) -> str:
    """Return lm-eval's `metric,filter` as one word."""
    return name.replace(",", "_").replace("-", "_")


def _plain(value: Any) -> float | list[float]:
    if isinstance(value, list | tuple):
        return [float(v) for v in value]
    return float(value)
