"""The model and the data that a run works on."""

from __future__ import annotations

import atexit
import gc
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from effbench.api.account import lines
from effbench.api.method_types import Context
from effbench.api.plugins import make_evaluator, make_method
from effbench.api.schema import plain
from effbench.api.shape import AnyShape, ModelShape
from effbench.api.spec import DatasetSpec, Job, ModelSpec, Spec
from effbench.api.stages import base as stages
from effbench.api.weights import find, is_packed
from effbench.config.compose import check_kind, check_lengths
from effbench.data.dataset import Data
from effbench.data.overlap import Trained, kept, require_apart
from effbench.methods.base import Method
from effbench.methods.chain import chain_shapes, resolved
from effbench.methods.trains import Trains
from effbench.models import load as models
from effbench.nn.adapters.merge import merge_for_good
from effbench.nn.llama.weights import cast_parameters
from effbench.nn.quant.linears import pack_linears
from effbench.resources.memory import memory_in_use, release
from effbench.results.records import Metric
from effbench.results.store import RunFolder, Store
from effbench.runner.progress import Progress
from effbench.runner.run import Run, open_run
from effbench.util.errors import UserError
from effbench.util.libraries import import_uncompiled

SAME_DTYPE = 0.1
"""Most bytes per weight by which files in the dtype that is loaded differ from it, for headers."""
OWN = "stand in split 'train' too, written in another way or as a part of a row"
EARLIER = "were training data of the run that this one goes on from"


@dataclass(frozen=True)
class Opened:
    """What a run works on: a model, and what is to be known of it."""

    model: torch.nn.Module
    """At first what the run starts from: the base model and what earlier runs made of it."""
    method: Method
    """The run's own, resolved for the model."""
    base: AnyShape
    """Sizes of the base model."""
    start: ModelShape
    """Sizes of what the method starts from."""
    base_bytes: int
    """Memory of the process before the model was loaded."""


def open_model(run: Run) -> Opened:
    """Load the base model and everything that earlier runs made of it.

    Raises:
        UserError: When a file is missing or broken, or two settings contradict each other.
    """
    spec, lineage, own = run.spec, run.lineage, make_method(run.spec.method)
    weights = _base_weights(spec, own, lineage.earlier)
    run.progress.now(f"loading {' and '.join([spec.model.called, *filter(None, [spec.parent])])}")
    stored = _import_all(run, own)
    gc.freeze()  # what libraries made is not looked through again at the start of every phase
    atexit.register(gc.unfreeze)  # some of them complain of leaks otherwise
    base_bytes = memory_in_use(run.device)
    with run.phase("load"):
        loaded = load_start(run, own)
    models.require_rows(run.tokenizer, loaded.shape, spec.model.called)
    check_kind(spec, loaded.shape)
    check_lengths(spec, loaded.shape)
    start = lineage.start(loaded.shape)
    if stored is not None:
        element = (torch.float32 if weights == "float32" else run.dtype).itemsize
        same = abs(stored / loaded.shape.params - element) < SAME_DTYPE
        run.know(stored_bytes=0 if same else stored)
    run.progress.say(f"{spec.model.called} loaded in {loaded.seconds:.1f} s")
    return Opened(loaded.model, resolved(own, start), loaded.shape, start, base_bytes)


def load_start(run: Run, own: Method) -> models.Loaded:
    """Load what a run starts from: the base model and what earlier runs made of it, frozen.

    Args:
        run: Its libraries, and the files of its model, are here.
        own: The run's method.
    """
    spec, lineage = run.spec, run.lineage
    weights = _base_weights(spec, own, lineage.earlier)
    loaded = models.load(
        spec.model,
        device=spec.hardware.device,
        dtype=run.dtype,
        weights=weights,
        tokenizer=False,
    )
    model = _put_in(run, loaded.model, loaded.shape)
    trains = stages.find(spec.stage).trains
    if is_packed(weights) and trains and own.weights == "float32":
        cast_parameters(model, torch.float32)
    if lineage.earlier and trains and is_packed(own.weights):
        pack_linears(model, find(own.weights)(), run.dtype)
    return replace(loaded, model=model)


def _import_all(run: Run, own: Method) -> int | None:
    """Have in memory all that is no part of the model; return the bytes of its files, if known."""
    stored = models.fetch(run.spec.model)
    models.import_libraries()
    _ = run.tokenizer  # loaded by now
    if run.spec.train.optimizer == "adamw8bit":
        importlib.import_module("bitsandbytes")  # its steps on a CPU are compiled
    libraries = [name for method in (own, *run.lineage.earlier) for name in method.libraries]
    for plugin in run.spec.evaluators:
        libraries += make_evaluator(plugin).libraries()
    for library in libraries:
        import_uncompiled(library)
    release()
    return stored


