"""From command-line overrides to a frozen, validated `Job`, before torch is imported."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from effbench import registry
from effbench.errors import UserError, did_you_mean
from effbench.schema import NonNegativeInt, build, plain
from effbench.shapes import Shape
from effbench.spec import (
    DatasetSpec,
    HardwareSpec,
    Job,
    Machine,
    ModelSpec,
    Plugin,
    Runtime,
    Spec,
    Stage,
    TrainSpec,
)
from effbench.store import Store

DEFAULT_METHOD = {"train": "lora", "compress": "rtn", "eval": "none"}
"""What a stage takes when no `method=` is given."""
TOP_LEVEL = {"seed", "from", "train", "run", "hydra"}
JUDGED_BY_US = {"model", "dataset", "method", "hardware", "train", "run"}
"""Parts of a config whose keys a dataclass judges, so that a file need not name every key."""
SEVERAL = {"evaluator"}
"""Groups of which a config takes any number of members."""


@cache
def conf_dir() -> Path:
    """Return the folder of the configs that come with effbench."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


def groups(extra: Sequence[Path] = ()) -> list[str]:
    """Return the config groups, sorted."""
    return sorted({p.name for d in (conf_dir(), *extra) for p in d.iterdir() if p.is_dir()})


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
    content = yaml.safe_load(path.read_text()) or {}
    return [k for k in content if k not in ("defaults", "name")]


def is_sweep(overrides: Iterable[str]) -> bool:
    """Whether the overrides ask for several runs or for another launcher than this machine."""
    return any(re.match(r"launcher=(?!local$)", o) for o in overrides)


def compose(
    stage: Stage | None,
    overrides: Sequence[str],
    extra: Sequence[Path] = (),
) -> Job:
    """Return the validated job of a command.

    Args:
        stage: The command, or None for the stage that the method itself belongs to.
        overrides: Hydra overrides as typed.
        extra: Folders with the user's own configs, searched first.

    Raises:
        UserError: For anything a user can mend: unknown names, wrong types, impossible values,
            an unknown `from=`, a pair of methods that cannot follow each other.
    """
    extra = [existing(p) for p in extra]
    words = check_overrides(overrides, extra)
    if words.swept:
        raise UserError(
            f"{words.swept} asks for several runs.",
            "Add -m to train, compress or eval to run them all; without it, give one value "
            "(in quotes when it holds a comma).",
        )
    return job_from(stage, hydra_compose(words.with_method(stage), extra), words.chosen)


def existing(folder: Path) -> Path:
    """Return the absolute path of a folder with somebody's own configs.

    Raises:
        UserError: When there is none.
    """
    if not folder.is_dir():
        raise UserError(f"--config-dir {folder} is not a folder.", "Create it or correct the path.")
    return folder.resolve()


@dataclass(frozen=True)
class Words:
    """Checked overrides."""

    words: list[str]
    """As Hydra takes them."""
    chosen: set[str]
    """The groups and keys that they set."""
    swept: str = ""
    """The first one that asks for several runs."""

    def with_method(self, stage: Stage | None) -> list[str]:
        """Return the words, with a method for the stage when they name none."""
        if self.chosen & {"method", "experiment"}:
            return self.words
        return [*self.words, f"method={DEFAULT_METHOD[stage or 'train']}"]


