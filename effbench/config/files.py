"""Which config files there are: those that come with effbench, and the user's own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path

from effbench.api import registry
from effbench.util.errors import UserError, did_you_mean
from effbench.util.package_data import conf_dir

READ_ALONE = frozenset({"policy", "sweep", "table"})
"""Folders of files about several runs, which no spec takes."""


PLUGGED: dict[str, registry.Kind] = {"method": "methods", "evaluator": "evaluators"}
"""Groups of what other packages can offer without a file."""


def groups(extra: Sequence[Path] = ()) -> list[str]:
    """Return the config groups, sorted."""
    return sorted(_own_folders().union(*map(_folders, extra)) - READ_ALONE)


@cache
def _own_folders() -> frozenset[str]:
    return frozenset(_folders(conf_dir()))


def _folders(place: Path) -> set[str]:
    return {p.name for p in place.iterdir() if p.is_dir()}


def options(group: str, extra: Sequence[Path] = ()) -> dict[str, Path | None]:
    """Return the configs of a group by name; what a package offers without one has its fields."""
    found: dict[str, Path | None] = {}
    if kind := PLUGGED.get(group):
        found = dict.fromkeys(registry.plugins(kind))
    for folder in (conf_dir(), *extra):
        found |= {p.stem: p for p in (folder / group).glob("*.yaml")}
    return dict(sorted(found.items()))


HUB = re.compile(r"[\w.-]+/[\w.-]+")
"""What a model on the hub is called."""


def unknown(group: str, name: str, known: Iterable[str]) -> UserError:
    """Return that there is no config of a name; one's own model or file has words of its own.

    Args:
        group: The config group.
        name: What was asked for.
        known: Names there are.
    """
    return UserError(
        f"There is no {group} called {name!r}.", _own(group, name) or did_you_mean(name, known)
    )


def _own(group: str, name: str) -> str:
    """Return the words for a folder, a file or a model on the hub of that name, if it is one."""
    place = Path(name).expanduser()
    if group == "dataset" and place.is_file():
        return f"It is a file: dataset=file dataset.files.all={name}"
    if group == "model" and place.is_dir():
        return f"It is a folder: model=folder model.path={name}"
    if group == "model" and place.suffix == ".gguf":
        return f"For a file: model=gguf model.path={name}"
    if group == "model" and HUB.fullmatch(name):
        return f"For one on the hub: model=hub model.id={name}"
    return ""


def summary(path: Path) -> str:
    """Return the one-line summary in the first comment of a config file."""
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            return line.removeprefix("#").strip()
    return ""


def keys_of(group: str, name: str, path: Path | None) -> list[str]:
    """Return the top keys of a config.

    Args:
        group: Its group.
        name: Its name.
        path: Its file; None for what a package offers without one.
    """
    import yaml

    if path is None:
        return [f.name for f in fields(registry.find(PLUGGED[group], name))]
    content = yaml.safe_load(path.read_text()) or {}
    return [k for k in content if k not in ("defaults", "name")]
