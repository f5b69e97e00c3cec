"""A whole spec that a command starts from: a file of one's own, or an earlier run.

The file is laid out as `effbench runs show RUN --spec` prints it; a hand-written one may leave keys
out, name a config alone (`model: tiny`), and give settings of a method beside its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effbench.api import registry
from effbench.api.stages import base as stages
from effbench.config.files import options, unknown
from effbench.config.lineage import unpinned
from effbench.results.migrations import migrated_spec
from effbench.util import yamls
from effbench.util.errors import UserError, did_you_mean

ENDINGS = (".yaml", ".yml", ".json")
MADE = {"version", "versions", "sources", "others", "stage"}
"""Keys of a printed spec that are found anew."""
PARTS = {"method", "model", "dataset", "evaluator", "train", "hardware", "run", "seed", "from"}
LAYERS = {"train", "hardware", "run"}
"""Groups of which a file may give some keys, above the defaults."""
OTHER_NAMES = {"parent": "from", "evaluators": "evaluator"}


@dataclass(frozen=True)
class Start:
    """What a command starts from, before its own words."""

    where: str
    """In words."""
    parts: Mapping[str, Any]
    """Plain values by group, each whole; a method and a model have their `name` among them."""

    def words(self, typed: set[str]) -> list[str]:
        """Return the words that choose configs whose single settings can be typed then.

        Raises:
            UserError: When an experiment is chosen too.
        """
        if "experiment" in typed:
            raise UserError(
                f"{self.where} and experiment= both say what to run.", "Leave one of them out."
            )
        words = []
        if "evaluator" in self.parts:
            words.append(f"evaluator=[{','.join(self.parts['evaluator'])}]")
        if isinstance(self.parts.get("hardware"), str):
            words.append(f"hardware={self.parts['hardware']}")
        return [word for word in words if word.partition("=")[0] not in typed]

    def under(self, composed: Mapping[str, Any], typed: set[str]) -> dict[str, Any]:
        """Return a composed config with these values under what was typed.

        Args:
            composed: With the typed words.
            typed: The groups and keys that they set.
        """
        config = dict(composed)
        for name, value in self.parts.items():
            if isinstance(value, dict) and name not in typed:
                base = composed.get(name) if name in LAYERS else {}
                keys = [c.split(".")[1:] for c in sorted(typed) if c.startswith(f"{name}.")]
                before = unpinned({**(base or {}), **value}, keys)
                config[name] = _overlaid(before, composed.get(name) or {}, keys)
            elif name not in typed and name != "hardware":
                config[name] = value
        return config

    def chosen(self, typed: set[str]) -> set[str]:
        """Return what is chosen by this and by what was typed.

        What goes on from a run has the model of that run, and its method if it makes nothing.
        """
        if "from" not in typed and not self.parts.get("from"):
            return typed | self.parts.keys()
        found = typed | self.parts.keys() & {"from", "dataset"}
        if "method" not in self.parts or "method" in typed:
            return found
        name = self.parts["method"]["name"]
        cls = registry.find("methods", name)
        reads = not stages.find(cls.stage).makes and name != "none"
        return found | ({"method"} if reads else {f"method.{key}" for key in cls.eval_settings})


def _overlaid(
    values: Mapping[str, Any], typed: Mapping[str, Any], keys: Sequence[list[str]]
) -> dict[str, Any]:
    """Return values with those of `typed` at some keys; a key that is gone there goes."""
    result = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for first, *rest in keys:
        if first not in typed:
            result.pop(first, None)
        elif rest and isinstance(result.get(first), dict) and isinstance(typed[first], dict):
            result[first] = _overlaid(result[first], typed[first], [rest])
        else:
            result[first] = typed[first]
    return result


def split_words(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return the files among the words of a command, and the overrides."""
    files = [w for w in words if "=" not in w and w.lower().endswith(ENDINGS)]
    return [Path(f).expanduser() for f in files], [w for w in words if w not in files]