def _put_in(run: Run, model: torch.nn.Module, shape: AnyShape) -> torch.nn.Module:
    """Return the base model turned into what the earlier methods made of it, frozen."""
    lineage = run.lineage
    count = len(lineage.earlier)
    after = [*lineage.earlier[1:], *lineage.methods[count:], None]
    shapes = [shape, *chain_shapes(lineage.earlier, shape, lineage.artefacts, after[count - 1])]
    made = zip(lineage.methods, lineage.made_by, strict=False)  # the last as it is evaluated
    for place, (method, made_by) in enumerate(made):
        if place and is_packed(method.weights):
            pack_linears(model, find(method.weights)(), run.dtype)
        artefact = made_by.check_artefact(whole=True)
        model = resolved(method, shapes[place]).load(model, artefact, context(run))
        model.requires_grad_(False)
        then = after[place]
        if then is not None and method.merges_for(then):
            with method.at(model, method.full_point(shapes[place])):
                done = merge_for_good(model)
            run.progress.say(f"{done} adapters of {made_by.key} added to their weights")
    return model


def context(run: Run) -> Context:
    """Return a fresh context for the method's hooks."""
    return Context(
        seed=run.spec.seed,
        device=run.device,
        dtype=run.dtype,
        generator=torch.Generator().manual_seed(run.spec.seed),
        load_model=partial(load_frozen, run),
        load_tokenizer=lambda name: models.load_tokenizer(_other(run, name)),
        tokenizer=run.tokenizer,
        note=run.note,
        measured=lambda name, value, unit: run.add(
            [Metric(name, value, unit, phase=run.spec.stage)]
        ),
        folder=run.folder.path,
    )


def load_frozen(run: Run, name: str) -> torch.nn.Module:
    """Return another model by its config name, frozen, on the device: that which is in the key.

    Raises:
        UserError: For one that neither the method nor an evaluator says that it loads.
    """
    return _load_dense(run, _other(run, name))


def _other(run: Run, name: str) -> ModelSpec:
    found = [model for model in run.spec.others if model.name == name]
    if not found:
        raise UserError(
            f"Model {name} is loaded, and the key of the run does not say so.",
            "Name it in `others` of the method or evaluator: docs/method-protocol.md.",
        )
    return found[0]


def load_base(run: Run) -> torch.nn.Module:
    """Return the model of the spec before any method touched it, frozen, on the device."""
    return _load_dense(run, run.spec.model)


def _load_dense(run: Run, model: ModelSpec) -> torch.nn.Module:
    loaded = models.load(model, device=run.spec.hardware.device, dtype=run.dtype)
    return loaded.model.requires_grad_(False).eval()


def evaluated(job: Job, store: Store, scratch: Path) -> Opened:
    """Return what a run evaluates; the run itself is left alone.

    It is what an evaluation that goes on from the run would open.

    Args:
        job: The run; it has made its artefact.
        store: Where it is.
        scratch: An empty folder for logs that nobody reads.
    """
    spec = job.spec
    if stages.find(spec.stage).makes:
        spec = replace(spec, stage="eval", parent=spec.key)
    opened = open_model(open_run(replace(job, spec=spec), RunFolder(scratch), store))
    opened.model.eval().requires_grad_(False)
    return opened


def _base_weights(spec: Spec, own: Method, earlier: Sequence[Method]) -> str:
    """Return how to hold the base: as its first method wants it, float32 only to train it all."""
    first = earlier[0] if earlier else own
    if is_packed(first.weights):
        return first.weights
    masters = stages.find(spec.stage).trains and own.weights == "float32"
    return "float32" if masters else "compute"


def open_data(run: Run) -> Data:
    """Return the data, after making sure that no evaluation item is trained on, or was earlier.

    Raises:
        UserError: When this run or an earlier one trains on items that this one evaluates.
    """
    run.progress.now(f"reading {run.spec.dataset.called} and making tokens of it")
    data, asked_before = _apart(run.spec, run.tokenizer, run.store)
    _account(run, data, asked_before)
    if run.group.rank == 0:
        _check_asked(run.spec, data, run.progress)
    return data


def check_rows(job: Job) -> None:
    """Read the rows that a run uses as it will.

    Raises:
        UserError: As `open_data`, and for rows that have no place in the template.
    """
    spec = job.spec
    tokenizer = models.load_tokenizer(spec.model)
    if shape := models.known_shape(spec.model):
        models.require_rows(tokenizer, shape, spec.model.called)
    data, _ = _apart(spec, tokenizer, Store(Path(job.runtime.results)))
    if stages.find(spec.stage).makes:
        data.examples("train")
    for split in _evaluated(spec):
        data.documents(split)
    _check_asked(spec, data)


def _check_asked(spec: Spec, data: Data, progress: Progress | None = None) -> None:
    """Refuse what evaluators ask that the data or the model has no room for.

    Args:
        spec: Of the run.
        data: Its own.
        progress: Where to say that it takes a moment.

    Raises:
        UserError: With what to change.
    """
    shape = models.known_shape(spec.model)
    for evaluator in map(make_evaluator, spec.evaluators):
        if progress and evaluator.libraries():
            progress.now(f"reading what evaluator {evaluator.name} asks")
        evaluator.check_data(data, shape)