def check_overrides(overrides: Sequence[str], extra: Sequence[Path] = ()) -> Words:
    """Check the names in overrides.

    Raises:
        UserError: For a word that is no override, an unknown group, key or config name.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    known = groups(extra)
    words, chosen, swept = [], set(), ""
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            raise UserError(
                f"{text!r} is not an override.",
                "Write key=value, for example method=qdylora or train.max_steps=100; "
                "quote values with spaces or commas.",
            ) from None
        key = override.key_or_group
        top = key.split(".")[0].split("/")[0].split("@")[0]
        if top not in TOP_LEVEL and top not in known:
            raise UserError(
                f"There is no config group or key {top!r}.",
                did_you_mean(top, [*known, *TOP_LEVEL]),
            )
        if key in known:
            text = _check_group(override, text, extra)
        elif top in JUDGED_BY_US and "." in key and not override.is_delete():
            text = "++" + text.lstrip("+")
        words.append(text)
        chosen.add(key)
        swept = swept or (text.lstrip("+") if override.is_sweep_override() else "")
    return Words(words, chosen, swept)


def _check_group(override: Any, text: str, extra: Sequence[Path]) -> str:
    """Return the override of a whole group as Hydra takes it."""
    group, value = override.key_or_group, override._value
    for name in _names_in(override):
        _check_option(group, name, extra)
    empty = override.is_delete() or value is None
    if empty and group in SEVERAL:
        return f"{group}=[]"
    if (empty and group != "experiment") or (isinstance(value, list) and group not in SEVERAL):
        raise UserError(f"A run has exactly one {group}.", did_you_mean("", options(group, extra)))
    return text


def _names_in(override: Any) -> list[str]:
    from hydra.core.override_parser.types import QuotedString, Sweep

    value = override._value
    if isinstance(value, Sweep):
        value = getattr(value, "list", None) or []
    names: list[str] = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, QuotedString):
            names.append(item.text)
        elif isinstance(item, list):
            names += [str(i) for i in item]
        elif item is not None:
            names.append(str(item))
    return names


def _check_option(group: str, name: str, extra: Sequence[Path]) -> None:
    if name not in options(group, extra):
        raise UserError(
            f"There is no {group} called {name!r}.", did_you_mean(name, options(group, extra))
        )


def hydra_compose(overrides: Sequence[str], extra: Sequence[Path]) -> dict[str, Any]:
    """Return the composed config of one run as plain values.

    Raises:
        UserError: When it cannot be composed, with the reason.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import ConfigCompositionException, HydraException

    register_plugin_configs()
    paths = [f"hydra.searchpath=[{','.join(f'file://{p}' for p in extra)}]"] if extra else []
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        try:
            config = compose("config", overrides=[*paths, *overrides])
            return to_plain(config)
        except (ConfigCompositionException, HydraException) as error:
            raise _explain(error, overrides) from None


