"""Multiple-choice questions: pairs whose wrong answers are known too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from effbench.api.spec import DatasetSpec
from effbench.data.kinds.pairs import Pairs
from effbench.data.render import Place, Text, clean, columns_of, content_hash
from effbench.util.errors import UserError


class Choices(Pairs):
    """Prompt and answers, by `dataset.prompt`, `dataset.choices` and `dataset.label`."""

    choices: ClassVar[bool] = True
    templates: ClassVar[tuple[str, ...]] = ("prompt", "choices", "choices_field")

    def render(self, place: Place, spec: DatasetSpec) -> Text | None:
        """Return a row's prompt, its answers and which is right."""
        prompt = place.fill(spec.prompt)
        answers = _answers(place, spec)
        right = _right(place, spec, answers)
        columns = columns_of(place, spec, self.columns)
        id_ = content_hash(prompt, *answers)
        return Text(id_, prompt, answers[right], tuple(answers), right, columns=columns)

    def source(self, place: Place, spec: DatasetSpec) -> tuple[dict[str, str], dict[str, str]]:
        """Return what the templates of prompt and answers are filled with."""
        if spec.choices_field:
            answers = [clean(str(choice)) for choice in _listed(place, spec, "choices_field")]
        else:
            answers = ["\x1f".join(place.values(one).values()) for one in spec.choices]
        return place.values(spec.prompt), {f"{n}": answer for n, answer in enumerate(answers)}


def _answers(place: Place, spec: DatasetSpec) -> list[str]:
    if not spec.choices_field:
        return [place.answer(template) for template in spec.choices]
    if len(spec.choices) != 1:
        raise UserError("dataset.choices must be one template when choices_field is set.")
    listed = _listed(place, spec, "choices_field")
    return [place.answer(spec.choices[0], choice=choice) for choice in listed]


def _right(place: Place, spec: DatasetSpec, answers: Sequence[str]) -> int:
    label = place.field(spec.label, "dataset.label")
    if spec.label_names:
        listed = _listed(place, spec, "label_names")
        if label not in listed:
            raise UserError(f"{place.where}: label {label!r} is not among {listed}.")
        return listed.index(label)
    right = (_by_name if spec.labels == "names" else _index)(label, answers)
    if right is None:
        what = "" if spec.labels == "names" else "no index, no letter and "
        raise UserError(
            f"{place.where}: label {label!r} is {what}none of the answers: "
            f"{', '.join(answer.strip()[:20] for answer in answers)}.",
            "Write dataset.choices as the labels are, or name a field that lists the names of the "
            "answers: dataset.label_names",
        )
    if not 0 <= right < len(answers):
        raise UserError(f"{place.where}: label {label} is not one of {len(answers)} answers.")
    return right


LETTER = re.compile(r"\s*\(?([A-Za-z])[).:]?\s*")
"""A letter that names an answer: B, (B), b."""


def _index(label: Any, answers: Sequence[str]) -> int | None:
    """Return the place of an answer that a label means, A is 0; None where it means none."""
    if isinstance(label, str) and (named := _named(label, answers)) is not None:
        return named
    if isinstance(label, str) and (letter := LETTER.fullmatch(label)):
        return ord(letter[1].upper()) - ord("A")
    try:
        right = int(label)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if isinstance(label, float) and label != right else right


def _named(label: str, answers: Sequence[str]) -> int | None:
    """Return the place of the one answer that is a label's text, unless that is a number."""
    said = [answer.strip() for answer in answers]
    text = label.strip()
    return said.index(text) if said.count(text) == 1 and not text.isdigit() else None


SAID = {True: ("true", "yes"), False: ("false", "no")}
"""What a label that is true or false may be called."""


def labels_of(spec: DatasetSpec) -> Literal["places", "names"]:
    """Return how labels are read that could be a place as well as a name; see `DatasetSpec`."""
    texts = [template.strip().casefold() for template in spec.choices]
    if spec.choices_field or spec.label_names or any("{" in text for text in texts):
        return "places"
    places = [str(n) for n in range(len(texts))], [chr(ord("a") + n) for n in range(len(texts))]
    like = any(text.isdigit() or LETTER.fullmatch(text) for text in texts) and texts not in places
    turned = len(texts) == 2 and texts[0] in SAID[True] and texts[1] in SAID[False]
    return "names" if like or turned else "places"


def _by_name(label: Any, answers: Sequence[str]) -> int | None:
    """Return the place of the answer that a label says, else the place that only it can mean."""
    said = [answer.strip().casefold() for answer in answers]
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    text = str(label).strip().casefold()
    called = next((names for names in SAID.values() if text in names), (text,))
    if len(found := [n for n, answer in enumerate(said) if answer in called]) == 1:
        return found[0]
    alike = LETTER.fullmatch if LETTER.fullmatch(text) else str.isdigit
    return None if any(map(alike, said)) else _index(label, answers)


def _listed(place: Place, spec: DatasetSpec, setting: str) -> list[Any]:
    """Return the list in the field that a setting names."""
    dotted = getattr(spec, setting)
    value = place.field(dotted, f"dataset.{setting}")
    if isinstance(value, str | bytes | dict) or not hasattr(value, "__iter__"):
        raise UserError(
            f"{place.where}: {dotted!r} is {value!r}, which is no list.",
            "Name a field that lists the answers.",
        )
    return list(value)
