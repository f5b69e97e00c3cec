"""A page about one method, model, dataset or evaluator."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from effbench.api import registry
from effbench.api.plugins import make_method
from effbench.api.schema import LARGEST, field_docs
from effbench.api.shape import Shape
from effbench.api.spec import Plugin
from effbench.config import files as conf_files
from effbench.config.composed import settings_of
from effbench.methods.chain import inference_cost, resolved
from effbench.util.errors import UserError
from effbench.util.wrap import joined


def describe(kind: str, name: str, extra: Sequence[Path] = ()) -> str:
    """Return a page about one thing.

    Raises:
        UserError: When there is none of that name.
    """
    known = conf_files.options(kind, extra)
    if name not in known:
        raise conf_files.unknown(kind, name, known)
    if kind in ("method", "evaluator"):
        return _plugin(kind, name)
    path = known[name]
    assert path is not None
    values = yaml.safe_load(path.read_text())
    lines = [f"{name}: {conf_files.summary(path)}", ""]
    return "\n".join(lines) + yaml.safe_dump(values, sort_keys=False, default_flow_style=None)


def _plugin(kind: str, name: str) -> str:
    cls = registry.find(conf_files.PLUGGED[kind], name)
    module = __import__(cls.__module__, fromlist=["_"])
    text = (module.__doc__ or "").strip()
    lines = [f"{name}", "", joined(text) if sys.stdout.isatty() else text, ""]
    if kind == "method":
        lines += _method_facts(cls)
    prefix = "method" if kind == "method" else f"evaluator.{name}"
    lines += ["Settings", *_settings(cls, prefix)]
    return "\n".join(lines)


def _method_facts(cls: Any) -> list[str]:
    lines = []
    if cls.paper:
        told = (cls.paper.title, cls.paper.venue, cls.paper.identifier)
        lines.append(f"Paper      {'. '.join(filter(None, told))}")
    lines.append(f"Command    effbench {cls.stage} method={cls.name}")
    lines.append(f"Starts on  {', '.join(sorted(cls.accepts))} linear layers")
    lines.append(f"Leaves     {cls.produces} ones")
    try:
        method = resolved(make_method(Plugin(cls.name, cls.needs)), EXAMPLE)
        points = [p.name or "one" for p in method.points()]
        lines.append(f"Points     {', '.join(points)}")
        cost = inference_cost([method], EXAMPLE, "bfloat16", method.default_point())
        lines.append(f"Saving     {cost.saving}")
    except UserError:
        pass  # a setting without a default, which `needs` does not name
    return [*lines, ""]


def _settings(cls: Any, prefix: str) -> list[str]:
    docs, hints = field_docs(cls), get_type_hints(cls, include_extras=True)
    lines = []
    for field in dataclasses.fields(cls):
        default, told = settings_of(cls)[field.name], values_in_words(hints[field.name])
        lines.append(f"  {prefix}.{field.name} = {_word(default)}  ({told})")
        if docs.get(field.name):
            lines.append("      " + " ".join(docs[field.name].split()))
    return lines or ["  none"]


def _word(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True).strip()
    return text.removesuffix("...").strip()


PLAIN = {int: "integer", float: "number", bool: "true or false", str: "text", NoneType: "null"}
BOUNDS = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}


def values_in_words(hint: Any) -> str:
    """Return which values a setting takes, from its annotation: `integer above 0`."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " ".join([values_in_words(parts[0]), *_bounds(parts[1:])])
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (tuple, list):
        kinds = dict.fromkeys(values_in_words(part) for part in parts if part is not Ellipsis)
        return f"list of {', '.join(kinds)}" if kinds else "list"
    if origin in (Union, UnionType):
        return " or ".join(map(values_in_words, parts))
    return PLAIN.get(hint, "mapping" if origin is dict else "any")


def _bounds(constraints: Sequence[Any]) -> list[str]:
    """Return bounds in words, but for those that nobody reaches."""
    named = [(word, getattr(c, key, None)) for c in constraints for key, word in BOUNDS.items()]
    return [f"{word} {value:g}" for word, value in named if value is not None and value < LARGEST]


EXAMPLE = Shape(
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32000,
)
"""A 7B shape, on which a method says what kind of saving it makes."""