def to_plain(config: Any) -> dict[str, Any]:
    """Return a composed config as plain values, interpolations resolved.

    Raises:
        UserError: When a value is missing (`???`) or cannot be resolved.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        missing = OmegaConf.missing_keys(config)
        if missing:
            first = min(missing)
            raise UserError(f"{first} has no value.", f"Give one: {first}=VALUE.")
        values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore
    except OmegaConfBaseException as error:
        raise UserError(f"The config cannot be resolved: {str(error).splitlines()[0]}.") from None
    return values


def register_plugin_configs() -> None:
    """Offer a config for every method of another package that has no file of its own."""
    from hydra.core.config_store import ConfigStore

    for name in registry.plugins("methods"):
        defaults = settings_of(registry.find("methods", name))
        ConfigStore.instance().store(name, {"name": name, **defaults}, group="method")


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


def _explain(error: Exception, overrides: Sequence[str]) -> UserError:
    reason = str(error.__cause__ or error).splitlines()[0]
    launcher = re.search(r"hydra/launcher/(\w+)", str(error))
    if launcher:
        name = launcher[1].removeprefix("submitit_")
        return UserError(
            f"The launcher plug-in {launcher[1]!r} is not installed.",
            f"pip install 'effbench[{name}]'",
        )
    for text in overrides:
        group, _, rest = text.split("=")[0].partition(".")
        name = rest.split(".")[0]
        if group in SEVERAL and name:
            return _explain_member(group, name, text)
    return UserError(f"The config cannot be composed: {reason.rstrip('.')}.")


def _explain_member(group: str, name: str, text: str) -> UserError:
    known = options(group)
    if name not in known:
        return UserError(f"There is no {group} called {name!r}.", did_you_mean(name, known))
    path = known[name]
    key = text.split("=")[0].rpartition(".")[2]
    keys = keys_of(path) if path else []
    if key in keys:
        return UserError(
            f"{text} is set, but {name} is not chosen.",
            f"Choose it too, for example {group}=[perplexity,{name}].",
        )
    return UserError(f"Unknown key {text.split('=')[0]!r}.", did_you_mean(key, keys))


def job_from(stage: Stage | None, config: dict[str, Any], chosen: set[str]) -> Job:
    """Return the job that a composed config describes; see `compose`."""
    config = dict(config)
    config.pop("hydra", None)
    unknown = config.keys() - TOP_LEVEL - set(groups())
    if unknown:
        first = min(unknown)
        raise UserError(f"Unknown key {first!r}.", did_you_mean(first, [*TOP_LEVEL, *groups()]))
    for part in ("hardware", "run", "method", "model", "dataset", "train"):
        if not isinstance(config.get(part), dict):
            raise UserError(f"{part} must hold keys.", f"Set one of them: {part}.KEY=VALUE.")
    hardware, machine = _hardware(config["hardware"])
    runtime = build(Runtime, {**config["run"], "machine": machine}, "run")
    store = Store(Path(runtime.results))

    parent = store.spec_of(store.resolve(config["from"])) if config["from"] else None
    stage = stage or registry.find("methods", config["method"]["name"]).stage
    method, model, dataset = _inherit(stage, config, chosen, parent)
    train = build(TrainSpec, config["train"], "train")
    if train.learning_rate is None:
        rate = registry.find("methods", method.name).learning_rate
        train = dataclasses.replace(train, learning_rate=rate)
    spec = Spec(
        stage=stage,
        method=method,
        model=model,
        dataset=dataset,
        evaluators=[
            _plugin("evaluators", name, settings, f"evaluator.{name}")
            for name, settings in sorted((config.get("evaluator") or {}).items())
        ],
        train=train,
        hardware=hardware,
        seed=build(_Seed, {"seed": config["seed"]}, "").seed,
        parent=parent.key if parent else "",
    )
    _check_methods(spec, store)
    _check_data(spec)
    return Job(spec, runtime)


@dataclass(frozen=True)
class _Seed:
    seed: NonNegativeInt


def _inherit(
    stage: Stage, config: dict[str, Any], chosen: set[str], parent: Spec | None
) -> tuple[Plugin, ModelSpec, DatasetSpec]:
    """Return method, model and dataset; what an earlier run fixed cannot be chosen again."""
    if parent:
        _refuse_fixed(stage, chosen, parent)
    settings = dict(config["method"])
    method = _plugin("methods", settings.pop("name"), settings, "method")
    if parent is None:
        return method, _model(config["model"]), _dataset(config["dataset"])
    if chosen & {"dataset", "experiment"}:
        dataset = _dataset(config["dataset"])
    else:
        keys = [c.split(".")[1:] for c in chosen if c.startswith("dataset.")]
        dataset = _dataset(_overlaid(plain(parent.dataset), config["dataset"], keys))
    if _model(plain(parent.model)) != parent.model:
        raise UserError(
            f"The files of {parent.model.path} have changed since run {parent.key}.",
            "Put them back, or run that one again first.",
        )
    return (parent.method if stage == "eval" else method), parent.model, dataset


def _refuse_fixed(stage: Stage, chosen: set[str], parent: Spec) -> None:
    for key in ("model", "method") if stage == "eval" else ("model",):
        if any(c == key or c.startswith(f"{key}.") for c in chosen):
            raise UserError(
                f"from= already fixes the {key} ({getattr(parent, key).name}).",
                f"Leave {key} out, or leave from= out.",
            )


def _overlaid(
    values: dict[str, Any], changed: dict[str, Any], keys: Sequence[list[str]]
) -> dict[str, Any]:
    """Return values with those of `changed` at some keys; a key that is gone there goes."""
    for *path, last in keys:
        there, here = changed, values
        for part in path:
            there, here = there.get(part) or {}, here.setdefault(part, {})
        if last in there:
            here[last] = there[last]
        else:
            here.pop(last, None)
    return values


def _plugin(kind: registry.Kind, name: str, settings: dict[str, Any], where: str) -> Plugin:
    cls = registry.find(kind, name)
    return Plugin(name, plain(build(cls, settings, where)))


def _model(values: dict[str, Any]) -> ModelSpec:
    from effbench.models import fingerprint

    spec = build(ModelSpec, values, "model")
    return dataclasses.replace(spec, fingerprint=fingerprint(spec))


def _dataset(values: dict[str, Any]) -> DatasetSpec:
    from effbench.datasets import fingerprint

    spec = build(DatasetSpec, values, "dataset")
    return dataclasses.replace(spec, fingerprint=fingerprint(spec))


def _hardware(values: dict[str, Any]) -> tuple[HardwareSpec, dict[str, Any]]:
    from effbench.measure.hardware import default_device, default_dtype

    machine_keys = {f.name for f in dataclasses.fields(Machine)}
    machine = {k: v for k, v in values.items() if k in machine_keys}
    rest = {k: v for k, v in values.items() if k not in machine_keys}
    known = {f.name for f in dataclasses.fields(HardwareSpec)}
    if unknown := sorted(rest.keys() - known):
        raise UserError(
            f"Unknown key 'hardware.{unknown[0]}'.", did_you_mean(unknown[0], known | machine_keys)
        )
    if rest.get("device") == "auto":
        rest["device"] = default_device()
    if rest.get("dtype") == "auto":
        rest["dtype"] = default_dtype(str(rest.get("device")))
    return build(HardwareSpec, rest, "hardware"), machine


def _check_methods(spec: Spec, store: Store) -> None:
    method = make_method(spec.method)
    if spec.stage != "eval" and method.stage != spec.stage:
        if method.stage == "eval":
            raise UserError(
                f"{method.name} changes nothing, so there is nothing to {spec.stage}.",
                "Choose another method (effbench list methods), or use effbench eval.",
            )
        raise UserError(
            f"{method.name} is not a method to {spec.stage} with.",
            f"Use: effbench {method.stage} method={method.name}",
        )
    earlier = [make_method(s.method) for s in store.ancestors(spec)]
    if spec.stage != "eval":
        method.check_after(earlier)
    elif not spec.parent and method.stage != "eval":
        raise UserError(
            f"effbench eval evaluates a model as it is, or what a run made, not {method.name}.",
            f"Use: effbench {method.stage} method={method.name}, or eval from=RUN.",
        )
    shape = known_shape(spec.model)
    if shape:
        method.check(shape)


def _check_data(spec: Spec) -> None:
    """Refuse splits that the dataset will not have, and sequences longer than the model takes."""
    from effbench.datasets import split_names

    known = split_names(spec.dataset)
    wanted = ["train"] if spec.stage == "train" else []
    if spec.stage == "train" and spec.train.validate_every:
        wanted.append("validation")
    wanted += [p.settings["split"] for p in spec.evaluators if "split" in p.settings]
    for split in wanted:
        if split not in known:
            raise UserError(
                f"dataset {spec.dataset.name!r} has no split {split!r}.", did_you_mean(split, known)
            )
    shape = known_shape(spec.model)
    if shape and spec.dataset.max_length > shape.max_positions:
        raise UserError(
            f"dataset.max_length={spec.dataset.max_length} is more than the "
            f"{shape.max_positions} positions of {spec.model.name}.",
            f"Lower it: dataset.max_length={shape.max_positions}",
        )


def make_method(plugin: Plugin) -> Any:
    """Return the method that a spec names, with its settings."""
    return build(registry.find("methods", plugin.name), plugin.settings, "method")


def make_evaluator(plugin: Plugin) -> Any:
    """Return the evaluator that a spec names, with its settings."""
    cls = registry.find("evaluators", plugin.name)
    return build(cls, plugin.settings, f"evaluator.{plugin.name}")


def known_shape(model: ModelSpec) -> Shape | None:
    """Return the model's shape where it can be known without loading the model."""
    from effbench.models import shape_of

    if model.shape:
        return model.shape
    if model.source == "hub":
        try:
            return shape_of(model)
        except UserError:
            return None
    return shape_of(model)


def spec_from(values: dict[str, Any]) -> Spec:
    """Return the spec that a run folder or a record holds."""
    return build(Spec, values, "spec")


def read_spec(path: Path) -> Spec:
    """Return the spec in a file that `Store` wrote."""
    return spec_from(json.loads(path.read_text()))
