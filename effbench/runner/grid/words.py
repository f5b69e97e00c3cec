"""The words of a grid: its config, what is said of it as a whole, and the words of each run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effbench.config.files import options
from effbench.config.overrides import parse
from effbench.runner.objective import JOBS, PREFIX
from effbench.util import yamls
from effbench.util.errors import UserError, did_you_mean

NAMED = "sweep="
LARGE = 2000
"""Runs above which a grid asks first."""


def spelled_out(
    stage: str, words: Sequence[str], extra: Sequence[Path] = ()
) -> tuple[str, list[str]]:
    """Return the name of a grid and its words, those of its config first.

    A word that is typed stands for all of its key in the config.

    Args:
        stage: The command.
        words: As typed, perhaps with `sweep=NAME`.
        extra: Folders with the user's own configs.

    Raises:
        UserError: When there is no such config, or it is for another command.
    """
    names = [word.removeprefix(NAMED) for word in words if word.startswith(NAMED)]
    typed = [word for word in words if not word.startswith(NAMED)]
    if not names:
        return "", typed
    keys = {_key(word) for word in typed}
    return names[-1], [w for w in _read(stage, names[-1], extra) if _key(w) not in keys] + typed


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _read(stage: str, name: str, extra: Sequence[Path]) -> list[str]:
    known = options("sweep", extra)
    path = known.get(name)
    if path is None:
        raise UserError(
            f"There is no grid called {name!r}.",
            f"{did_you_mean(name, known)} See: effbench list sweeps",
        )
    values = yamls.read(path)
    words = values.get("words") if isinstance(values, dict) else None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(
            f"{path} lists no words.", "For example: words: [method=lora, 'method.rank=2,4']"
        )
    if values.get("command", stage) != stage:
        command = values["command"]
        raise UserError(
            f"The grid {name} is one of another command than {stage}.",
            f"Use: effbench {command} -m sweep={name}",
        )
    return words


def jobs_in(words: Sequence[str]) -> tuple[int, list[str]]:
    """Return how many runs of a grid may go on at once, and the other words.

    Raises:
        UserError: When that is no number above 0.
    """
    prefix = f"{PREFIX}{JOBS}="
    given = [word.removeprefix(prefix) for word in words if word.startswith(prefix)]
    rest = [word for word in words if not word.startswith(prefix)]
    if given and not (given[-1].isdecimal() and 0 < int(given[-1]) < 1000):
        raise UserError(
            f"{prefix}{given[-1]} is not possible.",
            "Give how many runs may go on at once: 1 to 999.",
        )
    return int(given[-1]) if given else 1, rest


def points(words: Sequence[str]) -> list[list[str]] | None:
    """Return the words of each run of a grid; None when a sweeper of Hydra draws them itself.

    Args:
        words: Of the grid, as Hydra takes them.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.errors import HydraException

    try:
        (found,) = BasicSweeper.split_arguments([parse(word) for word in words], None)
        return [list(point) for point in found]
    except HydraException:
        return None


def is_launched(words: Sequence[str], extra: Sequence[Path] = ()) -> bool:
    """Whether a grid's words ask for a launcher or a sweeper of Hydra, or may do so in a file.

    Args:
        words: Of the grid.
        extra: Folders with the user's own configs.
    """
    experiments = options("experiment", extra)
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        paths = [experiments.get(name) for name in value.split(",") if key == "experiment"]
        in_file = any(path and "hydra" in path.read_text(encoding="utf-8") for path in paths)
        if key.startswith("hydra") or (key == "launcher" and value != "local") or in_file:
            return True
    return False


def listed(words: Sequence[str], extra: Sequence[Path] = ()) -> list[str]:
    """Return words in which each `glob(...)` is the list of what it fits.

    Args:
        words: As typed.
        extra: Folders with the user's own configs, among which it looks too.

    Raises:
        UserError: When one fits nothing.
    """
    return [_listed(word, extra) if "glob(" in word else word for word in words]


def _listed(word: str, extra: Sequence[Path]) -> str:
    from hydra.core.override_parser.types import Glob
    from hydra.errors import HydraException

    try:
        override = parse(word)
    except HydraException:
        return word  # what is wrong with it is said where all words are checked
    if not isinstance(override.value(), Glob):
        return word
    known = options(override.key_or_group, extra)
    if not (fits := override.value().filter(list(known))):
        pattern = override.value().include[0]
        raise UserError(f"{word} fits nothing.", did_you_mean(pattern.strip("*"), known))
    return f"{override.get_key_element()}={','.join(fits)}"


def check_size(words: Sequence[str], agreed: bool) -> None:
    """Refuse a grid without runs, and one of more than anybody means by mistake.

    Args:
        words: Of the grid, as Hydra takes them.
        agreed: Whether so many were asked for.

    Raises:
        UserError: Which says how many runs there would be.
    """
    lengths = {parse(w).get_key_element(): (_length(w), w) for w in words}
    empty = [word for length, word in lengths.values() if not length]
    if empty:
        raise UserError(
            f"{empty[0].lstrip('+')} has no value, so the grid has no run.",
            "Write range(START,STOP) with a STOP that is not reached.",
        )
    number = math.prod(length for length, _ in lengths.values())
    if number > LARGE and not agreed:
        raise UserError(
            f"The grid has {number:,} runs.", "Give the same command with --yes to run them all."
        )


def _length(word: str) -> int:
    """Return how many values a word has; 1 where a sweeper draws them."""
    override = parse(word)
    value: Any = override.value()
    if not override.is_sweep_override() or not override.is_discrete_sweep():
        return 1
    if override.is_range_sweep():
        return max(0, math.ceil((value.stop - value.start) / value.step))
    return len(value.list)
