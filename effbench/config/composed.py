"""Config files and words composed by Hydra: plain values, before anything is checked."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from effbench.api import registry
from effbench.api.schema import plain
from effbench.config.files import groups
from effbench.config.overrides import explain, parse
from effbench.util.errors import UserError
from effbench.util.package_data import conf_dir


def hydra_compose(overrides: Sequence[str], extra: Sequence[Path]) -> dict[str, Any]:
    """Return the composed config of one run as plain values.

    Hydra composes the same choice of files once in a process, and puts the values into a copy.

    Raises:
        UserError: When it cannot be composed, with the reason.
    """
    from hydra.errors import HydraException

    register_plugin_configs()

    def composes(words: Sequence[str]) -> bool:
        try:
            _with_values(words, extra)
        except HydraException:
            return False
        return True

    try:
        return to_plain(_with_values(overrides, extra))
    except HydraException as error:
        raise explain(error, overrides, composes) from None


def _with_values(words: Sequence[str], extra: Sequence[Path]) -> Any:
    """Return Hydra's config of some words.

    Raises:
        HydraException: When it cannot be composed.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    choices, values = choices_and_values(words, groups(extra))
    config = pickle.loads(files_composed(tuple(choices), tuple(extra), files_now(extra)))
    ConfigLoaderImpl._apply_overrides_to_config(values, config)
    return config


def choices_and_values(words: Sequence[str], known: Sequence[str]) -> tuple[list[str], list[Any]]:
    """Return the words that choose files, and the parsed rest, which only set values in them."""
    choices, values = [], []
    for word in words:
        override = parse(word)
        key = override.key_or_group
        sets = key not in known and not re.match(r"hydra\b", key) and override.package is None
        if sets and not override.is_sweep_override():
            values.append(override)
        else:
            choices.append(word)
    return choices, values


@lru_cache(maxsize=512)
def files_composed(choices: tuple[str, ...], extra: tuple[Path, ...], files: Any) -> bytes:
    """Return Hydra's config of a choice of files, as they were at the time that `files` tells.

    It is pickled: a copy of it is made in a seventh of the time.
    """
    from hydra import compose, initialize_config_dir

    paths = [f"hydra.searchpath=[{','.join(f'file://{p}' for p in extra)}]"] if extra else []
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return pickle.dumps(compose("config", overrides=[*paths, *choices]))


def files_now(extra: Sequence[Path]) -> tuple[tuple[str, int, int], ...]:
    """Return the path, time and size of every config file there is."""
    files = (file for folder in (conf_dir(), *extra) for file in _files_in(str(folder)))
    return tuple((f.path, s.st_mtime_ns, s.st_size) for f in files if (s := f.stat()))


def _files_in(folder: str) -> Iterator[os.DirEntry[str]]:
    """Yield the config files below a folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files_in(entry.path)
            elif entry.name.endswith(".yaml"):
                yield entry


def to_plain(config: Any) -> dict[str, Any]:
    """Return a composed config as plain values, interpolations resolved.

    Raises:
        UserError: When a value is missing (`???`) or cannot be resolved.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        values: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
            config, resolve=True, throw_on_missing=True
        )
    except MissingMandatoryValue:
        first = min(OmegaConf.missing_keys(config))
        raise UserError(f"{first} has no value.", f"Give one: {first}=VALUE.") from None
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"{error.full_key or 'The config'} cannot be resolved: {reason}.",
            "Write ${train.max_steps} for another setting, ${oc.env:NAME} for a variable.",
        ) from None
    return values


def register_plugin_configs() -> None:
    """Offer a config for what another package offers, which has no file of its own."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for name in registry.plugins("methods"):
        defaults = settings_of(registry.find("methods", name))
        store.store(name, {"name": name, **defaults}, group="method")
    for name in registry.plugins("evaluators"):
        defaults = settings_of(registry.find("evaluators", name))
        store.store(name, defaults, group="evaluator", package=f"evaluator.{name}")


def settings_of(cls: type) -> dict[str, Any]:
    """Return a plug-in's fields with their default values, `???` where there is none."""
    values = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            values[field.name] = plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = plain(field.default_factory())
        else:
            values[field.name] = "???"
    return values
