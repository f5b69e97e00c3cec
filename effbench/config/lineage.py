"""What a run goes on from: the runs that made it, and what of theirs it takes over.

| command | method | model | dataset |
|---|---|---|---|
| without `from=` | chosen | chosen | chosen |
| `from=`, a stage that makes | chosen | the run's | the run's, with the chosen keys |
| `from=`, one that makes nothing | the run's, with the chosen free settings | the same | the same |
| the same, with a method that reads | chosen | the same | the same |

Free are settings of evaluation (`eval_settings`); a method reads when it makes nothing itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from effbench.api import registry
from effbench.api.cost import Cost
from effbench.api.plugins import make_method
from effbench.api.points import Point
from effbench.api.schema import build, plain
from effbench.api.shape import AnyShape, ModelShape
from effbench.api.spec import DatasetSpec, ModelSpec, Plugin, Spec
from effbench.api.stages import base as stages
from effbench.methods.base import Method
from effbench.methods.chain import chain, chain_shapes, inference_cost, last_shape
from effbench.models.load import fingerprint, unchanged
from effbench.results.store import RunFolder, Store
from effbench.util.errors import UserError
from effbench.util.package_data import conf_dir


@dataclass(frozen=True)
class Lineage:
    """The methods that a run's model goes through, first to last."""

    earlier: tuple[Method, ...]
    """Those that made what the run starts from."""
    methods: tuple[Method, ...]
    """All, the run's own last; an evaluation goes through the last one again."""
    folders: tuple[Path, ...]
    """The artefact of each of the earlier ones, and of the run itself."""
    made_by: tuple[RunFolder, ...]
    """The run of each of the earlier ones."""

    @classmethod
    def of(cls, spec: Spec, store: Store, artefact: Path | None = None) -> Lineage:
        """Return the lineage of a run.

        Args:
            spec: The run.
            store: Where the runs before it are.
            artefact: Where the run's own is or will be.

        Raises:
            UserError: When what an earlier run left is damaged; large files are looked at when
                they are loaded.
        """
        ancestors = store.ancestors(spec)
        earlier = tuple(make_method(s.method) for s in ancestors.values())
        made_by = tuple(map(store.run, ancestors))
        folders = tuple(folder.check_artefact(whole=False) for folder in made_by)
        own = (artefact,) if artefact else ()
        return cls(earlier, tuple(chain(spec, earlier)), folders + own, made_by)

    @property
    def artefacts(self) -> tuple[Path, ...]:
        """The artefacts of the earlier methods."""
        return self.folders[: len(self.earlier)]

    def start(self, base: AnyShape) -> ModelShape:
        """Return the shape of what the run's own method starts from.

        Args:
            base: Of the base model.
        """
        *before, own = self.methods
        shapes = chain_shapes(before, base, self.artefacts, own)
        return [ModelShape.of(base), *shapes][-1]

    def left(self, base: AnyShape) -> ModelShape:
        """Return the shape of what the run leaves: as planned, until its artefact is there."""
        return chain_shapes(self.methods, base, self.folders)[-1]

    def cost(self, base: AnyShape, dtype: str, point: Point) -> Cost:
        """Return what the model that the run evaluates needs at an operating point."""
        return inference_cost(self.methods, base, dtype, point, self.folders)

    def used(self, base: AnyShape, point: Point) -> ModelShape:
        """Return the model that the run evaluates as it is used at an operating point."""
        return last_shape(self.methods, base, point, self.folders).used()


# -- what an earlier run fixed -----------------------------------------------------------------


def inherit(
    stage: str, config: Mapping[str, Any], chosen: set[str], start: str, parent: Spec | None
) -> tuple[Plugin, ModelSpec, DatasetSpec]:
    """Return method, model and dataset of a run; the table above says whose.

    Args:
        stage: The command.
        config: The composed config.
        chosen: The groups and keys that the user set.
        start: Key of the run that `from=` names.
        parent: Its spec; None without `from=`.

    Raises:
        UserError: When what the earlier run fixed is chosen again, or its files have changed.
    """
    settings = dict(config["method"])
    name = settings.pop("name")
    if parent is None:
        method = plugin("methods", name, settings, "method")
        return method, model_spec(config["model"]), dataset_spec(config["dataset"], True)
    _refuse_fixed(stage, name, chosen, parent)
    if _taken_over(stage, name, chosen):
        method = _at_evaluation(settings, chosen, parent.method)
    else:
        method = plugin("methods", name, settings, "method")
    model = _model_after(config["model"], chosen, parent.model, start)
    return method, model, dataset_after(config["dataset"], chosen, parent.dataset)


def _taken_over(stage: str, name: str, chosen: set[str]) -> bool:
    """Whether the method is that of the earlier run: nothing is made, and nothing else reads it."""
    if stages.find(stage).makes:
        return False
    reads = not stages.find(registry.find("methods", name).stage).makes
    return not (reads and name != "none" and "method" in chosen)


def _at_evaluation(settings: Mapping[str, Any], chosen: set[str], method: Plugin) -> Plugin:
    """Return the method of an earlier run with the chosen settings of its evaluation."""
    keys = {c.removeprefix("method.") for c in chosen if c.startswith("method.")}
    given = {key: settings[key] for key in keys}
    return plugin("methods", method.name, {**method.settings, **given}, "method")


