"""YAML of people: plain values alone, numbers as JSON has them, mistakes with their line."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from effbench.util.errors import UserError

NUMBER = re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+")
"""What JSON and people write as a number and YAML 1.1 reads as text: 1e-05."""


SHALLOW = 4000
"""Levels within each other that libyaml bears, which is ten times as fast and has no limit."""


def read(path: Path) -> Any:
    """Return the plain values in a YAML file.

    Raises:
        UserError: When it is not there, or is no YAML; with line and column where they are known.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        if yaml.__with_libyaml__ and _levels(text) < SHALLOW:
            with suppress(yaml.YAMLError):  # which the other reader says in words we know
                return yaml.load(text, _loader(yaml.CSafeLoader))
        return yaml.load(text, _loader(yaml.SafeLoader))
    except FileNotFoundError:
        raise UserError(f"{path} is not there.", "Correct the path.") from None
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as YAML: {_reason(error)}", "Mend it.") from None


def _reason(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())[:200]
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', error)}."


def _levels(text: str) -> int:
    """Return a bound of how deep values are within each other: by brackets, and by columns."""
    return text.count("[") + text.count("{") + max(map(len, text.splitlines()), default=0)


@cache
def _loader(base: Any) -> Any:
    """Return a loader of plain values that reads numbers as JSON does."""

    class Loader(base):
        """Of plain values."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789"))
    return Loader
