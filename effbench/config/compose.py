"""From command-line overrides to a frozen, validated `Job`, before torch is imported."""

from __future__ import annotations

import copy
import dataclasses
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from effbench.api import registry
from effbench.api.keys import copied, sources_of, versions_of
from effbench.api.plugins import make_evaluator, make_method
from effbench.api.schema import Seed, build, escaped, plain
from effbench.api.shape import AnyShape, ModelShape
from effbench.api.spec import (
    DatasetSpec,
    HardwareSpec,
    Job,
    Machine,
    ModelSpec,
    Parallelism,
    Plugin,
    Runtime,
    Spec,
    Stage,
    TrainSpec,
)
from effbench.api.stages import base as stages
from effbench.config.code import checked
from effbench.config.composed import settings_of
from effbench.config.files import groups, options
from effbench.config.lineage import Lineage, dataset_after, inherit, model_spec, plugin
from effbench.config.overrides import TOP_LEVEL, check_overrides
from effbench.config.parallelism import check_parallelism
from effbench.config.start import Start, split_words, start_of
from effbench.config.vary import Composer
from effbench.data.forms import recognised
from effbench.methods.chain import resolved
from effbench.methods.trains import Read, Trains, require_same
from effbench.models.load import known_shape
from effbench.nn.model_kinds.base import find as find_kind
from effbench.results.store import Store, results_dir
from effbench.util.errors import UserError, did_you_mean

SCORED = "preference"
"""The evaluator that goes by a method's own score."""


def compose(
    stage: Stage | None,
    overrides: Sequence[str],
    extra: Sequence[Path] = (),
    like: str = "",
) -> Job:
    """Return the validated job of a command.

    Args:
        stage: The command, or None for the stage that the method itself belongs to.
        overrides: Hydra overrides as typed, perhaps after a file with a spec.
        extra: Folders with the user's own configs, searched first.
        like: An earlier run whose spec is taken where nothing else is said.

    Raises:
        UserError: For anything a user can mend: unknown names, wrong types, impossible values,
            an unknown `from=`, a pair of methods that cannot follow each other.
    """
    extra = checked(extra)
    files, overrides = split_words(overrides)
    words = check_overrides(overrides, extra)
    if words.swept:
        raise UserError(
            f"{words.swept} asks for several runs.",
            "Add -m to train, compress or eval to run them all; without it, give one value "
            "(in quotes when it holds a comma).",
        )
    if begun := start_of(files, like, _results_in(overrides), stage, extra):
        job = job_from(stage, *_started(begun, stage, overrides, extra))
    else:
        job = job_from(stage, Composer(extra)(words.with_defaults(stage)), words.chosen)
    return commanded(job, [*map(str, files), *overrides, *(["--like", like] if like else [])])


def model_named(name: str) -> ModelSpec:
    """Return the model of a config or in a folder, such as a teacher.

    Raises:
        UserError: When there is none of that name, or its files are not there.
    """
    if name in (known := options("model")):
        words = check_overrides([f"model={name}"], ())
    elif Path(name).expanduser().is_dir():
        words = check_overrides(["model=folder", f"model.path='{name}'"], ())
    else:
        hint = f"{did_you_mean(name, known)} Or give the path of a model's folder."
        raise UserError(f"There is no model called {name!r}.", hint)
    found = model_spec(Composer()(words.with_defaults("eval"))["model"])
    return dataclasses.replace(found, name=name)


def others_of(spec: Spec) -> list[str]:
    """Return the names of the other models that a run loads, sorted.

    What an evaluated run was made with is in the key of that run.
    """
    method = make_method(spec.method)
    own = stages.find(spec.stage).makes or not stages.find(method.stage).makes
    named = set(method.others() if own else ())
    return sorted(named.union(*(make_evaluator(p).others() for p in spec.evaluators)))


