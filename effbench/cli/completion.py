"""Shell completion of groups, names, keys and runs; reads file names only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from effbench.config.files import groups, keys_of, options
from effbench.config.overrides import SEVERAL, TOP_LEVEL
from effbench.results.store import results_dir
from effbench.util.package_data import conf_dir

PARTS = ("train", "run")
"""Parts of the top config that are no groups."""
GRID = "sweep"
"""What names the config of a grid."""


def leave_room_for_values() -> None:
    """Let the script for bash put no space behind what asks for more, `method=` or `train.`."""
    from typer import _completion_shared as shared

    ours = """[[ ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace
    return 0"""
    scripts = shared._completion_scripts
    scripts["bash"] = scripts["bash"].replace("return 0", ours)


def complete_after(words: Sequence[str], incomplete: str) -> list[str]:
    """Return the completions of a word after others.

    Bash takes `=` as a word of its own and wants only what comes behind it.
    """
    places = re.findall(r"run\.results=(\S+)", " ".join(words).replace(" = ", "="))
    before = [*words, "="] if words and not incomplete and "=" not in words[-1] else [*words]
    if len(before) > 1 and before[-1] == "=":
        found = complete(f"{before[-2]}={incomplete}", *places[-1:])
        return [f.partition("=")[2] for f in found]
    return complete(incomplete, *places[-1:])


def complete(incomplete: str, results: str = "") -> list[str]:
    """Return the completions of one override.

    Args:
        incomplete: What there is of it.
        results: The folder of runs that the words before it name.
    """
    key, equals, value = incomplete.partition("=")
    if equals:
        if key == "from":
            known = ["latest", *run_keys(value, results)]
            return [f"from={k}" for k in known if k.startswith(value)]
        if key in (*groups(), GRID):
            return [f"{key}={n}" for n in options(key) if n.startswith(value)]
        return []
    group, dot, _ = key.partition(".")
    if dot:
        return [f"{k}=" for k in _keys_in(group) if k.startswith(key)]
    words = [*groups(), GRID, *(TOP_LEVEL - {"hydra"})]
    return sorted(f"{w}{'.' if w in PARTS else '='}" for w in words if w.startswith(key))


def _keys_in(group: str) -> list[str]:
    """Return the keys of a part of the config, over all the files that may fill it."""
    if group in PARTS:
        import yaml

        top = yaml.safe_load((conf_dir() / "config.yaml").read_text())
        return sorted(f"{group}.{key}" for key in top[group])
    member = group in SEVERAL
    return sorted(
        {
            f"{group}.{name}.{key}" if member else f"{group}.{key}"
            for name, path in options(group).items()
            for key in keys_of(group, name, path)
        }
    )


def run_keys(incomplete: str, results: str = "") -> list[str]:
    """Return the keys of finished runs that begin so."""
    folder = (Path(results).expanduser() if results else results_dir()) / "records"
    return sorted(p.stem for p in folder.glob(f"{incomplete}*.json"))
