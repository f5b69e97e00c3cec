"""A row's fields as text, by the templates of a dataset: what is missing or no text is refused."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from string import Formatter
from typing import Any

from effbench.api.spec import DatasetSpec
from effbench.data.readers import Row
from effbench.util.errors import UserError, did_you_mean

Turn = tuple[str, str]
"""Who speaks (`system`, `user` or `assistant`), and what."""
Message = Mapping[str, Any]
"""A turn as chat templates take it: `role`, `content`, perhaps `tool_calls`."""


@dataclass(frozen=True)
class Conversation:
    """Turns, and the tools that the assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Text:
    """One rendered row, before tokens."""

    id: str
    """What it is known by; decides its place among the rows, and where it makes pairs."""
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    right: int = 0
    turns: tuple[Turn, ...] = ()
    """The prompt as a conversation, where the row has one."""
    conversation: Conversation | None = None
    """All of the row, where it is a conversation that ends with the answer."""
    columns: Mapping[str, float] = field(default_factory=dict)
    """Further values of the row by name."""
    rendered: str = field(default="", compare=False)
    """Hash of its texts; empty where that is what it is known by."""
    group: str = field(default="", compare=False)
    """Rows with the same are never dealt into different splits; empty for none but itself."""
    sources: tuple[Mapping[str, str], Mapping[str, str]] = field(default=({}, {}), compare=False)
    """The values of the row that the prompt, or a text, is made of, by field; and the answers'."""

    @property
    def asked(self) -> tuple[str, ...]:
        """Hashes of the values that the prompt, or a text, is made of; see `traces`."""
        return traces(self.sources[0])

    @property
    def answered(self) -> tuple[str, ...]:
        """The same of the answers."""
        return traces(self.sources[1])

    @property
    def right_source(self) -> Mapping[str, str]:
        """The values of the right answer alone, by field; empty where the words are no field's."""
        values = self.sources[1]
        if len(values) != len(self.choices):
            return values
        return dict([list(values.items())[self.right]]) if values else {}

    @property
    def alike(self) -> str:
        """The same for rows that differ in white space alone, where values are what counts."""
        return source_hash(*map(_tidied, self.sources)) if self.group else self.id

    @property
    def asks_alike(self) -> str:
        """The same for rows whose prompts do; see `alike`."""
        return group_hash(*map(_tidied, self.sources)) if self.group else self.id

    def asked_in_chat(self) -> str | tuple[Turn, ...] | Conversation:
        """Return what a model is asked with, as `chat_prompt` takes it."""
        if self.conversation is None:
            return self.turns or self.prompt
        return replace(self.conversation, messages=self.conversation.messages[:-1])

    def shown(self, room: int = 100) -> str:
        """Return it on one line, where line ends can be told from other text."""
        answer = repr(self.answer[:room])
        return f"{self.prompt[-room:]!r} -> {answer}" if self.prompt else answer


class MissingError(UserError):
    """A row lacks a value, or has an empty one, where its kind needs text."""