def _started(
    start: Start, stage: Stage | None, overrides: Sequence[str], extra: Sequence[Path]
) -> tuple[dict[str, Any], set[str], set[str]]:
    """Return the config of a spec with words over it, what is chosen, and what of it was typed."""
    typed = check_overrides(overrides, extra).chosen
    words = check_overrides([*overrides, *start.words(typed)], extra)
    composed = _unescaped(copied(Composer(extra)(words.with_defaults(stage))), typed)
    config = start.under(composed, typed)
    if "known_by" in start.parts.get("dataset", {}) and "dataset" not in typed:
        earlier = build(DatasetSpec, start.parts["dataset"], "dataset")
        config["dataset"] = plain(dataset_after(composed["dataset"], typed, earlier))
    return config, start.chosen(typed), typed


def _results_in(overrides: Sequence[str]) -> Path:
    """Return the folder of results that words name, before they are composed."""
    named = [w.partition("=")[2] for w in overrides if w.startswith("run.results=")]
    return Path(named[-1].strip("'\"")).expanduser() if named else results_dir()


def commanded(job: Job, words: Sequence[str]) -> Job:
    """Return a job that knows its command, with the key of the run that `from=` means.

    Args:
        job: Of one run.
        words: As typed after `effbench STAGE`, or as a grid spells them for Hydra, with `++`.
    """
    plainly = [w.removeprefix("++") for w in words]
    told = [f"from={job.spec.parent}" if w.startswith("from=") else w for w in plainly]
    command = shlex.join(["effbench", job.spec.stage, *told])
    return dataclasses.replace(job, command=command)


def job_from(
    stage: Stage | None, config: dict[str, Any], chosen: set[str], typed: set[str] | None = None
) -> Job:
    """Return the job that a composed config describes; see `compose`.

    Args:
        stage: The command.
        config: Plain values.
        chosen: The groups and keys that are no defaults.
        typed: Those of them that the command names, where a file names others; in `config` line
            ends are as in a file then.
    """
    config = _unescaped(config, chosen if typed is None else set())
    config.pop("hydra", None)
    unknown = config.keys() - TOP_LEVEL - set(groups())
    if unknown:
        first = min(unknown)
        raise UserError(f"Unknown key {first!r}.", did_you_mean(first, [*TOP_LEVEL, *groups()]))
    for part in ("hardware", "run", "method", "model", "dataset", "train"):
        if not isinstance(config.get(part), dict):
            raise UserError(f"{part} must hold keys.", f"Set one of them: {part}.KEY=VALUE.")
    hardware, around = _hardware(config["hardware"])
    if misplaced := sorted(config["run"].keys() & around.keys()):
        raise UserError(
            f"Unknown key 'run.{misplaced[0]}'.",
            f"It is set by {' and '.join(f'hardware.{k}' for k in around[misplaced[0]])}.",
        )
    runtime = build(Runtime, {**config["run"], **around}, "run")
    runtime = dataclasses.replace(runtime, results=str(results_of(config)))
    store = Store(Path(runtime.results))

    start = _start(config["from"], chosen, store)
    parent = store.spec_of(start) if start else None
    stage = stage or registry.find("methods", config["method"]["name"]).stage
    config["dataset"], note = recognised(config["dataset"])
    method, model, dataset = inherit(stage, config, chosen, start, parent)
    train = build(
        TrainSpec, _one_length(config["train"], chosen if typed is None else typed), "train"
    )
    if train.learning_rate is None:
        rate = registry.find("methods", method.name).learning_rate
        train = dataclasses.replace(train, learning_rate=rate)
    asked = _asked(config, chosen, model, method)
    if typed is None or "evaluator" in typed:
        asked = {name: _suited(name, own, chosen, dataset) for name, own in asked.items()}
    spec = Spec(
        stage=stage,
        method=method,
        model=model,
        dataset=dataset,
        evaluators=[
            plugin("evaluators", name, settings, f"evaluator.{name}")
            for name, settings in sorted(asked.items())
        ],
        train=train,
        hardware=hardware,
        seed=build(_Seed, {"seed": config["seed"]}, "").seed,
        parent=start,
    )
    lineage = Lineage.of(spec, store)
    sources = sources_of(spec, lineage.methods)
    spec = dataclasses.replace(spec, versions=versions_of(spec), sources=sources)
    _check_methods(spec, lineage)
    check_parallelism(spec, runtime.parallelism)
    _check_data(spec)
    spec = dataclasses.replace(spec, others=[model_named(name) for name in others_of(spec)])
    _check_auxiliary(spec)
    _check_evaluators(spec, lineage)
    remarks = (make_evaluator(each).remark(dataset) for each in spec.evaluators)
    return Job(spec, runtime, notes=tuple(filter(None, (note, *remarks))))


