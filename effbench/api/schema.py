"""Typed dataclasses from plain mappings: checked, frozen, and with errors a person can act on."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import json
import math
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval

from effbench.util.errors import UserError, did_you_mean, require_unicode

T = TypeVar("T")
UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
"""What pydantic calls an unknown key; often the reason why another one is missing."""

LARGEST = 2**53
"""Integers below are the same in every reader of JSON."""
PositiveInt = Annotated[int, Interval(gt=0, lt=LARGEST)]
NonNegativeInt = Annotated[int, Interval(ge=0, lt=LARGEST)]
Seed = Annotated[int, Interval(ge=0, lt=2**63)]
"""What every random generator takes."""
Layers = Annotated[int, Interval(gt=0, le=2**16)]
Threads = Annotated[int, Interval(ge=0, le=4096)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
Decay = Annotated[float, Interval(ge=0, lt=1)]
Bits = Annotated[int, Interval(ge=2, le=8)]
ESCAPES = "escapes"
ModelText = Annotated[str, ESCAPES]
r"""What a model reads or writes: typed in a command, \n in it is a line end."""


@cache
def escaped(cls: type) -> frozenset[str]:
    """Return the fields of a dataclass that hold `ModelText`, or several."""

    def holds(hint: Any) -> bool:
        return ESCAPES in getattr(hint, "__metadata__", ()) or any(map(holds, get_args(hint)))

    hints = get_type_hints(cls, include_extras=True)
    return frozenset(f.name for f in dataclasses.fields(cls) if holds(hints[f.name]))


def build(cls: type[T], values: dict[str, Any], where: str, file: str = "") -> T:
    """Return `cls(**values)` with every value checked against its annotation.

    Args:
        cls: A dataclass.
        values: Plain JSON-like values.
        where: The place in the config, for messages (`method`, `train`, …).
        file: The file that they were read from, which `where` begins with; empty where they are
            words of a command.

    Raises:
        UserError: For an unknown key, a missing key, a wrong type or an impossible value.
    """
    try:
        text = json.dumps(values, allow_nan=False)
        checked: T = _adapter(cls).validate_json(text, strict=True)
        return checked
    except (TypeError, ValueError) as error:
        from pydantic import ValidationError

        if isinstance(error, ValidationError):
            _require_unicode(values, where)
            first = min(error.errors(), key=lambda e: e["type"] not in UNKNOWN)
            raise _explain(cls, first, where, file) from None
        place, value = next(_unwritable(values, where), (where, None))
        if value is None:
            raise UserError(f"{place} holds a value that JSON cannot hold: {error}.") from None
        raise UserError(f"{place}={value} is not possible: it has to be a finite number.") from None


WRITE_UTF8 = "Write it in UTF-8; a file whose name is not needs another name."


def _require_unicode(value: Any, place: str) -> None:
    """Refuse text that is not UTF-8, wherever it stands in plain values.

    Raises:
        UserError: That names its place in the config.
    """
    if isinstance(value, str):
        require_unicode(value, place, WRITE_UTF8)
    elif isinstance(value, dict):
        for key, inner in value.items():
            _require_unicode(str(key), place)
            _require_unicode(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            _require_unicode(inner, place)


def _unwritable(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield the numbers that JSON cannot hold, each with its place in the config."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _unwritable(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _unwritable(inner, place)


_ADAPTERS: dict[type, Any] = {}


def _adapter(cls: type) -> Any:
    if cls not in _ADAPTERS:
        from pydantic import ConfigDict, TypeAdapter

        for part in _dataclasses_in(cls):
            part.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def _dataclasses_in(cls: type) -> set[type]:
    found = {cls}
    for hint in get_type_hints(cls).values():
        for part in (hint, *getattr(hint, "__args__", ())):
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                found |= _dataclasses_in(part)
    return found


_LISTS = ("list_type", "tuple_type", "set_type", "frozen_set_type")
"""What pydantic calls one value in the place of several."""


def _explain(cls: type, error: Any, where: str, file: str) -> UserError:
    loc = [str(p) for p in error["loc"]]
    place = ".".join([where, *loc] if where else loc)
    if error["type"] in UNKNOWN:
        return UserError(f"Unknown key {place!r}.", did_you_mean(loc[-1], _names_in(cls, loc[:-1])))
    if error["type"].startswith("missing"):
        if isinstance(error["loc"][-1], int):
            list_ = place.rpartition(".")[0]
            return UserError(f"{list_}={json.dumps(error['input'])} has too few values.")
        said = f"{place.removeprefix(f'{file}.')}: VALUE" if file else f"{place}=VALUE"
        hint = f"Write it into {file}: {said}" if file else f"Set it, for example {said}."
        return UserError(f"{place} is missing.", hint)
    given = error.get("input")
    if error["type"] in _LISTS and not isinstance(given, Mapping):
        said = f"{place}={given} is not possible: it has to be a list."
        line = f"{place.removeprefix(f'{file}.')}: [{given}]" if file else ""
        hint = f"Write it so in {file}: {line}" if file else f"Write '{place}=[{given}]'."
        return UserError(said, hint)
    reason = error["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:]
    shown = "null" if given is None else repr(given)
    hint = "In a file, text that looks like a number has to stand in quotes."
    return UserError(
        f"{place}={shown} is not possible: {reason}.",
        hint if error["type"] == "string_type" and isinstance(given, int | float) else "",
    )


def _names_in(cls: type, path: list[str]) -> list[str]:
    """Return the fields of the dataclass that stands at a path in another.

    Args:
        cls: The other one.
        path: Names of fields; after one that holds several, a key or an index.
    """
    several = False
    for name in path:
        if several:
            several = False
            continue
        hint = get_type_hints(cls).get(name)
        parts = (hint, *getattr(hint, "__args__", ()))
        inner = [p for p in parts if isinstance(p, type) and dataclasses.is_dataclass(p)]
        if not inner:
            return []
        cls, several = inner[0], get_origin(hint) in (dict, list, tuple)
    return [f.name for f in dataclasses.fields(cls)]


_LEAVES = frozenset({str, int, float, bool, type(None)})


_FIELDS: dict[type, tuple[str, ...] | None] = {}


def _field_names(kind: type) -> tuple[str, ...] | None:
    """Return the names of a dataclass's fields; None for another type."""
    if kind not in _FIELDS:
        known = dataclasses.is_dataclass(kind)
        _FIELDS[kind] = tuple(f.name for f in dataclasses.fields(kind)) if known else None
    return _FIELDS[kind]


def plain(value: Any) -> Any:
    """Return a dataclass, mapping or sequence as plain JSON values, tuples as lists."""
    kind = type(value)
    if kind in _LEAVES:
        return value
    if (names := _field_names(kind)) is not None:
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def canonical(value: Any) -> str:
    """Return the canonical JSON of `value`: sorted keys, no spaces, one form per number."""
    return json.dumps(_one_form(plain(value)), sort_keys=True, separators=(",", ":"))


def _one_form(value: Any) -> Any:
    """Return plain values with whole numbers as integers."""
    kind = type(value)
    if kind is dict:
        return {k: _one_form(v) for k, v in value.items()}
    if kind is list:
        return [_one_form(v) for v in value]
    if kind is float:
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    return value


def digest(value: Any, length: int = 16) -> str:
    """Return the first `length` hexadecimal digits of the SHA-256 of canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:length]


def field_docs(cls: type) -> dict[str, str]:
    """Return the docstring that follows each field of a dataclass, base classes included."""
    docs: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        if part is object or not dataclasses.is_dataclass(part):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                docs[field.target.id] = inspect.cleandoc(text.value.value)
    return docs
