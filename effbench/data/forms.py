"""Which form rows have, by the names of their fields: what `dataset.kind=auto` stands for.

Only what cannot be meant in another way is recognised; the rest is for templates to say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effbench.api.spec import DatasetSpec
from effbench.data.readers import Row, read_rows
from effbench.util.errors import UserError

LETTERS = "ABCDEFGH"
QUESTIONS = ("question", "query", "prompt", "input")
ANSWERS = ("answer", "response", "completion", "output", "target")
LISTS = ("choices", "options")
LABELS = ("label", "answer", "answerKey", "answer_key", "gold")


@dataclass(frozen=True)
class Form:
    """A kind of dataset, and the settings by which it reads rows of some fields."""

    kind: str
    what: str
    """In words."""
    settings: Mapping[str, Any] = field(default_factory=dict)


def recognised(values: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the settings of a dataset with a kind, and a line that says how it was found.

    Args:
        values: Settings of `DatasetSpec`, of kind `auto` or another.

    Raises:
        UserError: When the fields of the rows are no form that is known.
    """
    if values.get("kind") != "auto":
        return dict(values), ""
    found, line = _recognised(values)
    kind = found["kind"]
    if values.get("attributes") and kind in ("pairs", "preference"):
        found["kind"] = "rated"
        line = line.replace(f"dataset.kind={kind}", "dataset.kind=rated")
    return found, line


