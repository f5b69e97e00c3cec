"""Which form rows have, by the names of their fields: what `dataset.kind=auto` stands for.

Only what cannot be meant in another way is recognised; the rest is for templates to say.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    found = dict(_leaves(row)) or {"FIELD": ""}
    texts = [n for n, v in found.items() if isinstance(v, str) and any(map(str.isalpha, v))]
    first = (texts or [*found])[0]
    more = [name for name in (texts if len(texts) > 1 else found) if name != first]
    prompt, answer, text = (
        _word(f"dataset.{setting}", f"{blank}{{{name}}}")
        for setting, blank, name in (
            ("prompt", "", first),
            ("answer", " ", more[-1] if more else first),
            ("text", "", first),
        )
    )
    return UserError(
        f"The rows of {path} have the fields {names}, which are no form that is known.",
        (
            f"Say how a row becomes a prompt and an answer: {prompt} {answer}; "
            if more
            else f"Say what its text is: {text}; "
        )
        + f"{_as_classes(read_rows(path, values.get('documents', 'paragraph')))}"
        "or what it is: dataset.kind=text, pairs, chat, alpaca, choices or preference",
    )


def _word(key: str, value: str) -> str:
    """Return an override of a text, as it is typed in a shell."""
    return shlex.quote(f"{key}={json.dumps(value, ensure_ascii=False)}")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what templates can name within a row, with its value: `field[key][0]`."""
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = list(enumerate(value))[:1]
    elif name:
        yield name, value
    for key, part in inner:
        yield from _leaves(part, f"{name}[{key}]" if name else str(key))


MOST_CLASSES = 20


def _as_classes(rows: Sequence[Row]) -> str:
    """Return how rows are texts with classes, where they look like it: a column of few names."""
    found: dict[str, set[Any]] = {}
    for name in rows[0]:
        column = [row.get(name) for row in rows]
        if all(isinstance(value, str | int) and str(value).strip() for value in column):
            found[name] = {v.strip() if isinstance(v, str) else v for v in column}
    label = min(found, key=lambda name: len(found[name]), default="")
    texts = [name for name in found if all(isinstance(value, str) for value in found[name])]
    classes = found.get(label, set())
    if not texts or not 2 <= len(classes) <= min(MOST_CLASSES, len(rows) // 2):
        return ""
    text = max(texts, key=lambda name: len(found[name]))
    ordered = sorted(classes, key=lambda c: (str(type(c)), c))
    answers = ", ".join(
        json.dumps(f" {str(c).lower() if isinstance(c, bool) else c}", ensure_ascii=False)
        for c in ordered
    )
    return (
        f"what class it is of: dataset.kind=choices {shlex.quote(f'dataset.label={label}')} "
        f"{_word('dataset.prompt', f'{{{text}}}')} {shlex.quote(f'dataset.choices=[{answers}]')}; "
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