def start_of(
    files: Sequence[Path], like: str, results: Path, stage: str | None, extra: Sequence[Path] = ()
) -> Start | None:
    """Return what a command starts from; None where that is the defaults.

    Args:
        files: Files of one's own, one at most.
        like: An earlier run: key, prefix or `latest`; empty for none.
        results: Folder of records.
        stage: Of the command; None takes that of the file.
        extra: Folders with the user's own configs.

    Raises:
        UserError: For several of them, a file that is none, a run that is not there, keys or
            names that are not known, or another stage.
    """
    if len(files) + bool(like) > 1:
        raise UserError("A run starts from one file or one run.", "Give one of them.")
    if like:
        from effbench.results.lookup import find

        record = find(results / "records", like)
        return start(record.spec, f"run {record.key}", stage, extra)
    return start(yamls.read(files[0]), str(files[0]), stage, extra) if files else None


def start(values: Any, where: str, stage: str | None, extra: Sequence[Path] = ()) -> Start:
    """Return what a spec says; see `start_of`."""
    if not isinstance(values, dict):
        raise UserError(
            f"{where} holds no keys.", "Lay it out as `effbench runs show RUN --spec` prints it."
        )
    if isinstance(values.get("version"), int):
        values = migrated_spec(values)
    if stage and values.get("stage") not in (None, stage):
        raise UserError(
            f"{where} is for another command than {stage}.",
            f"Use: effbench {values['stage']} with it.",
        )
    known = {OTHER_NAMES.get(key, key): value for key, value in values.items() if key not in MADE}
    if unknown := sorted(known.keys() - PARTS):
        raise UserError(f"{where}: unknown key {unknown[0]!r}.", did_you_mean(unknown[0], PARTS))
    parts = {name: _part(name, value, where, extra) for name, value in known.items()}
    return Start(where, {name: value for name, value in parts.items() if value not in ("", None)})


def _part(name: str, value: Any, where: str, extra: Sequence[Path]) -> Any:
    """Return the values of a group, each with what it leaves out."""
    if name in ("seed", "from"):
        return value
    if name == "evaluator":
        return _evaluators(value, where)
    if isinstance(value, str) and name == "hardware":
        return value
    value = {"name": value} if isinstance(value, str) and name not in LAYERS else value
    if not isinstance(value, dict):
        raise UserError(f"{where}: {name} must hold keys.", f"For example: {name}: {{KEY: VALUE}}")
    if name == "train" and value.get("max_steps") and value.get("epochs"):
        raise UserError(f"{where}: train has max_steps and epochs.", "Give one of them.")
    if name in LAYERS:
        return value
    if name != "method" and "name" not in value:
        raise UserError(f"{where}: {name}.name is missing.", f"Give one: effbench list {name}s")
    if name == "method":
        return _plugged("methods", value, where)
    return {**_config(name, str(value["name"]), "source" in value, extra), **value}


def _config(group: str, name: str, whole: bool, extra: Sequence[Path]) -> dict[str, Any]:
    """Return the values of a config.

    Raises:
        UserError: When there is none of that name, and nothing else says what it is.
    """
    import yaml

    path = options(group, extra).get(name)
    if path is None and not whole:
        raise unknown(group, name, options(group, extra))
    values = yaml.safe_load(path.read_text()) if path else {}
    return {k: v for k, v in values.items() if v != "???" and k != "defaults"}


def _evaluators(value: Any, where: str) -> dict[str, Any]:
    """Return settings by evaluator, from a list of names or of plug-ins, or from a mapping."""
    if isinstance(value, dict):
        value = [{"name": name, "settings": settings or {}} for name, settings in value.items()]
    listed = value if isinstance(value, list) else [] if value is None else [value]
    plugged = [_plugged("evaluators", v, where) for v in listed]
    return {p["name"]: {k: v for k, v in p.items() if k != "name"} for p in plugged}


def _plugged(kind: registry.Kind, value: Any, where: str) -> dict[str, Any]:
    """Return the name of a method or an evaluator, and the settings that are given."""
    value = {"name": value} if isinstance(value, str) else value
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise UserError(f"{where}: one of its {kind} has no name.", "Write it as {name: NAME}.")
    rest = {k: v for k, v in value.items() if k not in ("name", "settings")}
    registry.find(kind, value["name"])
    given = {**(value.get("settings") or {}), **rest}
    return {"name": value["name"], **given}
