"""The model and the data that a run works on."""

from __future__ import annotations

import atexit
import gc
import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from effbench.api.plugins import make_evaluator, make_method
from effbench.api.spec import Job
from effbench.api.weights import find, is_packed
from effbench.data.dataset import Data
from effbench.methods.base import Method
from effbench.methods.chain import chain_shapes
from effbench.models import load as models
from effbench.nn.quant.linears import pack_linears
from effbench.resources.memory import memory_in_use, release
from effbench.results.store import RunFolder, Store
from effbench.runner.run import Bench, open_bench
from effbench.util.errors import UserError

SAME_DTYPE = 0.1
"""Most bytes per weight by which files in the dtype that is loaded differ from it, for headers."""


def open_model(bench: Bench) -> torch.nn.Module:
    """Load the base model and everything that earlier runs made of it.

    Raises:
        UserError: When a file is missing or broken, or two settings contradict each other.
    """
    spec, own = bench.spec, bench.method
    ancestors = bench.store.ancestors(spec)
    made = [(key, make_method(s.method)) for key, s in ancestors.items()]
    weights = _base_weights(bench, [m for _, m in made])
    stored = models.fetch(spec.model)
    models.import_libraries()
    open_tokenizer(bench)
    for method in (own, *(m for _, m in made)):
        for library in method.libraries:
            importlib.import_module(library)
    release()
    gc.freeze()  # what libraries made is not looked through again at the start of every phase
    atexit.register(gc.unfreeze)  # some of them complain of leaks otherwise
    bench.base_bytes = memory_in_use(bench.device)
    with bench.phase("load"):
        loaded = models.load(
            spec.model,
            device=spec.hardware.device,
            dtype=bench.dtype,
            weights=weights,
            tokenizer=False,
        )
        model, bench.base_shape = loaded.model, loaded.shape
        shapes = [loaded.shape, *chain_shapes(bench.earlier(), loaded.shape, bench.folders())]
        for place, (key, method) in enumerate(made):
            if place and is_packed(method.weights):
                pack_linears(model, find(method.weights)(), bench.dtype)
            method = method.fitted(shapes[place])
            model = method.load(model, bench.store.run(key).artefact, bench.context())
            model.requires_grad_(False)
        if made and spec.stage == "train" and is_packed(own.weights):
            pack_linears(model, find(own.weights)(), bench.dtype)
    if spec.dataset.max_length > loaded.shape.max_positions:
        raise UserError(
            f"dataset.max_length={spec.dataset.max_length} is more than the "
            f"{loaded.shape.max_positions} positions of {spec.model.name}.",
            f"Lower it: dataset.max_length={loaded.shape.max_positions}",
        )
    start = bench.start_shape()
    own.check(start)
    bench.method = own.fitted(start)
    if stored is not None:
        element = (torch.float32 if weights == "float32" else bench.dtype).itemsize
        same = abs(stored / loaded.shape.params - element) < SAME_DTYPE
        bench.know(stored_bytes=0 if same else stored)
    bench.progress.say(f"{spec.model.name} loaded in {loaded.seconds:.1f} s")
    return model


def evaluated(job: Job, store: Store, scratch: Path) -> tuple[torch.nn.Module, Method]:
    """Return the model that a run evaluates, and its method; the run itself is left alone.

    It is what an evaluation that goes on from the run would open.

    Args:
        job: The run; it has made its artefact.
        store: Where it is.
        scratch: An empty folder for logs that nobody reads.
    """
    spec = job.spec
    if spec.stage != "eval":
        spec = replace(spec, stage="eval", parent=spec.key)
    bench = open_bench(replace(job, spec=spec), RunFolder(scratch), store)
    model = open_model(bench)
    return model.eval().requires_grad_(False), bench.method


def _base_weights(bench: Bench, earlier: Sequence[Method]) -> str:
    """Return how to hold the base: as its first method wants it, float32 only to train it all."""
    first = earlier[0] if earlier else bench.method
    if is_packed(first.weights):
        return first.weights
    masters = bench.spec.stage == "train" and bench.method.weights == "float32"
    return "float32" if masters else "compute"


def open_tokenizer(bench: Bench) -> None:
    """Load the tokenizer, unless it is there."""
    if bench.tokenizer is None:
        bench.tokenizer = models.load_tokenizer(bench.spec.model)


def open_data(bench: Bench) -> Data:
    """Return the data, after making sure that no evaluation item was trained on earlier.

    Raises:
        UserError: When an earlier run trained on items that this one evaluates.
    """
    open_tokenizer(bench)
    data = Data(bench.spec.dataset, bench.tokenizer)
    seen: set[str] = set()
    trained = [bench.spec.dataset] if bench.spec.stage == "train" else []
    for key, earlier in bench.store.ancestors(bench.spec).items():
        rows = bench.store.run(key).read_json("data.json") or []
        seen |= set(rows)
        trained += [earlier.dataset] if rows else []
    for evaluator in map(make_evaluator, bench.spec.evaluators):
        for split in evaluator.splits():
            if not data.ids(split):
                data.examples(split)  # says what is missing before anything is trained
            shared = seen & set(data.ids(split))
            if shared and not bench.spec.dataset.allow_overlap:
                raise UserError(
                    f"{len(shared)} items of split {split!r} were training data of the run that "
                    "this one goes on from.",
                    "Evaluate on another split, or say dataset.allow_overlap=true.",
                )
        for dataset in trained:
            own = evaluator.overlap(dataset)
            if own and not bench.spec.dataset.allow_overlap:
                raise UserError(
                    f"{own} evaluates the rows that dataset {dataset.name!r} trains on.",
                    "Train on others, leave it out, or say dataset.allow_overlap=true.",
                )
    return data