def _refuse_fixed(stage: str, name: str, chosen: set[str], parent: Spec) -> None:
    free = registry.find("methods", parent.method.name).eval_settings
    chosen = chosen - {f"method.{key}" for key in free}
    if parent.model.path:
        chosen = chosen - {"model.path"}
    fixed = ("model", "method") if _taken_over(stage, name, chosen) else ("model",)
    for key in fixed:
        if any(c == key or c.startswith(f"{key}.") for c in chosen):
            raise UserError(
                f"from= already fixes the {key} ({getattr(parent, key).name}).",
                f"Leave {key} out, or leave from= out.",
            )


def _model_after(
    values: Mapping[str, Any], chosen: set[str], earlier: ModelSpec, start: str
) -> ModelSpec:
    """Return the model of an earlier run, perhaps with its files in another place.

    Raises:
        UserError: When they are no longer what they were.
    """
    if earlier.source == "hub":  # what it was, whatever its branch has become
        return earlier
    if "model.path" in chosen:
        earlier = dataclasses.replace(earlier, path=str(values["path"]))
    if not unchanged(earlier):
        raise UserError(
            f"The files of {earlier.path} have changed since run {start}.",
            "Put them back, or run that one again first.",
        )
    return model_spec(plain(earlier))


def dataset_after(values: Mapping[str, Any], chosen: set[str], earlier: DatasetSpec) -> DatasetSpec:
    """Return the dataset of an earlier run with the chosen keys, or another one."""
    if chosen & {"dataset", "experiment"}:
        return dataset_spec(values, True)
    keys = [c.split(".")[1:] for c in chosen if c.startswith("dataset.")]
    before = unpinned(plain(earlier), keys)
    spec = build(DatasetSpec, _overlaid(before, values, keys), "dataset")
    if earlier.known_by == "text":
        known_as = other_templates(spec, dataclasses.replace(earlier, **earlier.known_as))
        spec = dataclasses.replace(spec, known_as=known_as)
    return dataset_spec(plain(spec))


def unpinned(values: Mapping[str, Any], keys: Sequence[list[str]]) -> dict[str, Any]:
    """Return the values of a model or dataset, without its commit where another one is named.

    Args:
        values: Of an earlier spec.
        keys: What changes in them.
    """
    elsewhere = any(key[:1] in (["id"], ["revision"], ["source"]) for key in keys)
    return {k: v for k, v in values.items() if not (elsewhere and k == "fingerprint")}


def _overlaid(
    values: dict[str, Any], changed: Mapping[str, Any], keys: Sequence[list[str]]
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


# -- parts of a spec ---------------------------------------------------------------------------


def plugin(kind: registry.Kind, name: str, settings: dict[str, Any], where: str) -> Plugin:
    """Return a method or evaluator with its settings checked and filled in.

    Raises:
        UserError: For an unknown name or key, or a value of a wrong type.
    """
    cls = registry.find(kind, name)
    made = build(cls, settings, where)
    return Plugin(name, plain(made.sealed()))


def model_spec(values: Mapping[str, Any]) -> ModelSpec:
    """Return the spec of a model, with the fingerprint of its local files."""
    spec = build(ModelSpec, dict(values), "model")
    return dataclasses.replace(spec, fingerprint=fingerprint(spec))


def dataset_spec(values: Mapping[str, Any], config: bool = False) -> DatasetSpec:
    """Return the spec of a dataset, with what rows are known by and the hash of its files.

    Args:
        values: Its fields.
        config: Whether they are those of a config, whose hash says which files are meant.
    """
    from effbench.data.dataset import check_mix, fingerprint, stated
    from effbench.data.kinds.base import find
    from effbench.data.kinds.choices import labels_of
    from effbench.data.tokens import template_text

    spec = build(DatasetSpec, dict(values), "dataset")
    check_mix(spec)
    chat = spec.chat or find(spec.kind).talks
    spec = dataclasses.replace(spec, chat=chat, template=template_text(spec.template))
    if not {"known_by", "known_as"} & values.keys():
        own = shipped(spec.source, spec.id, spec.subset)
        spec = (
            dataclasses.replace(spec, known_as=other_templates(spec, own))
            if own
            else dataclasses.replace(spec, known_by="source")
        )
        if not own and "labels" not in values:
            spec = dataclasses.replace(spec, labels=labels_of(spec))
    return dataclasses.replace(spec, fingerprint=(stated if config else fingerprint)(spec))


@cache
def shipped(source: str, id_: str, subset: str) -> DatasetSpec | None:
    """Return the dataset that comes with effbench and has these rows; None for one's own files."""
    import yaml

    for path in sorted((conf_dir() / "dataset").glob("*.yaml")):
        spec = build(DatasetSpec, yaml.safe_load(path.read_text()), f"dataset {path.stem}")
        if source != "file" and (spec.source, spec.id, spec.subset) == (source, id_, subset):
            return spec
    return None


def other_templates(spec: DatasetSpec, own: DatasetSpec) -> dict[str, Any]:
    """Return the settings by which `own` makes other texts of a row than `spec`."""
    from effbench.data.kinds.base import find

    find(spec.kind)
    names = {"kind", *find(own.kind).templates}
    found = {n: plain(getattr(own, n)) for n in names if getattr(own, n) != getattr(spec, n)}
    return dict(sorted(found.items()))
