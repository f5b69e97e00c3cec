"""What comes with effbench in files: its configs, and classes that are found by a file's name."""

from __future__ import annotations

import inspect
from functools import cache
from importlib import import_module
from pathlib import Path

from effbench.util.errors import UserError


@cache
def conf_dir() -> Path:
    """Return the folder of the configs that come with effbench."""
    inside = Path(__file__).parents[1] / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


def only_class(module: str, base: type) -> type:
    """Return the one subclass of `base` that a module defines.

    Raises:
        UserError: When it defines none, or several.
    """
    there = import_module(module)
    found = [
        c
        for c in vars(there).values()
        if inspect.isclass(c) and issubclass(c, base) and c.__module__ == module
    ]
    if len(found) != 1:
        raise UserError(f"{there.__file__} must define exactly one {base.__name__}.")
    return found[0]