@dataclass(frozen=True)
class Place:
    """A row, with where it stands, for messages."""

    row: Row
    where: str
    """Number, split and dataset."""
    missing: str = "refuse"
    """As `DatasetSpec.missing`."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """What each template is given by, for messages."""

    def fill(self, template: str) -> str:
        """Return a template filled with the row's fields.

        Raises:
            MissingError: When a field is null or not a number.
            UserError: When a field is not there, or holds what is no text.
        """
        return self._filled(template, self.row)

    def fill_with(self, template: str, **more: Any) -> str:
        """Return a template filled with the row's fields and some more; see `fill`."""
        return self._filled(template, {**self.row, **more})

    def answer(self, template: str, **more: Any) -> str:
        """Return a filled template that must hold something to be predicted; see `fill`.

        Raises:
            MissingError: When there is nothing but white space.
        """
        text = self.fill_with(template, **more)
        self.require(text, template)
        return text

    def values(self, *templates: str) -> dict[str, str]:
        """Return the values that templates are filled with, by the fields they stand in."""
        found = {}
        for template in templates:
            for name in _fields_in(template, _odd(self.row)):
                found[name] = clean(str(self._value(name, self.row, template)))
        return dict(sorted(found.items()))

    def require(self, text: str, what: str) -> None:
        """Refuse an answer of nothing but white space.

        Raises:
            MissingError: That names it.
        """
        if not text.strip():
            raise MissingError(
                f"{self.where}: the answer {what!r} is empty.",
                "Mend the row, or leave such rows out: dataset.missing=skip",
            )

    def field(self, dotted: str, setting: str = "") -> Any:
        """Return the value of a field, perhaps inside another.

        Args:
            dotted: Its name.
            setting: What names it, for messages.

        Raises:
            MissingError: When it is null or not a number.
            UserError: When it is not there.
        """
        value: Any = self.row
        for part in [dotted] if dotted in self.row else dotted.split("."):
            if not isinstance(value, dict) or part not in value:
                known = value if isinstance(value, dict) else self.row
                hint = f" Name yours: {setting}=FIELD" if setting else ""
                hint = f"{did_you_mean(part, known)}{hint}"
                raise UserError(f"{self.where} has no field {dotted!r}.", hint)
            value = value[part]
        if is_missing(value):
            raise self._missing(dotted, text=False)
        return value

    def number(self, dotted: str, setting: str = "") -> float:
        """Return the number in a field.

        Raises:
            UserError: As `field`, and when it is none.
        """
        value = self.field(dotted, setting)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{self.where}: {dotted!r} is {_shown(value)}, no number.")
        return number

    def without(self, name: str) -> str:
        """Return the text that a field without a value stands for.

        Raises:
            MissingError: When it stands for none.
        """
        if self.missing != "empty":
            raise self._missing(name)
        return ""

    def _missing(self, name: str, text: bool = True) -> MissingError:
        return MissingError(
            f"{self.where}: the field {name!r} has no value.",
            "Mend the row, or say what such a field stands for: dataset.missing=empty for an empty "
            "text, dataset.missing=skip to leave the row out."
            if text
            else "Mend the row, or leave such rows out: dataset.missing=skip",
        )

    def _filled(self, template: str, row: Row) -> str:
        try:
            if (parts := _parts(template, _odd(row))) is None:
                return clean(_Strict(self, template).vformat(template, (), row))
            text = "".join(
                [p if f is None else p + format(self._value(f, row, template)) for p, f in parts]
            )
        except (ValueError, IndexError) as error:
            raise UserError(f"{template!r} is no template: {error}.", "Double {{ and }}.") from None
        return clean(text)

    def _value(self, name: str, row: Any, template: str) -> Any:
        """Return the value at `field` or `field[key][0]` of a row, which a template needs."""
        first, *keys = (name,) if name in row else _path(name)
        value = self._inside(row, first, row, template)
        for key in keys:
            value = self._inside(value, key, value, template)
        if isinstance(value, str):
            return value
        if is_missing(value):
            return self.without(name)
        if isinstance(value, float) and math.isinf(value):
            raise UserError(f"{self.where}: the field {name!r} is {value}.", "Mend the row.")
        if hasattr(value, "__iter__"):
            raise UserError(
                f"{self.where}: the field {name!r} is {_shown(value)}, which is no text.",
                "Name what is inside it, as in {field[0]} or {field[name]}.",
            )
        return value

    def _inside(self, value: Any, key: str, known: Any, template: str) -> Any:
        if isinstance(value, Mapping) and key in value:
            return value[key]
        if isinstance(value, list | tuple) and key.isdecimal() and int(key) < len(value):
            return value[int(key)]
        hint = did_you_mean(key, known if isinstance(known, Mapping) else self.row)
        first, *inner = key.split(".")
        if inner and first in self.row:
            hint = f"A field inside another is {{{first}{''.join(f'[{k}]' for k in inner)}}}."
        if setting := self.settings.get(template):
            hint += f" The template is dataset.{setting}."
        raise UserError(f"{self.where} has no field {key!r}, which {template!r} needs.", hint)


