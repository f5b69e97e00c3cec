"""Which config files there are: those that come with effbench, and the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from effbench.api import registry
from effbench.util.package_data import conf_dir

READ_ALONE = frozenset({"policy", "sweep", "table"})
"""Folders of files about several runs, which no spec takes."""


def groups(extra: Sequence[Path] = ()) -> list[str]:
    """Return the config groups, sorted."""
    folders = {p.name for d in (conf_dir(), *extra) for p in d.iterdir() if p.is_dir()}
    return sorted(folders - READ_ALONE)


def options(group: str, extra: Sequence[Path] = ()) -> dict[str, Path | None]:
    """Return the configs of a group by name; a method without a file is built from its fields."""
    found: dict[str, Path | None] = {}
    if group == "method":
        found = dict.fromkeys(registry.plugins("methods"))
    for folder in (conf_dir(), *extra):
        found |= {p.stem: p for p in (folder / group).glob("*.yaml")}
    return dict(sorted(found.items()))


def summary(path: Path) -> str:
    """Return the one-line summary in the first comment of a config file."""
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            return line.removeprefix("#").strip()
    return ""


def keys_of(path: Path) -> list[str]:
    """Return the top keys of a config file."""
    import yaml

    content = yaml.safe_load(path.read_text()) or {}
    return [k for k in content if k not in ("defaults", "name")]