def _asked(
    config: dict[str, Any], chosen: set[str], model: ModelSpec, method: Plugin
) -> dict[str, Any]:
    """Return the settings of evaluators: of those chosen, else of what asks such a model.

    What answers beside the model's own head is asked by its score, not by that head.
    """
    found: dict[str, Any] = config.get("evaluator") or {}
    if found and not {word.partition(".")[0] for word in chosen} & {"evaluator", "experiment"}:
        shape = known_shape(model)
        own = find_kind(ModelShape.of(shape).kind).evaluator if shape else ""
        if own and registry.find("methods", method.name).answers_with:
            own = SCORED
        return {own: {}} if own else found
    return found


def _suited(
    name: str, settings: dict[str, Any], chosen: set[str], dataset: DatasetSpec
) -> dict[str, Any]:
    """Return the settings of an evaluator, with those that suit a dataset where they are defaults.

    Args:
        name: Of the evaluator.
        settings: Of a config.
        chosen: The groups and keys that are no defaults.
        dataset: Of the run.
    """
    if name not in registry.names("evaluators"):
        return settings
    cls = registry.find("evaluators", name)
    usual = settings_of(cls)
    left = {k for k, v in usual.items() if plain(settings.get(k, v)) == v} - {
        place.split(".")[2] for place in chosen if place.startswith(f"evaluator.{name}.")
    }
    return {**settings, **{k: v for k, v in cls.suited(dataset).items() if k in left}}


def _one_length(values: dict[str, Any], chosen: set[str]) -> dict[str, Any]:
    """Return the settings of training with steps or epochs, whichever was asked for.

    Raises:
        UserError: When both were, or no steps at all.
    """
    steps, epochs = values.get("max_steps"), values.get("epochs")
    if steps == 0 and not epochs:
        raise UserError(
            "train.max_steps=0 is not possible: it has to be greater than 0.",
            "Give steps, or train.epochs in their place.",
        )
    if not epochs or not steps:
        return values
    typed = {f"train.{name}" for name in ("max_steps", "epochs")} & chosen
    if len(typed) == 2 or (not typed and steps != TrainSpec.max_steps):
        raise UserError(
            f"train.max_steps={steps} and train.epochs={epochs} are two lengths of one training.",
            "Give one of them.",
        )
    return {**values, "epochs": 0.0} if "train.max_steps" in typed else {**values, "max_steps": 0}


def results_of(config: dict[str, Any]) -> Path:
    """Return the folder of results that a composed config names."""
    place = config["run"].get("results")
    return Path(str(place)).expanduser() if place else results_dir()


def _unescaped(config: dict[str, Any], chosen: set[str]) -> dict[str, Any]:
    r"""Return a config in whose texts that were typed \n is a line end, as it is in a YAML file.

    Hydra takes a backslash in a word as it is; two of them stand for one.
    """
    places = {place for place in chosen if _is_model_text(place, config)}
    config = copy.deepcopy(config) if places else dict(config)
    for place in places:
        *path, last = place.split(".")
        part = config
        for name in path:
            part = part.get(name) or {}
        if last in part:
            part[last] = _with_line_ends(part[last])
    return config


def _is_model_text(place: str, config: dict[str, Any]) -> bool:
    """Whether the setting at a place is text that a model reads or writes."""
    group, *inside = place.split(".")
    name = inside.pop() if inside else ""
    cls: type | None = None
    if group == "dataset" and not inside:
        cls = DatasetSpec
    elif group == "method" and not inside and isinstance(config.get("method"), dict):
        known, own = registry.names("methods"), config["method"].get("name")
        cls = registry.find("methods", own) if own in known else None
    elif group == "evaluator" and len(inside) == 1:
        known = registry.names("evaluators")
        cls = registry.find("evaluators", inside[0]) if inside[0] in known else None
    return cls is not None and name in escaped(cls)


