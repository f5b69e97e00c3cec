"""Finds methods and evaluators by name: one file and config each, or an entry point.

A room's files are in any folder below it; one without a config of its name is no plug-in, but what
others use.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from effbench.util.errors import UserError, did_you_mean
from effbench.util.offered import docstring, offered
from effbench.util.package_data import conf_dir, only_class

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Kind = Literal["methods", "evaluators"]


def names(kind: Kind) -> tuple[str, ...]:
    """Return all names of a kind, sorted, without importing any of them."""
    return tuple(sorted({*_own(kind), *plugins(kind)}))


@cache
def _own(kind: Kind) -> dict[str, Path]:
    """Return the files of effbench's own by name: those in the room that have a config."""
    room, configs = Path(__file__).parents[1] / kind, conf_dir() / kind.removesuffix("s")
    files = {p.stem: p for p in sorted(room.rglob("*.py"))}
    return {p.stem: files[p.stem] for p in configs.glob("*.yaml") if p.stem in files}


def plugins(kind: Kind) -> dict[str, EntryPoint]:
    """Return what other packages offer through the entry point group `effbench.<kind>`."""
    return offered(kind)


@cache
def find(kind: Kind, name: str) -> Any:
    """Return the class called `name`.

    Raises:
        UserError: When there is none, or when its file does not hold exactly one.
    """
    if name in plugins(kind):
        cls = plugins(kind)[name].load()
    elif name in names(kind):
        cls = _class_in(kind, name)
    else:
        known = names(kind)
        raise UserError(f"There is no {kind[:-1]} called {name!r}.", did_you_mean(name, known))
    return _named(cls, name)


def _named(cls: Any, name: str) -> Any:
    """Return a class with its name; a subclass where it has another entry point's name already."""
    if vars(cls).get("name") not in (None, "", name):
        cls = type(cls)(
            cls.__name__, (cls,), {"__module__": cls.__module__, "__doc__": cls.__doc__}
        )
    cls.name = name
    return cls


def _class_in(kind: Kind, name: str) -> type:
    path = _own(kind)[name].relative_to(Path(__file__).parents[1]).with_suffix("")
    base = import_module(f"effbench.{kind}.base")
    root = base.Method if kind == "methods" else base.Evaluator
    return only_class(".".join(("effbench", *path.parts)), root)


def summary(kind: Kind, name: str) -> str:
    """Return the first line of the docstring of a plug-in's file, without importing it."""
    if name in plugins(kind):
        return docstring(plugins(kind)[name]).split("\n")[0]
    path = _own(kind).get(name)
    text = ast.get_docstring(ast.parse(path.read_text())) if path else ""
    return (text or "").split("\n")[0]
