"""Where the files are that come with effbench."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def conf_dir() -> Path:
    """Return the folder of the configs that come with effbench."""
    inside = Path(__file__).parents[1] / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"
