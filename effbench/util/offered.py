"""What other packages offer by name, through entry points."""

from __future__ import annotations

import ast
import inspect
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from effbench.util.errors import UserError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Kind = Literal["methods", "evaluators", "formats", "kinds", "stages"]


@cache
def offered(kind: Kind) -> dict[str, EntryPoint]:
    """Return what other packages offer through the entry point group `effbench.<kind>`."""
    group = f"effbench.{kind}"
    if group not in _named_by_packages():
        return {}
    from importlib.metadata import entry_points

    return {e.name: e for e in entry_points(group=group)}


@cache
def _named_by_packages() -> str:
    """Return the entry points of all installed packages as text.

    Reading the files is several times faster than parsing all packages' metadata, which only
    somebody with such a package then pays for.
    """
    files = (
        file for place in sys.path for file in Path(place or ".").glob("*.*-info/entry_points.txt")
    )
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def docstring(entry: EntryPoint) -> str:
    """Return the docstring of the module that an entry point names, without importing it."""
    spec = find_spec(entry.module)
    path = Path(spec.origin) if spec and spec.origin else None
    return (path and path.is_file() and ast.get_docstring(ast.parse(path.read_text()))) or ""


def class_offered(kind: Kind, name: str, base: type) -> type[Any]:
    """Return the class that a package offers under a name.

    Raises:
        UserError: When it is no class of that kind.
    """
    entry = offered(kind)[name]
    found = entry.load()
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise UserError(
            f"{entry.value} is no {base.__name__}, as the entry point {name!r} says.",
            f"Name a subclass of {base.__module__}.{base.__name__} in effbench.{kind}.",
        )
    return found
