"""What of a spec is in its key, and how a spec is completed when its fields have grown.

A field that `FOUNDING` names is always hashed. A field that came later is left out while it holds
the value that means what was done before there was the field: its default, or, once that default
has changed, the earlier one, which the field then keeps as `metadata={"absent": VALUE}`. So a new
field changes no key, and a changed default does not change what an old key stands for.

What changes results without changing a setting is the class variable `version` of the part: of a
class of `spec.py`, of a method or of an evaluator. `Spec.versions` has those above 1. What another
package offers, such as a method, is known by its code too, in `Spec.sources`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import product
from pathlib import PurePath
from typing import Any, get_args, get_type_hints

from effbench.api import registry
from effbench.api.schema import plain
from effbench.api.sources import source_of, source_of_modules
from effbench.api.stages.base import trains
from effbench.util.errors import NewerVersionError
from effbench.util.offered import Kind, offered

FOUNDED = 2
"""The form of the spec at that time, hashed for ever."""

FOUNDING: dict[str, str] = {
    "Spec": "stage method model dataset evaluators train hardware seed parent version",
    "Plugin": "name settings",
    "ModelSpec": "name source id path revision shape weights_seed fingerprint",
    "Shape": (
        "hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim vocab_size "
        "max_positions tied rope_theta rms_eps"
    ),
    "DatasetSpec": (
        "name source kind id subset files text prompt answer choices choices_field label "
        "label_names splits cut max_length chat limit allow_overlap fingerprint"
    ),
    "TrainSpec": (
        "max_steps batch_size accumulation learning_rate optimizer betas epsilon weight_decay "
        "schedule warmup clip_norm gradient_checkpointing validate_every patience "
        "checkpoint_every"
    ),
    "HardwareSpec": "device dtype threads",
    "methods/adalora": (
        "rank first_rank alpha dropout targets begin end interval beta1 beta2 orthogonality"
    ),
    "methods/apt": (
        "keep blocks align begin end prunings mask_step warm_steps salience criterion beta "
        "kurtosis normalise rank scale targets grow growths max_rank moments distill "
        "distill_logits distill_layers"
    ),
    "methods/deep_lora": "form rank depth init_scale frame_rate subspace targets",
    "methods/depths": "eval_depths decoding thresholds kv draft_depth draft_tokens draft_window",
    "methods/dora": "rank alpha dropout targets eval_ranks truncation",
    "methods/dylora": (
        "rank alpha dropout ranks distribution mode protect_inactive targets eval_ranks"
    ),
    "methods/echo_llama": "map share layers mode blend adapt order producer_init kl trains rank",
    "methods/echoatt": (
        "layers ratio keep_first keep_last choice samples tokens block_weight soft_weight "
        "hard_weight kl refine"
    ),
    "methods/exit_heads": (
        "eval_depths decoding thresholds kv draft_depth draft_tokens draft_window depths trunk"
    ),
    "methods/full": "",
    "methods/gqa": "kv_heads",
    "methods/kd": "teacher temperature weight",
    "methods/layer_drop": "layers remove criterion",
    "methods/lora": "rank alpha dropout targets eval_ranks truncation",
    "methods/lora_drop": (
        "rank alpha fraction layers window windows baselines anchor kv kv_accurate prefix "
        "random_phase"
    ),
    "methods/lora_plus": "rank alpha dropout targets eval_ranks truncation ratio",
    "methods/none": "",
    "methods/qdylora": (
        "rank alpha dropout ranks distribution mode protect_inactive targets eval_ranks"
    ),
    "methods/qlora": "rank alpha dropout targets eval_ranks truncation",
    "methods/rslora": "rank alpha dropout targets eval_ranks truncation",
    "methods/rtn": "bits group_size symmetric",
    "methods/sorted_full": (
        "eval_depths decoding thresholds kv draft_depth draft_tokens draft_window depths "
        "layout objective sampling reweight"
    ),
    "methods/sorted_lora": (
        "eval_depths decoding thresholds kv draft_depth draft_tokens draft_window depths "
        "layout objective sampling reweight rank alpha dropout targets train_norm"
    ),
    "methods/structured": "keep criterion scope blocks align",
    "methods/subset": "rank alpha dropout targets eval_ranks truncation fraction by reference",
    "evaluators/choices": "split batch_tokens tasks num_fewshot limit files fingerprint",
    "evaluators/energy": (
        "batch_size prompt_tokens new_tokens window_seconds grams_per_kwh pue litres_per_kwh "
        "usd_per_kwh usd_per_hour"
    ),
    "evaluators/fidelity": (
        "reference split window stride batch_tokens tasks num_fewshot limit files fingerprint"
    ),
    "evaluators/generation": (
        "tasks num_fewshot files fingerprint split pattern until limit max_new_tokens "
        "temperature top_k top_p chat batch_tokens"
    ),
    "evaluators/memory": "batch_size prompt_tokens new_tokens smallest_cap tolerance_mib",
    "evaluators/perplexity": "split window stride batch_tokens",
    "evaluators/similarity": "split samples tokens",
    "evaluators/speed": (
        "batch_sizes prompt_tokens new_tokens repeats engine baseline roofline probe_mb probe_side"
    ),
    "evaluators/trust": "dimensions items seeds reference batch_tokens chat generate new_tokens",
}
"""The fields that were there when keys learnt to grow. Never add to it: a class or plug-in that is
not listed, and a field that is not named, leave their defaults out."""


WHOLE = 32
"""Digits of a fingerprint of whole files. With one, what is in the files is in the key and where
they lie is not; fingerprints of earlier runs are shorter, and the places of their files hashed."""


def hashed(spec: Any) -> dict[str, Any]:
    """Return what the key of a `Spec` is the hash of.

    What the stage does not use is left out, so that it cannot change the key: training settings of
    a run that trains nothing.
    """
    values: dict[str, Any] = {**plain(spec), "version": FOUNDED}
    for _, part, came_later in _parts(type(spec), values):
        for name, absent in came_later.items():
            if name in part and part[name] == absent:
                del part[name]
        leave_places_out(part)
    if not trains(spec.stage):
        del values["train"]
    return values


def copied(value: Any) -> Any:
    """Return plain values of which nothing is shared with the given ones."""
    if isinstance(value, dict):
        return {name: copied(inner) for name, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list) else value


def leave_places_out(part: dict[str, Any]) -> None:
    """Take out of plain values where local files lie, if the hash of their content is there."""
    known = part.get("fingerprint")
    if not isinstance(known, str) or len(known) != WHOLE:
        return
    if "path" in part:
        part["path"] = ""
    if isinstance(part.get("files"), dict):
        part["files"] = _endings(part["files"])


def _endings(place: Any) -> Any:
    """Return a mapping of files with their endings alone, which say how they are read."""
    if isinstance(place, dict):
        return {name: _endings(inner) for name, inner in place.items()}
    if isinstance(place, list):
        return [_endings(inner) for inner in place]
    path = PurePath(place)
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def completed(cls: type, spec: dict[str, Any]) -> dict[str, Any]:
    """Return a spec of an earlier effbench with the fields that came later, as if absent.

    Args:
        cls: `Spec`.
        spec: Its plain values.
    """
    if all(came_later.keys() <= part.keys() for _, part, came_later in _parts(cls, spec)):
        return spec
    spec = copied(spec)
    for _, part, came_later in _parts(cls, spec):
        for name, absent in came_later.items():  # in their order, which tables show
            if name not in part:
                part[name] = copied(absent)
    return spec


def refuse_unknown(cls: type, spec: dict[str, Any]) -> None:
    """Refuse a spec with fields that are not known here; see `completed`.

    Raises:
        NewerVersionError: That names the first of them.
    """
    for kind, part, _ in _parts(cls, spec):
        if unknown := sorted(part.keys() - {f.name for f in dataclasses.fields(kind)}):
            raise NewerVersionError(f"{kind.__name__} has no {unknown[0]!r} here")


def versions_of(spec: Any) -> dict[str, int]:
    """Return the versions above 1 of what a run uses: `train`, `method.NAME` and so on."""
    used = ["model", "dataset", "hardware", *(["train"] if trains(spec.stage) else [])]
    parts: dict[str, Any] = {name: type(getattr(spec, name)) for name in used}
    method = registry.find("methods", spec.method.name)
    parts[f"method.{spec.method.name}"] = method
    for plugin in spec.evaluators:
        parts[f"evaluator.{plugin.name}"] = registry.find("evaluators", plugin.name)
    found = {name: part.version for name, part in parts.items()}
    found["dataset"] = max(found["dataset"], spec.dataset.kind_versions.get(spec.dataset.kind, 1))
    if trains(spec.stage) and "weight" in spec.dataset.columns:
        found[f"method.{spec.method.name}.weighted"] = method.weighted_version
    if trains(spec.stage) and spec.hardware.dtype == "float16":
        found[f"method.{spec.method.name}.float16"] = method.float16_version
    return {name: version for name, version in found.items() if version > 1}


def sources_of(spec: Any, methods: Iterable[Any]) -> dict[str, str]:
    """Return hashes of the code of other packages that a run uses; see `sources`.

    Args:
        spec: The run.
        methods: All that its model goes through.
    """
    methods = list(methods)
    used = {f"method.{method.name}": type(method) for method in methods}
    for plugin in spec.evaluators:
        used[f"evaluator.{plugin.name}"] = registry.find("evaluators", plugin.name)
    found = {name: source_of(cls) for name, cls in used.items()}
    for kind, name in _offered(spec, methods):
        found[f"{kind}.{name}"] = source_of_modules([offered(kind)[name].module])
    return {name: source for name, source in found.items() if source}


def _offered(spec: Any, methods: Iterable[Any]) -> Iterator[tuple[Kind, str]]:
    """Yield what other packages offer beside methods and evaluators, as far as a run uses it."""
    used: dict[Kind, set[str]] = {
        "stages": {spec.stage},
        "kinds": {spec.dataset.kind},
        "formats": {name for method in methods for name in (method.weights, method.produces)},
    }
    for kind, names in used.items():
        yield from ((kind, name) for name in sorted(names & offered(kind).keys()))


def earlier_keys(spec: Any) -> list[str]:
    """Return the keys that a spec had under earlier versions of its parts, latest first."""
    numbers = product(*(range(number, 0, -1) for number in spec.versions.values()))
    next(numbers)
    found = [dict(zip(spec.versions, row, strict=True)) for row in numbers]
    lowered = [{part: number for part, number in row.items() if number > 1} for row in found]
    return [dataclasses.replace(spec, versions=versions).key for versions in lowered]


def later_fields(cls: type, name: str) -> Mapping[str, Any]:
    """Return the fields that came later with the value that means what was done without them."""
    return _beside(cls, FOUNDING.get(name, ""))


@cache
def _beside(cls: type, founding_names: str) -> Mapping[str, Any]:
    founding, found = founding_names.split(), {}
    for field in dataclasses.fields(cls):
        if field.name in founding:
            continue
        if "absent" in field.metadata:
            found[field.name] = plain(field.metadata["absent"])
        elif field.default is not dataclasses.MISSING:
            found[field.name] = plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = plain(field.default_factory())
    return found


# -- the parts of a spec -----------------------------------------------------------------------

Part = tuple[type, dict[str, Any], Mapping[str, Any]]
"""A dataclass, its plain values within a spec, and its later fields with what absence means."""


def _parts(cls: type, spec: dict[str, Any]) -> Iterator[Part]:
    """Yield the parts of a plain spec that are known here; their values may be changed."""
    yield from _nested(cls, spec)
    kinds: dict[registry.Kind, Any] = {"methods": "method", "evaluators": "evaluators"}
    for kind, place in kinds.items():
        for plugin in _dicts(spec.get(place)):
            name, settings = plugin.get("name"), plugin.get("settings")
            if isinstance(settings, dict) and name in registry.names(kind):
                plugged = registry.find(kind, name)
                yield plugged, settings, later_fields(plugged, f"{kind}/{name}")


def _nested(cls: type, values: dict[str, Any]) -> Iterator[Part]:
    yield cls, values, later_fields(cls, cls.__name__)
    for name, inner in _dataclasses_in(cls).items():
        for held in _dicts(values.get(name)):
            yield from _nested(inner, held)


def _dicts(value: Any) -> list[dict[str, Any]]:
    """Return a mapping, or the mappings of a list."""
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, dict)]


@cache
def _dataclasses_in(cls: type) -> dict[str, type]:
    """Return the fields that hold another dataclass, or a list of it, and that dataclass."""
    return {
        name: kind
        for name, hint in get_type_hints(cls).items()
        for kind in (hint, *get_args(hint))
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    }
