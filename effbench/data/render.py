"""Rows to texts, by the templates of a dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from effbench.api.spec import DatasetSpec
from effbench.data.readers import Row
from effbench.util.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Text:
    """One rendered row, before tokens."""

    id: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    right: int = 0


def render(rows: Iterable[Row], spec: DatasetSpec, split: str) -> Iterator[Text]:
    """Yield the rows as text; see `DatasetSpec` for the templates.

    Raises:
        UserError: For a field that a row lacks, or a right answer that is not among the choices.
    """
    for number, row in enumerate(rows, 1):
        where = f"row {number} of split {split!r} of dataset {spec.name!r}"
        if spec.kind == "text":
            body = _fill(spec.text, row, where)
            if body.strip():
                yield Text(_hash("", body), "", body)
            continue
        prompt = _fill(spec.prompt, row, where)
        if spec.kind == "pairs":
            answer = _fill(spec.answer, row, where)
            yield Text(_hash(prompt, answer), prompt, answer)
            continue
        answers = _answers(spec, row, where)
        right = _right(spec, row, len(answers), where)
        yield Text(_hash(prompt, *answers), prompt, answers[right], tuple(answers), right)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def _fill(template: str, row: Row, where: str) -> str:
    try:
        return template.format_map(row)
    except (KeyError, IndexError) as error:
        raise UserError(
            f"{where} has no field {error.args[0]!r}, which {template!r} needs.",
            did_you_mean(str(error.args[0]), row),
        ) from None
    except ValueError as error:
        raise UserError(f"{template!r} is no template: {error}.", "Double {{ and }}.") from None


def _field(row: Row, dotted: str, where: str) -> Any:
    value: Any = row
    for part in dotted.split("."):
        if not isinstance(value, dict) or part not in value:
            known = value if isinstance(value, dict) else row
            raise UserError(f"{where} has no field {dotted!r}.", did_you_mean(part, known))
        value = value[part]
    return value


def _answers(spec: DatasetSpec, row: Row, where: str) -> list[str]:
    if not spec.choices_field:
        return [_fill(template, row, where) for template in spec.choices]
    if len(spec.choices) != 1:
        raise UserError("dataset.choices must be one template when choices_field is set.")
    listed = _field(row, spec.choices_field, where)
    return [_fill(spec.choices[0], {**row, "choice": c}, where) for c in listed]


def _right(spec: DatasetSpec, row: Row, count: int, where: str) -> int:
    label = _field(row, spec.label, where)
    if spec.label_names:
        listed = list(_field(row, spec.label_names, where))
        if label not in listed:
            raise UserError(f"{where}: label {label!r} is not among {listed}.")
        return listed.index(label)
    try:
        right = int(label)
    except (TypeError, ValueError):
        raise UserError(
            f"{where}: label {label!r} is no index.", "Set dataset.label_names."
        ) from None
    if not 0 <= right < count:
        raise UserError(f"{where}: label {right} is not one of {count} answers.")
    return right
