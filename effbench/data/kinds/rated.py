"""Rated answers: prompt, answer and a number for each of some named attributes.

The form of HelpSteer2 and of OpenAssistant's labels. `dataset.attributes` names what is rated, and
`dataset.columns.NAME=FIELD` another field that holds it. A field that is not there, is null, NaN or
empty, or holds -100, is not rated. A row with `chosen` and `rejected` is a pair, read as
`preference` reads it: in the first attribute its answers are rated 4 and 1, in the others not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from effbench.api.examples import CHOSEN, IGNORED, REJECTED, Example
from effbench.api.spec import DatasetSpec
from effbench.data.kinds.base import Kind
from effbench.data.kinds.pairs import Pairs as One
from effbench.data.kinds.preference import Preference as Two
from effbench.data.render import MissingError, Place, Text, is_missing
from effbench.util.errors import UserError, did_you_mean

NOT_RATED = float(IGNORED)


def column(attribute: str) -> str:
    """Return the column of a sequence that has its rating; `NOT_RATED` where it has none."""
    return f"rating {attribute}"


class Rated(Kind):
    """Answers with ratings, by `dataset.prompt`, `dataset.answer` and `dataset.attributes`."""

    rates: ClassVar[bool] = True
    templates: ClassVar[tuple[str, ...]] = ("prompt", "answer", "chat")

    def render(self, place: Place, spec: DatasetSpec) -> Text | None:
        """Return a row's prompt and answer, or both answers, with its ratings as columns.

        Raises:
            UserError: As `pairs` and `preference` do, and for a row without any rating.
        """
        names, (kind, own) = _attributes(spec), _read_as(place, spec)
        text = kind.render(place, own)
        if kind.choices:
            values = [CHOSEN] + [NOT_RATED] * (len(names) - 1)
        else:
            values = [_rating(place, spec, name) for name in names]
            if all(value == NOT_RATED for value in values):
                raise _without(place, spec, names)
        assert text is not None
        ratings = {column(name): value for name, value in zip(names, values, strict=True)}
        return replace(text, columns={**text.columns, **ratings})

    def source(self, place: Place, spec: DatasetSpec) -> tuple[dict[str, str], dict[str, str]]:
        """Return the values of prompt and answer, or answers; ratings are no part of them."""
        kind, own = _read_as(place, spec)
        return kind.source(place, own)

    def examples(self, texts: Sequence[Text], spec: DatasetSpec, tokenizer: Any) -> list[Example]:
        """Return each row's one or two answers as its choices, each with its ratings."""
        both = Two().examples([t for t in texts if t.choices], spec, tokenizer)
        each = One().examples([t for t in texts if not t.choices], spec, tokenizer)
        pairs, alone = iter(both), iter(each)
        names = [column(name) for name in spec.attributes]
        return [_with_ratings(next(pairs if t.choices else alone), names) for t in texts]

    def check(self, splits: Mapping[str, Sequence[Text]], spec: DatasetSpec) -> None:
        """Refuse an attribute that no training row has a rating of."""
        train = splits.get("train", ())
        for name in spec.attributes if train else ():
            if all(text.columns[column(name)] == NOT_RATED for text in train):
                raise UserError(
                    f"dataset.attributes names {name!r}, and no training row has a rating of it.",
                    f"Correct the name, name its field (dataset.columns.{name}=FIELD), or leave "
                    "it out.",
                )


def _read_as(place: Place, spec: DatasetSpec) -> tuple[Kind, DatasetSpec]:
    """Return the kind that reads a row, by whether it has two answers, and the spec that it reads.

    Of columns that has those alone which are the kind's own, or numbers that each row has.
    """
    fields = (spec.columns.get(side, side).split(".")[0] for side in ("chosen", "rejected"))
    pair = not any(is_missing(place.row.get(field)) for field in fields)
    others = [*spec.attributes, *(() if pair else Two.columns)]
    columns = {name: field for name, field in spec.columns.items() if name not in others}
    return Two() if pair else One(), replace(spec, columns=columns)


def _attributes(spec: DatasetSpec) -> list[str]:
    names = spec.attributes
    if not names:
        raise UserError(
            "dataset.kind=rated reads ratings, and dataset.attributes names none.",
            "Name the fields that hold them: 'dataset.attributes=[helpfulness,correctness]'",
        )
    if len(set(names)) < len(names):
        raise UserError(f"dataset.attributes={names} names one twice.", "Once will do.")
    return names


def _rating(place: Place, spec: DatasetSpec, name: str) -> float:
    """Return the rating of an attribute; `NOT_RATED` where there is none."""
    field, value = spec.columns.get(name, name), place.row
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None  # type: ignore[assignment]
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        return NOT_RATED
    return place.number(field)


def _without(place: Place, spec: DatasetSpec, names: Sequence[str]) -> MissingError:
    gone = [n for n in names if spec.columns.get(n, n).split(".")[0] not in place.row]
    guess = f"{did_you_mean(gone[0], place.row)} " if gone else ""
    return MissingError(
        f"{place.where} has no rating of {', '.join(names)}.",
        f"{guess}Name another field (dataset.columns.{names[0]}=FIELD), mend the row, or leave "
        "such rows out: dataset.missing=skip",
    )


def _with_ratings(example: Example, names: Sequence[str]) -> Example:
    """Return an example with the ratings among its columns on its answers, which are its choices.

    Those of a pair are of the chosen answer, and the other one is `REJECTED` where that is rated.
    """
    ratings = {name: example.columns[name] for name in names}
    rest = {k: v for k, v in example.columns.items() if k not in ratings}
    others = {k: v if v == NOT_RATED else REJECTED for k, v in ratings.items()}
    first, *more = example.choices or example.sequences
    choices = (replace(first, columns=ratings), *(replace(c, columns=others) for c in more))
    return replace(example, sequences=choices[:1], choices=choices, columns=rest)