def _recognised(values: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    if kind := _by_templates(values):
        return {**values, "kind": kind}, ""
    path = _first_file(values)
    try:
        row = first_row_of(path, values) if path else None
    except UserError:
        row = None
    if path is None or row is None:  # what is wrong is said where the files are read
        return {**values, "kind": "pairs"}, ""
    form = form_of(row)
    if form is None and {"prompt", "answer"} & row.keys():  # the other is missing, or misspelt
        return {**values, "kind": "pairs"}, ""
    if form is None:
        raise _unknown(path, row, values)
    words = "".join(f" dataset.{key}={value!r}" for key, value in form.settings.items())
    line = f"{path.name}: {form.what}, so dataset.kind={form.kind}{words}"
    return {**values, "kind": form.kind, **form.settings}, line


def _by_templates(values: Mapping[str, Any]) -> str:
    """Return the kind whose templates or columns are given; empty where none is."""
    given = {name for name in TEMPLATES if values.get(name, DEFAULTS[name]) != DEFAULTS[name]}
    kinds = {"choices": "choices", "choices_field": "choices", "text": "text"}
    found = [kind for name, kind in kinds.items() if name in given]
    if not given - {"prompt"}:
        columns = {"messages": "chat", "chosen": "preference", "rejected": "preference"}
        found = [kind for name, kind in columns.items() if name in values.get("columns", {})]
    return found[0] if found else "pairs" if given else ""


DEFAULTS = {
    name: getattr(DatasetSpec("", "file", ""), name)
    for name in ("text", "prompt", "answer", "choices", "choices_field")
}
TEMPLATES = tuple(DEFAULTS)


def _first_file(values: Mapping[str, Any]) -> Path | None:
    files = values.get("files")
    if values.get("source") != "file" or not isinstance(files, dict) or not files:
        return None
    first = next(iter(files.values()))
    first = first[0] if isinstance(first, list) and first else first
    path = Path(str(first)).expanduser()
    return path if path.is_file() else None


_SEEN: dict[tuple[str, int, int], Row] = {}


def first_row_of(path: Path, values: Mapping[str, Any]) -> Row:
    """Return the first row of a file; kept while the file stays as it is.

    Raises:
        UserError: When the file cannot be read.
    """
    facts = path.stat()
    key = (str(path.resolve()), facts.st_mtime_ns, facts.st_size)
    if key not in _SEEN:
        _SEEN[key] = read_rows(path, values.get("documents", "paragraph"))[0]
    return _SEEN[key]


def form_of(row: Row) -> Form | None:
    """Return the form of a row; None where its fields do not say."""
    return next((form for rule in RULES if (form := rule(row)) is not None), None)


def _unknown(path: Path, row: Row, values: Mapping[str, Any]) -> UserError:
    names = ", ".join(map(repr, row))
    first, last = next(iter(row), "FIELD"), next(reversed(row), "FIELD")
    return UserError(
        f"The rows of {path} have the fields {names}, which are no form that is known.",
        "Say how a row becomes a prompt and an answer: "
        f"""'dataset.prompt="{{{first}}}"' 'dataset.answer=" {{{last}}}"'; """
        f"{_as_classes(read_rows(path, values.get('documents', 'paragraph')))}"
        "or what it is: dataset.kind=text, pairs, chat, alpaca, choices or preference",
    )


MOST_CLASSES = 20


def _as_classes(rows: Sequence[Row]) -> str:
    """Return how rows are texts with classes, where they look like it: a column of few names."""
    found: dict[str, set[str]] = {}
    for name in rows[0]:
        column = [row.get(name) for row in rows]
        if all(isinstance(value, str) and value.strip() for value in column):
            found[name] = {value.strip() for value in column if isinstance(value, str)}
    label = min(found, key=lambda name: len(found[name]), default="")
    classes = sorted(found.get(label, ()))
    if not 2 <= len(classes) <= min(MOST_CLASSES, len(rows) // 2):
        return ""
    text = max(found, key=lambda name: len(found[name]))
    answers = ", ".join(json.dumps(f" {name}", ensure_ascii=False) for name in classes)
    return (
        f"what class it is of: dataset.kind=choices dataset.label={label} "
        f"""'dataset.prompt="{{{text}}}"' 'dataset.choices=[{answers}]'; """
    )


# -- one rule a form, the first that fits ----------------------------------------------------------


def _preference(row: Row) -> Form | None:
    if {"chosen", "rejected"} <= row.keys():
        return Form("preference", "a chosen and a rejected answer")
    return None


def _chat(row: Row) -> Form | None:
    found = [name for name in ("messages", "conversations") if isinstance(row.get(name), list)]
    return Form("chat", f"conversations ({found[0]})") if found else None


def _alpaca(row: Row) -> Form | None:
    if {"instruction", "output"} <= row.keys():
        return Form("alpaca", "instructions with an output")
    return None


def _choices(row: Row) -> Form | None:
    question, label = _one(row, ("question",)), _one(row, LABELS)
    if question is None or label is None:
        return None
    settings: dict[str, Any] = {"prompt": "Question: {question}\nAnswer:", "label": label}
    lettered = [letter for letter in LETTERS if letter in row]
    if len(lettered) > 1 and lettered == list(LETTERS[: len(lettered)]):
        choices = [f" {{{letter}}}" for letter in lettered]
        return Form("choices", "questions with lettered answers", {**settings, "choices": choices})
    name = _one(row, LISTS)
    if name is None:
        return None
    settings |= {"choices": [" {choice}"], "choices_field": name}
    if isinstance(row[name], dict) and {"text", "label"} <= row[name].keys():
        settings |= {"choices_field": f"{name}.text", "label_names": f"{name}.label"}
    elif not isinstance(row[name], list):
        return None
    return Form("choices", "questions with listed answers", settings)


def _pairs(row: Row) -> Form | None:
    if {"prompt", "answer"} <= row.keys():
        return Form("pairs", "a prompt and an answer")
    question, answer = _one(row, QUESTIONS), _one(row, ANSWERS)
    if question is None or answer is None:
        return None
    if question == "question":
        settings = {"prompt": "Question: {question}\nAnswer:", "answer": f" {{{answer}}}"}
    elif answer == "completion":
        settings = {"prompt": f"{{{question}}}", "answer": "{completion}"}
    else:
        settings = {"prompt": f"{{{question}}}\n", "answer": f"{{{answer}}}"}
    return Form("pairs", f"a {question} and its {answer}", settings)


def _text(row: Row) -> Form | None:
    if "text" in row and not {*QUESTIONS, *ANSWERS, "label"} & row.keys():
        return Form("text", "texts")
    return None


def _one(row: Row, names: tuple[str, ...]) -> str | None:
    """Return the only one of some names that a row has."""
    found = [name for name in names if name in row]
    return found[0] if len(found) == 1 else None


RULES: tuple[Callable[[Row], Form | None], ...] = (
    _preference,
    _chat,
    _alpaca,
    _choices,
    _pairs,
    _text,
)
