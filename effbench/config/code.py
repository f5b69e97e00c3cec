"""No config runs code: what Hydra would import or call for a word or a file is refused.

Hydra makes objects of `_target_` in its own part of a config, logging does of `()`, and a search
path of `pkg://` imports a package. Methods and evaluators are found by name alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from effbench.util import yamls
from effbench.util.errors import UserError

CALLED = ("_target_", "()")
"""Keys whose value Hydra or logging would call."""
OURS = re.compile(
    r"hydra[./](launcher|sweeper)\b|hydra\.((sweep|run)\.\w+|job\.chdir|output_subdir)$"
)
"""What of Hydra's own part may be set: how runs are launched and drawn, and where it writes."""
RELOCATED = re.compile(r"^\s*#\s*@package\s+hydra\b", re.MULTILINE)
HINT = "Methods and evaluators of your own are found by name: docs/adding-a-method.md."


def refuse_code_in_word(key: str, text: str) -> None:
    """Refuse a word that would have Hydra run something.

    Args:
        key: Of the override.
        text: All of it.

    Raises:
        UserError: That shows the word.
    """
    if any(part in text for part in CALLED):
        raise UserError(f"{text} names code, and no config may run code.", HINT)
    if key.split(".")[0].split("/")[0] == "hydra" and not OURS.match(key):
        raise UserError(
            f"{key} is not for a command: of Hydra's own settings only hydra.launcher.* and "
            "hydra.sweeper.* are.",
            "Your own configs are found with --config-dir.",
        )


def refuse_code_in_files(folder: Path) -> None:
    """Refuse a folder with a config that would have Hydra run something, or that is no YAML.

    Raises:
        UserError: That names the file.
    """
    for path in sorted((*folder.glob("*.yaml"), *folder.glob("*/*.yaml"), *_hydras(folder))):
        values, text = yamls.read(path), path.read_text(encoding="utf-8")
        found = [key for key in _keys(values) if key.split(".")[-1] in CALLED]
        found += [key for key in _hydra_keys(values) if not OURS.match(key)]
        within = path.relative_to(folder).with_suffix("").as_posix()
        if within.startswith("hydra") and not OURS.match(within):
            found.append(within)
        if RELOCATED.search(text):
            found.append("@package hydra")
        if found:
            raise UserError(f"{path} sets {found[0]}, and no config may run code.", HINT)


def _hydras(folder: Path) -> Iterator[Path]:
    return (folder / "hydra").rglob("*.yaml")


def _keys(values: Any, place: str = "") -> Iterator[str]:
    """Yield the place of every key, with dots, in mappings and lists."""
    if isinstance(values, dict):
        for key, value in values.items():
            inner = f"{place}.{key}" if place else str(key)
            yield inner
            yield from _keys(value, inner)
    elif isinstance(values, list):
        for value in values:
            yield from _keys(value, place)


def _hydra_keys(values: Any) -> Iterator[str]:
    """Yield what a file sets of Hydra's own part: by its keys, and by its list of defaults."""
    if not isinstance(values, dict):
        return
    hydra = values.get("hydra")
    for key, value in hydra.items() if isinstance(hydra, dict) else ():
        inner = [f".{name}" for name in value] if isinstance(value, dict) else [""]
        yield from (f"hydra.{key}{name}" for name in inner)
    for entry in values.get("defaults") or ():
        for word in entry if isinstance(entry, dict) else [entry]:
            place = str(word).removeprefix("override ").strip().lstrip("/")
            if "hydra" in place:
                yield place if "@" not in place else f"a default at {place}"


def checked(folders: Sequence[Path]) -> list[Path]:
    """Return the absolute paths of folders with somebody's own configs.

    Raises:
        UserError: When one is not there, or has a file that would run code.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                f"--config-dir {folder} is not a folder.", "Create it or correct the path."
            )
        refuse_code_in_files(folder)
    return [folder.resolve() for folder in folders]