def _with_line_ends(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_line_ends(v) for v in value]
    if not isinstance(value, str):
        return value
    ends = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda m: ends[m[1]], value)


@dataclass(frozen=True)
class _Seed:
    seed: Seed


def _start(ref: Any, chosen: set[str], store: Store) -> str:
    """Return the key of the run that `from=` names; empty when there is no `from=`.

    Raises:
        UserError: When it names nothing, or no finished run.
    """
    if ref in ("", None):
        if "from" in chosen:
            raise UserError(
                "from= names no run.",
                "Name one, for example from=latest, or leave from= out.",
            )
        return ""
    if not isinstance(ref, str):
        raise UserError(f"from={ref} is no text.", "In a file, write the key in quotes.")
    return _run_of_experiment(ref, store) if ref in options("experiment") else store.resolve(ref)


def _run_of_experiment(name: str, store: Store) -> str:
    """Return the key of the run of an experiment as it is, such as `mini`.

    Raises:
        UserError: When it was not made here, or not to its end.
    """
    spec = compose(None, [f"experiment={name}"]).spec
    if not store.run(spec.key).finished:
        raise UserError(
            f"The run of experiment={name} ({spec.key}) is not in {store.root}.",
            f"Make it: effbench {spec.stage} experiment={name}",
        )
    return spec.key


def _hardware(values: dict[str, Any]) -> tuple[HardwareSpec, dict[str, Any]]:
    """Return what of the hardware is in the key, and the parts of `Runtime` by name."""
    from effbench.util.hardware import default_device, default_dtype

    known = _parts_of_hardware()
    if unknown := sorted(values.keys() - known.keys()):
        raise UserError(f"Unknown key 'hardware.{unknown[0]}'.", did_you_mean(unknown[0], known))
    around: dict[str, Any] = {part: {} for part in known.values()}
    for name, value in values.items():
        around[known[name]][name] = value
    rest = around.pop("")
    if rest.get("device") == "auto":
        rest["device"] = default_device()
    if rest.get("dtype") == "auto":
        rest["dtype"] = default_dtype(str(rest.get("device")))
    around["parallelism"] = plain(build(Parallelism, around["parallelism"], "hardware"))
    return build(HardwareSpec, rest, "hardware"), around


@cache
def _parts_of_hardware() -> dict[str, str]:
    """Return the part of `Runtime` that a key of the hardware is in; empty for the run's key."""
    kinds = {"": HardwareSpec, "machine": Machine, "parallelism": Parallelism}
    return {f.name: part for part, cls in kinds.items() for f in dataclasses.fields(cls)}


def _check_methods(spec: Spec, lineage: Lineage) -> None:
    method, stage = make_method(spec.method), stages.find(spec.stage)
    changes = stages.find(method.stage).makes
    if stage.makes and method.stage != spec.stage:
        if not changes:
            raise UserError(
                f"{method.name} changes nothing, so there is nothing to {spec.stage}.",
                "Choose another method (effbench list methods), or use effbench eval.",
            )
        raise UserError(
            f"{method.name} is not a method to {spec.stage} with.",
            f"Use: effbench {method.stage} method={method.name}",
        )
    if stage.makes or (lineage.earlier and not changes):
        method.check_start(lineage.earlier)
    elif not spec.parent and changes and stage.loads:
        raise UserError(
            f"effbench eval evaluates a model as it is, or what a run made, not {method.name}.",
            f"Use: effbench {method.stage} method={method.name}, or eval from=RUN.",
        )
    shape = known_shape(spec.model)
    if shape:
        resolved(method, lineage.start(shape))


