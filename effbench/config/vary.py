"""Many sets of words composed as one: Hydra puts each choice of files together once.

The runs of a grid mostly differ in single values. Those are put into a copy of what Hydra made of
the choice of files, which takes a hundredth of the time. What is not a plain value is left to
Hydra: interpolations, deletions, mappings, values in the place of keys.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from effbench.config.composed import (
    choices_and_values,
    files_composed,
    files_now,
    hydra_compose,
    register_plugin_configs,
)
from effbench.config.files import groups
from effbench.util.errors import UserError

PATH = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*")
"""Keys that stand for themselves."""
FROM_OUTSIDE = re.compile(r"\$\{oc\.env:([^${},]*)[^${}]*\}")
"""An interpolation that no other key can change, with the name of its variable."""


@dataclass(frozen=True)
class Base:
    """What Hydra made of a choice of files."""

    values: dict[str, Any]
    """Plain, never changed."""
    missing: frozenset[str]
    """Keys that need a value yet."""
    variables: dict[str, str | None]
    """Environment variables that are in the values, as they were."""

    @property
    def is_current(self) -> bool:
        """Whether the variables are still what they were."""
        return self.variables == _now(self.variables)


class Composer:
    """Composes words as `hydra_compose` does; config files are read as they are at its making.

    Args:
        extra: Folders with the user's own configs.
    """

    def __init__(self, extra: Sequence[Path] = ()) -> None:
        self._extra = tuple(extra)
        self._groups = groups(extra)
        self._files = files_now(extra)
        self._bases: dict[tuple[str, ...], Base | None] = {}

    def __call__(self, words: Sequence[str]) -> dict[str, Any]:
        """Return the config of some words, as plain values that are not to be changed.

        Raises:
            UserError: When it cannot be composed, with the reason.
        """
        choices, values = choices_and_values(words, self._groups)
        base = self._base(tuple(choices))
        varied = with_values(base, values) if base else None
        return hydra_compose(words, self._extra) if varied is None else varied

    def _base(self, choices: tuple[str, ...]) -> Base | None:
        if choices not in self._bases:
            base = _base_of(choices, self._extra, self._files)
            if base and not base.is_current:
                base = _base_of.__wrapped__(choices, self._extra, self._files)
            self._bases[choices] = base
        return self._bases[choices]


@lru_cache(maxsize=512)
def _base_of(choices: tuple[str, ...], extra: tuple[Path, ...], files: Any) -> Base | None:
    """Return what Hydra makes of a choice of files; None where keys depend on each other."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    register_plugin_configs()
    try:
        config: Any = pickle.loads(files_composed(choices, extra, files))
        written: Any = OmegaConf.to_container(config, resolve=False)
        if _depends(written):
            return None
        values: Any = OmegaConf.to_container(config, resolve=True)
        missing = frozenset(OmegaConf.missing_keys(config))
        return Base(values, missing, _now(FROM_OUTSIDE.findall(json.dumps(written))))
    except (HydraException, OmegaConfBaseException, UserError):
        return None


def _now(variables: Iterable[str]) -> dict[str, str | None]:
    """Return the values of environment variables by their names."""
    return {name: os.environ.get(name) for name in variables}


def _depends(value: Any) -> bool:
    """Whether plain values hold an interpolation of another key, or keys that are no text."""
    if isinstance(value, dict):
        return any(not isinstance(k, str) or _depends(v) for k, v in value.items())
    if isinstance(value, list):
        return any(map(_depends, value))
    return isinstance(value, str) and "${" in FROM_OUTSIDE.sub("", value)


def with_values(base: Base, overrides: Sequence[Any]) -> dict[str, Any] | None:
    """Return a copy of a base with some values set in it, sharing what is not changed.

    Args:
        base: What Hydra made of the choice of files.
        overrides: Parsed words that set values.

    Returns:
        None where that is Hydra's to do.
    """
    config, open_keys = dict(base.values), set(base.missing)
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if override.is_delete() or not PATH.fullmatch(key):
            return None
        if not _is_plain(value) or not _set(config, key.split("."), value, override):
            return None
        open_keys.discard(key)
    return None if open_keys else config


def _is_plain(value: Any) -> bool:
    """Whether a value stands for itself, or is a list of such values."""
    if isinstance(value, list):
        return all(not isinstance(v, list) and _is_plain(v) for v in value)
    if isinstance(value, str):
        return "$" not in value and value != "???"
    return value is None or isinstance(value, int | float)


def _set(config: dict[str, Any], path: Sequence[str], value: Any, override: Any) -> bool:
    """Set a value at a path of keys, whose mappings are copied; say whether that was possible."""
    *parents, last = path
    adds = override.is_add() or override.is_force_add()
    for name in parents:
        inner = config.get(name)
        if inner is None and adds:
            inner = {}
        if not isinstance(inner, dict):
            return False
        config[name] = config = dict(inner)
    if isinstance(config.get(last), dict) or (last not in config and not adds):
        return False
    if last in config and override.is_add():
        return False
    config[last] = value
    return True
