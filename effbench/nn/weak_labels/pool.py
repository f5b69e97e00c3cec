"""The rows that weak labels are made for, and the few whose true labels may be seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effbench.api.examples import Classed, Example, Tokens
from effbench.nn.weak_labels.reading import Reading
from effbench.nn.weak_labels.words import text_words
from effbench.util.errors import UserError

HIDDEN = -1
"""Label of a row whose class nobody may see, or which has none."""


@dataclass(frozen=True)
class Deal:
    """Which rows have labels, and what for; all others are unlabelled."""

    weighed: list[int]
    """Rows that boosting weighs: errors are measured on them, anchors are taken from them."""
    learnt: list[int]
    """Rows that classifiers learn from, thresholds are tuned on, and the oracle sees."""


def deal(rows: int, share: float, bought: int, halves: bool, seed: int) -> Deal:
    """Return which rows have labels, drawn by the seed.

    Args:
        rows: How many there are.
        share: Of the rows, labelled; at least two.
        bought: Further labelled rows, for the second half.
        halves: Whether there is a first half; else all are learnt from.
        seed: Of the draw.
    """
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(2, round(share * rows))
    half = count // 2 if halves else 0
    return Deal(sorted(order[:half]), sorted(order[half : count + bought]))


@dataclass(frozen=True)
class Pool:
    """Rows with what a model made of them. Labels of unlabelled rows are not in it."""

    features: torch.Tensor
    """Mean states of the texts, [N, d] float32."""
    texts: list[str]
    words: list[list[str]]
    """Words of each row, best first."""
    labels: torch.Tensor
    """Class of the labelled rows, [N] int64; HIDDEN for all others."""
    weighed: list[int]
    learnt: list[int]
    answers: list[str]
    """The classes in words."""

    @property
    def unlabelled(self) -> torch.Tensor:
        """Whether each row has no label, [N] bool."""
        return self.labels == HIDDEN


def read(
    examples: Sequence[Example],
    dealt: Deal,
    classes: int,
    reading: Callable[[list[list[int]], list[str]], Reading],
    tokenizer: Any,
    prompted: bool,
) -> Pool:
    """Return rows as models read them, with the labels that may be seen.

    Of an unlabelled row nothing but its prompt and the number of its answers is looked at.

    Args:
        examples: Of kind `choices`.
        dealt: Which rows are labelled.
        classes: Answers that each row must have.
        reading: What models make of prompts, given as tokens and as texts.
        tokenizer: That of the tokens.
        prompted: Whether words are those that a model expects, or those of the text.

    Raises:
        UserError: When a row has another number of answers, or all labels are of one class.
    """
    _check_answers(examples, classes)
    prompts = [e.ids[: e.prompt_length] for e in examples]
    labels = torch.full((len(prompts),), HIDDEN)
    for place in (*dealt.weighed, *dealt.learnt):
        labels[place] = examples[place].right
    _check_labels(labels)
    texts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    found = reading(prompts, texts)
    own = found.words if prompted else [text_words(text) for text in texts]
    shown = examples[dealt.learnt[0]].choices
    said = (c.said if isinstance(c, Classed) else c.ids[c.prompt_length :] for c in shown)
    answers = [tokenizer.decode(ids).strip() for ids in said]
    return Pool(found.features, texts, own, labels, dealt.weighed, dealt.learnt, answers)


def _check_answers(examples: Sequence[Example], classes: int) -> None:
    odd = next((e for e in examples if len(e.choices) != classes), None)
    if odd:
        raise UserError(
            f"A row has {len(odd.choices)} answers, but method.classes={classes}.",
            f"Set method.classes={len(odd.choices)}, if all rows have the same answers.",
        )


def _check_labels(labels: torch.Tensor) -> None:
    seen = labels[labels != HIDDEN]
    if len(seen.unique()) < 2:
        raise UserError(
            f"The {len(seen)} labelled rows are all of one class.",
            "Raise method.labelled, or deal with another seed.",
        )


def stand_in(example: Example, place: int) -> Example:
    """Return what training has of a row that is read already: its place, and no label.

    It has two tokens, one of which counts, because no row may have none.
    """
    first = example.ids[:1] * 2
    return Example(example.id, (Tokens(first, 1, 0),), columns={"place": place})