def _check_data(spec: Spec) -> None:
    """Refuse splits that the dataset will not have, and sequences longer than the model takes."""
    from effbench.data.dataset import no_split, split_names

    known = split_names(spec.dataset)
    trains = stages.find(spec.stage).trains
    wanted = ["train"] if trains else []
    if trains and spec.train.validate_every:
        wanted.append("validation")
    wanted += [s for p in spec.evaluators for s in make_evaluator(p).splits()]
    for split in wanted:
        if split not in known:
            raise no_split(spec.dataset, split, known)
    if trains:
        make_method(spec.method).check_dataset(spec.dataset)
    if spec.dataset.drawn and trains and "train" not in spec.dataset.limit:
        raise UserError(
            "dataset.drawn draws some of the training rows, and all of them are taken.",
            "Say how many: dataset.limit.train=16",
        )
    for split in spec.dataset.limit:
        if split not in known:
            raise UserError(
                f"dataset.limit.{split} limits nothing: dataset {spec.dataset.called!r} has no "
                f"split {split!r}.",
                did_you_mean(split, known),
            )


def check_kind(spec: Spec, shape: AnyShape) -> None:
    """Refuse rows and evaluators that a kind of model has no answers to.

    Args:
        spec: The run.
        shape: Of its base model.

    Raises:
        UserError: With what to take instead.
    """
    from effbench.data.kinds.base import find as find_rows

    kind = find_kind(ModelShape.of(shape).kind)
    for evaluator in map(make_evaluator, spec.evaluators):
        if kind.name not in evaluator.model_kinds:
            classes = (registry.find("evaluators", n) for n in registry.names("evaluators"))
            able = sorted(c.name for c in classes if c.needs_model and kind.name in c.model_kinds)
            raise UserError(
                f"Evaluator {evaluator.name} cannot ask {spec.model.called}: it is {kind.one}.",
                f"Evaluators for it: {', '.join(able)}. For example evaluator={able[0]}",
            )
    if spec.hardware.dtype == "float16" and ModelShape.of(shape).encoder:
        raise UserError(
            f"{spec.model.called} leaves the range of hardware.dtype=float16, as T5 does.",
            "Use hardware.dtype=bfloat16 or float32.",
        )
    reads = bool(spec.evaluators) or stages.find(spec.stage).makes
    if reads and kind.rows and not getattr(find_rows(spec.dataset.kind), kind.rows):
        message, hint = kind.other_rows
        raise UserError(f"dataset {spec.dataset.called!r}: {message}", hint)


def check_lengths(spec: Spec, shape: AnyShape) -> None:
    """Refuse rows and contexts that are longer than a model takes.

    Args:
        spec: The run.
        shape: Sizes of its base model.

    Raises:
        UserError: Naming the setting.
    """
    most = f"is more than the {shape.max_positions} positions of {spec.model.called}."
    if spec.dataset.max_length > shape.max_positions:
        raise UserError(
            f"dataset.max_length={spec.dataset.max_length} {most}",
            f"Lower it: dataset.max_length={shape.max_positions}",
        )
    for evaluator in map(make_evaluator, spec.evaluators):
        if (context := evaluator.context()) > shape.max_positions:
            place = f"evaluator.{evaluator.name}"
            raise UserError(
                f"{place}: a context of {context} tokens {most}",
                f"Lower {place}.prompt_tokens or {place}.new_tokens.",
            )


def _check_auxiliary(spec: Spec) -> None:
    """Refuse a teacher that reads or answers otherwise than the trained model, as far as is known.

    Raises:
        UserError: Naming the setting.
    """
    if not spec.others:
        return
    method, ours = make_method(spec.method), known_shape(spec.model)
    known = {other.name: known_shape(other) for other in spec.others}
    method.check_others({name: shape for name, shape in known.items() if shape})
    if ours and isinstance(method, Trains) and stages.find(spec.stage).trains:
        for key, name in method.aux_models().items():
            if theirs := known.get(name):
                require_same(key, name, Read.by(theirs), Read.by(ours))


def _check_evaluators(spec: Spec, lineage: Lineage) -> None:
    shape = known_shape(spec.model)
    if shape:
        check_kind(spec, shape)
        check_lengths(spec, shape)
    for evaluator in map(make_evaluator, spec.evaluators):
        if evaluator.needs_model and not stages.find(spec.stage).loads:
            raise UserError(
                f"{evaluator.name} asks a model, and effbench {spec.stage} loads none.",
                "Leave it out, or use effbench eval.",
            )
        evaluator.check(spec, lineage.methods, shape)