class _Strict(Formatter):
    """Python's templates without attributes, and without values that are no text."""

    def __init__(self, place: Place, template: str) -> None:
        self.place, self.template = place, template

    def get_field(self, name: str, args: Any, row: Any) -> Any:
        """Return the value at `field` or `field[key][0]`, and the field."""
        return self.place._value(name, row, self.template), _path(name)[0]


def _odd(row: Row) -> frozenset[str]:
    """Return the names of fields in which Python's templates would see more than a name."""
    return frozenset(name for name in row if not FORMS.isdisjoint(name))


FORMS = frozenset("!:[")
Parsed = tuple[str, str | None, str | None, str | None]


@cache
def _parsed(template: str, odd: frozenset[str]) -> tuple[Parsed, ...]:
    """Return a template's texts with field, form and conversion after each, odd names whole."""
    names = dict[str | None, str]()
    for number, name in enumerate(sorted(odd)):
        names[mark := f"\x00{number}"] = name
        template = re.sub(rf"(?<!\{{)\{{{re.escape(name)}\}}", f"{{{mark}}}", template)
    return tuple((t, names.get(n, n), f, c) for t, n, f, c in Formatter().parse(template))


@cache
def _parts(template: str, odd: frozenset[str]) -> tuple[tuple[str, str | None], ...] | None:
    """Return a template's texts, each with the field after it; None where a field has a form."""
    parsed = _parsed(template, odd)
    if any(name == "" or form or conversion for _, name, form, conversion in parsed):
        return None
    return tuple((text, name) for text, name, _, _ in parsed)


@cache
def _path(name: str) -> tuple[str, ...]:
    """Return the field and the keys in `field[key][0]`."""
    return tuple(part.removesuffix("]") for part in name.split("["))


@cache
def _fields_in(template: str, odd: frozenset[str]) -> tuple[str, ...]:
    """Return the names of fields in a template, those in forms of other fields included."""
    found = list[str]()
    for _, name, form, _ in _parsed(template, odd):
        found += ([name] if name else []) + ([*_fields_in(form, odd)] if form else [])
    return tuple(found)


def is_missing(value: Any) -> bool:
    """Whether a value is none: null, or what pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def clean(text: str) -> str:
    """Return a text in which half a surrogate pair, which UTF-8 has no bytes for, is U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def content_hash(*parts: str) -> str:
    """Return the identity of a row with these texts, 16 hexadecimal digits."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def source_hash(asked: Mapping[str, str], answered: Mapping[str, str]) -> str:
    """Return the identity of a row that is made of these values."""
    return content_hash(*asked.values(), "", *answered.values())


def group_hash(asked: Mapping[str, str], answered: Mapping[str, str]) -> str:
    """Return the identity of what a row of these values asks; of its answer if it asks nothing."""
    return content_hash(*(asked or answered).values())


def _tidied(values: Mapping[str, str]) -> dict[str, str]:
    return {name: tidy(value) for name, value in values.items()}


def tidy(text: str) -> str:
    """Return a text in which white space does not count: one blank for each stretch of it."""
    return " ".join(text.split())


SHORT = 16
"""Characters of a value that can be the same by chance."""


def traces(values: Mapping[str, str]) -> tuple[str, ...]:
    """Return hashes by which the values of a row are found again in other rows.

    White space does not count, nor does the field that a value stands in, unless it is short.
    """
    words = _tidied(values).items()
    kept = (w if len(w) >= SHORT else f"{name}\x1f{w}" for name, w in words if w)
    return tuple(sorted({content_hash(word)[:12] for word in kept}))


def columns_of(place: Place, spec: DatasetSpec, own: tuple[str, ...]) -> dict[str, float]:
    """Return the numbers in the columns that a dataset names, but for those of its kind.

    Raises:
        UserError: When a row has no number there.
    """
    return {
        name: place.number(column, f"dataset.columns.{name}")
        for name, column in sorted(spec.columns.items())
        if name not in own
    }
