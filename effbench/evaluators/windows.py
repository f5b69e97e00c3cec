"""Rows that are longer than a model's context, scored window by window.

The windows of a row of n tokens, at most W of them in one window and a stride of S:

    first:  tokens 0 .. W        scores tokens 1 .. W
    next:   the W tokens up to e + S      scores tokens e .. e + S      e: where the last one ended

So every token but the first is scored exactly once, each after the first window with at least
W - S tokens before it, and no window reaches into another row. lm-eval's rolling log-likelihood
has the same windows at a `max_length` of W - 1 (it does not count the last token, which is only
predicted) and S = W - 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from effbench.api.batch import by_length
from effbench.api.examples import IGNORED, Example
from effbench.api.footprint import Pass
from effbench.api.shape import AnyShape, ModelShape
from effbench.data.dataset import Data
from effbench.nn.model_kinds.base import find
from effbench.util.errors import UserError


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop` of a row, of which those from `first` on are scored."""

    row: int
    """Index of the row."""
    start: int
    first: int
    stop: int

    def sequence(self, example: Example) -> tuple[list[int], list[int]]:
        """Return the window's ids and labels, -100 on what it does not score."""
        labels = example.labels()[self.first : self.stop]
        return (
            example.ids[self.start : self.stop],
            [IGNORED] * (self.first - self.start) + labels,
        )

    def name(self, example: Example) -> str:
        """Return an id that tells it from all other windows of the same rows."""
        return f"{example.id}:{self.start}:{self.first}:{self.stop}"


def spans(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield `(start, first, stop)` of each window of a row of `length` tokens."""
    stop = min(window, length)
    yield 0, 1, stop
    while stop < length:
        first, stop = stop, min(stop + stride, length)
        yield stop - window, first, stop


def cut(
    examples: Sequence[Example], window: int, stride: int, model: ModelShape | None = None
) -> list[Window]:
    """Return the windows of all rows; those that would score nothing are left out.

    Args:
        examples: The rows.
        window: Most tokens of a window.
        stride: Tokens that a window after the first one scores; less than `window`.
        model: Where rows of its kind are not read window by window, each is a window.
    """
    if not _slides(model):
        window = max((e.longest for e in examples), default=window)
    return [
        Window(row, start, first, stop)
        for row, example in enumerate(examples)
        for labels in [example.labels()]
        for start, first, stop in spans(len(labels), window, stride)
        if any(label != IGNORED for label in labels[first:stop])
    ]


def passes(
    data: Data | None, split: str, window: int, stride: int, batch_tokens: int
) -> list[Pass]:
    """Return the batches of windows that a split makes, or the largest possible one without data.

    Args:
        data: The run's own.
        split: Which split.
        window: Most tokens of a window.
        stride: As for `cut`.
        batch_tokens: Largest batch of several windows.
    """
    if data is None:
        largest = max(window, batch_tokens)
        return [Pass("score", 1, largest, largest)]
    examples = data.documents(split)
    windows = cut(examples, window, stride, data.model)
    labels = [w.sequence(examples[w.row])[1] for w in windows]
    counted = [sum(label != IGNORED for label in row[1:]) for row in labels]
    return [
        Pass("score", len(group), len(labels[group[0]]), sum(counted[i] for i in group))
        for group in groups(windows, batch_tokens)
    ]


def groups(windows: Sequence[Window], batch_tokens: int) -> list[list[int]]:
    """Return which windows are computed together, each batch at most `batch_tokens`."""
    return list(by_length([w.stop - w.start for w in windows], batch_tokens))


def _slides(model: ModelShape | None) -> bool:
    """Whether a model reads rows that are too long window by window."""
    return model is None or find(model.kind).windows


def spread(stream: Sequence[int], length: int, step: int, most: int) -> list[list[int]]:
    """Return texts of one length that end at even distances in a stream of tokens.

    Args:
        stream: At least `length` tokens.
        length: Of each text.
        step: What distances are multiples of, so that the last `step` tokens of texts differ.
        most: Texts; fewer where there are not so many such ends.
    """
    spare = (len(stream) - length) // step
    count = min(most, spare + 1)
    ends = [length + (i * spare // max(1, count - 1)) * step for i in range(count)]
    return [list(stream[end - length : end]) for end in ends]


def sizes(window: int | None, stride: int | None, max_length: int) -> tuple[int, int]:
    """Return window and stride with their defaults: the dataset's longest sequence, half of it."""
    window = window or max_length
    return window, stride or max(1, window // 2)


def check_sizes(
    where: str, window: int | None, stride: int | None, max_length: int, shape: AnyShape | None
) -> None:
    """Refuse a window that the model has no positions for, and a stride that leaves no context.

    Args:
        where: What the two settings stand under, for messages.
        window: As set; null is `max_length`.
        stride: As set.
        max_length: The dataset's longest sequence.
        shape: The model's shape; None when it is not known.

    Raises:
        UserError: Naming the setting.
    """
    size, step = sizes(window, stride, max_length)
    if shape and size > shape.max_positions:
        raise UserError(
            f"{where}.window={size} is more than the {shape.max_positions} positions of the model.",
            f"Lower it: {where}.window={shape.max_positions}",
        )
    if size < 2:
        raise UserError(
            f"{where}.window={size} is too short to predict anything.", "Give at least 2."
        )
    if window and shape and not _slides(ModelShape.of(shape)):
        raise UserError(
            f"{where}.window={size} would cut prompts and answers, which an encoder and a decoder "
            "read apart.",
            f"Leave {where}.window out.",
        )
    if step >= size:
        raise UserError(
            f"{where}.stride={step} leaves no context in windows of {size} tokens.",
            f"Lower it: {where}.stride={size - 1}, or leave it out.",
        )
