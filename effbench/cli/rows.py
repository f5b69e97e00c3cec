"""Rows of a dataset as a model sees them: in its template, as tokens, and which of them count."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from effbench.api.examples import IGNORED, Example, Tokens
from effbench.api.shape import ModelShape
from effbench.api.spec import Spec
from effbench.data.dataset import Data, first_text
from effbench.data.kinds.base import find
from effbench.data.tokenise import as_read
from effbench.data.tokens import with_template
from effbench.models.load import known_shape, load_tokenizer
from effbench.nn.model_kinds.base import find as find_model
from effbench.util.errors import printable
from effbench.util.hf import quiet

COUNTS = ("\033[1;32m", "\033[0m")
"""Colour of what has a loss, and of nothing."""
BRACKETS = ("[", "]")
Marks = tuple[str, str]


def rows(spec: Spec, count: int, colour: bool, width: int, split: str = "") -> Iterator[str]:
    """Yield the first rows of a split as text.

    Args:
        spec: Whose dataset, and whose model's tokenizer.
        count: How many.
        colour: Whether what counts is coloured, and not in brackets.
        width: Of a line, in characters.
        split: Its name; empty for the training rows, else for the first split that has rows.

    Raises:
        UserError: When the rows or the tokenizer cannot be had.
    """
    with quiet():
        yield from _rows(spec, count, colour, width, split)


def _rows(spec: Spec, count: int, colour: bool, width: int, split: str) -> Iterator[str]:
    data = Data(spec.dataset, load_tokenizer(spec.model), known_shape(spec.model), spec.seed)
    if not split:
        filled = [name for name, texts in data.texts.items() if texts] or [*data.texts]
        split = "train" if "train" in filled else filled[0]
    kind, texts = find(spec.dataset.kind), data.rows(split)
    chosen = texts if kind.packs else texts[:count]
    examples = kind.examples(chosen, spec.dataset, data.tokenizer)[:count]
    speaks = data.model is None or find_model(data.model.kind).speaks
    for number, example in enumerate(as_read(examples, data.model, data.tokenizer), 1):
        head = f"row {number} of {split}, {example.id}"
        yield shown(head, example, data.tokenizer, COUNTS if colour else BRACKETS, width, speaks)


@quiet()
def first(spec: Spec, colour: bool, width: int) -> str:
    """Return the first row that is read as text; empty where it holds nothing. See `rows`."""
    text, tokenizer = first_text(spec.dataset), load_tokenizer(spec.model)
    if text is None:
        return ""
    tokenizer = with_template(tokenizer, spec.dataset.template)
    shape = known_shape(spec.model)
    model = ModelShape.of(shape) if shape else None
    made = find(spec.dataset.kind).examples([text], spec.dataset, tokenizer)
    [example, *_] = as_read(made, model, tokenizer)
    speaks = model is None or find_model(model.kind).speaks
    return shown("the first row", example, tokenizer, COUNTS if colour else BRACKETS, width, speaks)


def shown(
    head: str, example: Example, tokenizer: Any, marks: Marks, width: int, speaks: bool = True
) -> str:
    """Return a row as text: how many tokens, what they say, and which they are.

    Args:
        head: What stands before it.
        example: The row.
        tokenizer: Its own.
        marks: Around what counts.
        width: Of a line, in characters.
        speaks: Whether what counts is text, and not the number of a class.
    """
    tokens = example.sequences[0]
    counted = f"{len(tokens.ids)} tokens, {example.loss_tokens} of them count"
    lost = f", {sum(tokens.cut)} more were cut" if any(tokens.cut) else ""
    others = len(example.choices) - 1
    beside = f", {others} other answer{'s'[others == 1 :]}" if others > 0 else ""
    lines = [f"{head}: {counted}{lost}{beside}", *_said(tokens, tokenizer, marks, speaks)]
    return "\n".join((*lines, *_numbers(tokens, marks, width)))


def _runs(tokens: Tokens) -> Iterator[tuple[bool, list[int]]]:
    """Yield the tokens in runs that count, or do not; the first predicts nothing."""
    labels = [IGNORED, *tokens.labels()[1:]]
    pairs = zip(labels, tokens.ids, strict=True)
    for counts, members in groupby(pairs, lambda pair: pair[0] != IGNORED):
        yield counts, [token for _, token in members]


def _said(tokens: Tokens, tokenizer: Any, marks: Marks, speaks: bool) -> list[str]:
    start, stop = marks
    text = ""
    for counts, ids in _runs(tokens):
        said = printable(tokenizer.decode(ids)) if speaks or not counts else f" class {ids[0]}"
        text += start + said.replace("\n", f"{stop}\n{start}") + stop if counts else said
    return [f"  | {line}" for line in text.replace(start + stop, "").split("\n")]


def _numbers(tokens: Tokens, marks: Marks, width: int) -> list[str]:
    """Return the tokens in lines; a mark has no width where it is a colour."""
    words = [(counts, ids) for counts, ids in _runs(tokens)]
    text = " ".join(_run(counts, ids, BRACKETS) for counts, ids in words)
    lines = textwrap.wrap(text, max(20, width - 4), break_long_words=False)
    return [f"  # {line}" for line in _coloured(lines, marks)]


def _run(counts: bool, ids: Sequence[int], marks: Marks) -> str:
    numbers = " ".join(map(str, ids))
    return f"{marks[0]}{numbers}{marks[1]}" if counts else numbers


def _coloured(lines: Sequence[str], marks: Marks) -> Iterator[str]:
    """Yield lines with other marks than brackets, closed at each end and opened again."""
    if marks == BRACKETS:
        yield from lines
        return
    inside = False
    for line in lines:
        begun = marks[0] if inside else ""
        inside = line.rfind("[") > line.rfind("]") or (inside and "]" not in line)
        yield begun + line.replace("[", marks[0]).replace("]", marks[1]) + marks[1] * inside