def _apart(spec: Spec, tokenizer: Any, store: Store) -> tuple[Data, dict[str, int]]:
    """Return the data of a run, and by split the rows whose prompt was trained on otherwise.

    Raises:
        UserError: When this run or an earlier one trains on items that it evaluates.
    """
    data = Data(spec.dataset, tokenizer, models.known_shape(spec.model), spec.seed)
    trains = stages.find(spec.stage).trains
    own, earlier = Trained(), Trained()
    if trains:
        own.add(kept(data.rows("train")))
    trained = [(spec.dataset, own)] if trains else []
    for key, parent in store.ancestors(spec).items():
        rows = store.run(key).read_json("data.json")
        if rows:
            earlier.add(rows)
            trained.append((parent.dataset, Trained()))
            trained[-1][1].add(rows)
    asked_before = _refuse_trained(spec, data, {OWN: own, EARLIER: earlier})
    _refuse_benchmarks(spec, trained)
    if trains:
        _check_splits(spec, data)
    return data, asked_before


def _refuse_trained(spec: Spec, data: Data, seen: Mapping[str, Trained]) -> dict[str, int]:
    """Refuse splits whose rows were trained on; a training may be evaluated on `train` itself.

    Args:
        spec: Of the run.
        data: Its own.
        seen: What was trained on, by what is to be said of a row of it.

    Returns:
        By split, the rows whose prompt was trained on with another answer.

    Raises:
        UserError: Unless `dataset.allow_overlap`.
    """
    asked_before = dict[str, int]()
    for split in _evaluated(spec):
        asked_before[split] = 0
        for where, trained in seen.items():
            if where == OWN and split == "train":
                continue
            shared = trained.shared(data.rows(split))
            asked_before[split] += shared.prompts
            if shared.rows and not spec.dataset.allow_overlap:
                raise UserError(
                    f"{shared.rows} items of split {split!r} {where}.",
                    "Remove them from one, evaluate on another split, or say "
                    "dataset.allow_overlap=true.",
                )
    return asked_before


def _refuse_benchmarks(spec: Spec, trained: Sequence[tuple[DatasetSpec, Trained]]) -> None:
    """Refuse evaluators whose own data was trained on.

    Raises:
        UserError: Unless `dataset.allow_overlap`.
    """
    for evaluator in map(make_evaluator, spec.evaluators):
        for dataset, rows in trained if not spec.dataset.allow_overlap else ():
            if theirs := evaluator.overlap(dataset, rows):
                raise UserError(
                    f"{theirs} evaluates the rows that dataset {dataset.called!r} trains on.",
                    "Train on others, leave it out, or say dataset.allow_overlap=true.",
                )


def _evaluated(spec: Spec) -> dict[str, None]:
    """Return the splits that the evaluators of a spec read, each once, in order."""
    return {split: None for e in map(make_evaluator, spec.evaluators) for split in e.splits()}


def further_splits(spec: Spec) -> tuple[str, ...]:
    """Return the splits beside `train` that the training of a spec learns from."""
    method = make_method(spec.method)
    return method.splits() if isinstance(method, Trains) else ()


def _check_splits(spec: Spec, data: Data) -> None:
    """Refuse further splits of a training whose rows it trains on, or is evaluated on.

    Raises:
        UserError: Unless `dataset.allow_overlap`.
    """
    evaluated = _evaluated(spec)
    for split in further_splits(spec) if not spec.dataset.allow_overlap else ():
        if split in evaluated:
            raise UserError(
                f"method {spec.method.name} learns from split {split!r}, on which it is evaluated.",
                "Evaluate on another split, or say dataset.allow_overlap=true.",
            )
        require_apart(data.rows("train"), data.rows(split), split)


def _account(run: Run, data: Data, asked_before: Mapping[str, int]) -> None:
    """Count what became of the rows of every split that the run uses, and say it once.

    Args:
        run: The run.
        data: What it uses.
        asked_before: By split, rows whose prompt was trained on with another answer.
    """
    stage = stages.find(run.spec.stage)
    used = dict.fromkeys(_evaluated(run.spec), True)
    if stage.trains and run.spec.train.validate_every:
        used["validation"] = False
    if stage.makes:
        used["train"] = False
    if stage.trains:
        used |= dict.fromkeys(further_splits(run.spec), False)
    splits = {
        split: replace(data.account(split, whole), asked_before=asked_before.get(split, 0))
        for split, whole in sorted(used.items())
    }
    run.data = {
        "sources": {name: reading.kept() for name, reading in data.readings.items()},
        "splits": {name: plain(account) for name, account in splits.items()},
    }
    for line in lines(run.data):
        run.progress.say(line)
    for split in list(splits)[:1]:
        run.progress.say(f"{split} begins with {data.rows(split)[0].shown()}")
