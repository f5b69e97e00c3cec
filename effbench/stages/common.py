"""What every stage does: open the model, evaluate it, write the record."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from effbench import models
from effbench.config import make_evaluator, make_method
from effbench.datasets import Data, Example
from effbench.errors import UserError
from effbench.evaluators.base import Result, Subject, make_batch
from effbench.events import EventLog
from effbench.files import write_atomic
from effbench.footprint import POINTS_AT_ONCE
from effbench.journal import Journal
from effbench.measure.counting import parameters
from effbench.measure.energy import Energy, Meter, energy_name
from effbench.measure.environment import fingerprint
from effbench.measure.memory import PeakMemory, exact_blocks, memory_in_use, release
from effbench.methods.base import (
    Batch,
    Context,
    Cost,
    Method,
    Weights,
    chain_shapes,
    inference_cost,
)
from effbench.nn.quantised import quantise_nf4, storage_bytes
from effbench.plan import Prediction, Taken, Workload, at_most, chain, gib, predict
from effbench.progress import Progress
from effbench.records import SCHEMA, Metric, Outcomes, Record, write
from effbench.schema import plain
from effbench.shapes import Shape
from effbench.spec import Job, ModelSpec, Spec
from effbench.store import RunFolder, Store

SAME_DTYPE = 0.1
"""Most bytes per weight by which files in the dtype that is loaded differ from it, for headers."""


@dataclass
class Bench:
    """One run at work."""

    job: Job
    store: Store
    folder: RunFolder
    method: Method
    events: EventLog
    progress: Progress
    device: torch.device
    dtype: torch.dtype
    started: float = field(default_factory=time.time)
    metrics: list[Metric] = field(default_factory=list)
    outcomes: list[Outcomes] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    base_shape: Shape | None = None
    """Sizes of the base model."""
    tokenizer: Any = None
    base_bytes: int = 0
    """Memory of the process before the model is loaded."""
    workload: Workload | None = None
    """The batches of this run, once its data is there."""
    took: dict[str, Taken] = field(default_factory=dict)
    """What each phase took."""

    @property
    def spec(self) -> Spec:
        """The spec of the run."""
        return self.job.spec

    def earlier(self) -> list[Method]:
        """Return the methods that made what the run starts from, first to last."""
        return [make_method(s.method) for s in self.store.ancestors(self.spec).values()]

    def folders(self) -> list[Path]:
        """Return the artefacts of what the run starts from, first to last."""
        return [self.store.run(key).artefact for key in self.store.ancestors(self.spec)]

    def start_shape(self) -> Shape:
        """Return the sizes of what the method starts from; an evaluation goes through it again."""
        assert self.base_shape is not None
        methods = chain(self.spec, self.earlier())[:-1]
        return [self.base_shape, *chain_shapes(methods, self.base_shape, self.folders())][-1]

    @property
    def shape(self) -> Shape:
        """Sizes of what the run evaluates, once it is made."""
        assert self.base_shape is not None
        methods = chain(self.spec, self.earlier())
        return chain_shapes(methods, self.base_shape, self._all_folders())[-1]

    def _all_folders(self) -> list[Path]:
        return [*self.folders(), self.folder.artefact]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure wall time, peak memory and energy of a part of the run.

        A part that was stopped and goes on in another process counts with what it took before.
        """
        release()
        meter = Meter(self.device, self.job.runtime.machine.tdp_watts)
        memory = PeakMemory(self.device, name)
        try:
            with meter, memory:
                yield
        except BaseException:
            with suppress(Exception):  # what went wrong is what is to be told, whatever this finds
                self._keep(name, self._taken(name, meter.energy, memory.peak.peak_bytes))
            raise
        took = self.took[name] = self._taken(name, meter.energy, memory.peak.peak_bytes)
        self._keep(name, None)
        energy = energy_name(took.energy)
        self.metrics += [
            Metric("peak_bytes", took.peak_bytes, "bytes", phase=name),
            Metric("phase_seconds", took.seconds, "s", phase=name),
            Metric(energy, took.joules, "J", phase=name, obtained=took.energy),
        ]
        self.events.append("phase", name=name, **asdict(took), source=meter.energy.source)

    def _taken(self, name: str, energy: Energy, peak_bytes: int) -> Taken:
        """Return what a phase took, sessions before this one included."""
        kept = (self.folder.read_json("phases.json") or {}).get(name)
        before = Taken(**kept) if kept else Taken(0, 0.0, 0.0, energy.obtained)
        measured = before.energy == energy.obtained == "measured"
        return Taken(
            max(peak_bytes, before.peak_bytes),
            energy.seconds + before.seconds,
            energy.joules + before.joules,
            "measured" if measured else "modelled",
        )

    def _keep(self, name: str, took: Taken | None) -> None:
        """Remember what an interrupted phase took, or forget it."""
        kept = self.folder.read_json("phases.json") or {}
        if took is not None or name in kept:
            kept[name] = asdict(took) if took else None
            self.folder.write_json("phases.json", kept)

    def count(self, name: str, value: float, unit: str, point: str = "") -> None:
        """Add an exact count to the metrics."""
        self.metrics.append(Metric(name, value, unit, point=point, obtained="counted"))

    def cost(self, point: str) -> Cost:
        """Return what the model that is evaluated needs at one operating point."""
        assert self.base_shape is not None
        methods, dtype = chain(self.spec, self.earlier()), self.spec.hardware.dtype
        return inference_cost(methods, self.base_shape, dtype, point, self._all_folders())

    def know(self, **parts: Any) -> None:
        """Put what was found out about the run's batches in the place of what is possible."""
        self.workload = replace(self.workload or at_most(self.spec), **parts)

    def prediction(self) -> Prediction:
        """Return what this run was predicted to take, for the batches that it has."""
        assert self.base_shape is not None
        runtime = self.job.runtime
        return predict(
            self.spec,
            self.base_shape,
            runtime.machine,
            self.earlier(),
            self.workload,
            runtime.exact_memory and exact_blocks(),
            self.folders(),
        )

    def memory_now(self) -> str:
        """Return the memory in use, for the progress line."""
        return gib(memory_in_use(self.device))

    def context(self) -> Context:
        """Return a fresh context for the method's hooks."""
        return Context(
            seed=self.spec.seed,
            device=self.device,
            dtype=self.dtype,
            generator=torch.Generator().manual_seed(self.spec.seed),
            load_model=self.load_frozen,
            tokenizer=self.tokenizer,
        )

    def load_frozen(self, name: str) -> torch.nn.Module:
        """Return another model by its config name, frozen, on the device."""
        from effbench.config import compose

        return self._load_dense(compose("eval", [f"model={name}"]).spec.model)

    def load_base(self) -> torch.nn.Module:
        """Return the model of the spec before any method touched it, frozen, on the device."""
        return self._load_dense(self.spec.model)

    def _load_dense(self, model: ModelSpec) -> torch.nn.Module:
        loaded = models.load(model, device=self.spec.hardware.device, dtype=self.dtype)
        return loaded.model.requires_grad_(False).eval()


def open_bench(job: Job, folder: RunFolder, store: Store) -> Bench:
    """Set the process up for a run: seeds, threads, logs.

    Raises:
        UserError: When its device is not there.
    """
    spec = job.spec
    models.check_device(spec.hardware.device)
    if not folder.started:
        (folder.path / "events.jsonl").unlink(missing_ok=True)
    if spec.hardware.threads:
        torch.set_num_threads(spec.hardware.threads)
    torch.manual_seed(spec.seed)
    if job.runtime.exact_memory:
        exact_blocks()
    return Bench(
        job=job,
        store=store,
        folder=folder,
        method=make_method(spec.method),
        events=EventLog(folder.path / "events.jsonl", job),
        progress=Progress(job.runtime.progress),
        device=torch.device(spec.hardware.device),
        dtype=getattr(torch, spec.hardware.dtype),
    )


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
            if place and method.weights == "nf4":
                quantise_nf4(model, compute_dtype=bench.dtype)
            method = method.fitted(shapes[place])
            model = method.load(model, bench.store.run(key).artefact, bench.context())
            model.requires_grad_(False)
        if made and spec.stage == "train" and own.weights == "nf4":
            quantise_nf4(model, compute_dtype=bench.dtype)
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


def _base_weights(bench: Bench, earlier: Sequence[Method]) -> Weights:
    """Return how to hold the base: as its first method wants it, float32 only to train it all."""
    first = earlier[0] if earlier else bench.method
    if first.weights == "nf4":
        return "nf4"
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


def as_batch(example: Example, pad: int) -> Batch:
    """Return one example as a batch of one sequence."""
    return make_batch([(example.ids, example.labels())], pad)


def evaluate(bench: Bench, model: torch.nn.Module, data: Data) -> None:
    """Run every evaluator at every operating point; finished ones are not run again."""
    if not bench.spec.evaluators:
        return
    # Frozen, because torch multiplies by a weight that requires gradients in another order.
    model.eval().requires_grad_(False)
    done = bench.folder.path / "evaluations"
    done.mkdir(exist_ok=True)
    plugins = [make_evaluator(p) for p in bench.spec.evaluators]
    bench.know(evaluate=tuple(p for e in plugins for p in e.passes(bench.spec, data)))
    with bench.phase("evaluate"):
        for point in bench.method.points():
            with bench.method.at(model, point):
                for plugin in bench.spec.evaluators:
                    path = done / f"{plugin.name}{'@' if point else ''}{point}.json"
                    result = _read_result(path)
                    if result is None:
                        result = _run_one(bench, model, data, plugin, point)
                        bench.folder.write_json(f"evaluations/{path.name}", asdict(result))
                    bench.metrics += result.metrics
                    bench.outcomes += result.outcomes
                _count_cost(bench, model, point)


def _read_result(path: Path) -> Result | None:
    if not path.is_file():
        return None
    values = json.loads(path.read_text())
    return Result(
        [Metric(**m) for m in values["metrics"]], [Outcomes(**o) for o in values["outcomes"]]
    )


def _run_one(bench: Bench, model: torch.nn.Module, data: Data, plugin: Any, point: str) -> Result:
    place = bench.folder.path / "evaluations"

    def where(point: str) -> str:
        return f"{plugin.name}{'@' if point else ''}{point}"

    def journal(point: str, name: str, items: Sequence[str]) -> Journal:
        return Journal(place / f"{where(point)}.{name}.items", items)

    points = bench.method.points()
    later = points[points.index(point) + 1 :][: POINTS_AT_ONCE - 1]
    subject = Subject(
        model=model,
        method=bench.method,
        point=point,
        data=data,
        device=bench.device,
        seed=bench.spec.seed,
        pad_token_id=bench.tokenizer.pad_token_id or 0,
        progress=lambda what, n, of: bench.progress.bar(f"{what} {point}".strip(), n, of),
        tokenizer=bench.tokenizer,
        shape=bench.shape,
        dtype=bench.spec.hardware.dtype,
        cost=bench.cost(point),
        whole=bench.cost(bench.method.whole(bench.shape)),
        machine=bench.job.runtime.machine,
        journal=partial(journal, point),
        beside={p: partial(journal, p) for p in later},
        keep=lambda name, rows: _write_rows(place / f"{where(point)}.{name}.jsonl", rows),
        load_model=bench.load_frozen,
        load_base=bench.load_base,
        base_bytes=bench.base_bytes,
        job=plain(bench.job),
    )
    result = make_evaluator(plugin).run(subject)
    for metric in result.metrics:
        bench.events.append("metric", **asdict(metric))
    headline = ", ".join(f"{m.name} {m.value:.4g}" for m in result.metrics[:2])
    bench.progress.say(f"{plugin.name} {point}: {headline}".replace(" :", ":"))
    return result


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _count_cost(bench: Bench, model: torch.nn.Module, point: str) -> None:
    cost = bench.cost(point)
    bench.count("params", cost.params, "parameters", point)
    bench.count("weight_bytes", storage_bytes(model), "bytes", point)
    bench.count("bytes_per_token", cost.bytes_per_token, "bytes/token", point)
    bench.count("flops_per_token", cost.flops_per_token, "FLOP/token", point)
    bench.count("kv_bytes_per_token", cost.kv_bytes_per_token, "bytes/token", point)


def count_model(bench: Bench, model: torch.nn.Module) -> None:
    """Count what the model in memory really holds."""
    bench.count("params_total", parameters(model).total, "parameters")
    bench.count("resident_bytes", storage_bytes(model), "bytes")


def count_trained(bench: Bench, model: torch.nn.Module) -> None:
    """Count what trains, before a method puts it away."""
    bench.count("trainable_params", parameters(model).trainable, "parameters")
    trained = [p for p in model.parameters() if p.requires_grad]
    bench.count("trainable_bytes", sum(p.numel() * p.element_size() for p in trained), "bytes")


def save_artefact(bench: Bench, model: torch.nn.Module) -> None:
    """Write the artefact so that it is there whole or not at all."""
    from effbench.files import replace_folder, scratch_folder

    with scratch_folder(bench.folder.path, "artefact") as new:
        bench.method.save(model, new)
        (new / "method.json").write_text(json.dumps(plain(bench.spec.method), indent=1))
        replace_folder(new, bench.folder.artefact)
    size = sum(f.stat().st_size for f in bench.folder.artefact.rglob("*") if f.is_file())
    bench.count("artefact_bytes", size, "bytes")


def note_made(bench: Bench) -> None:
    """Remember that the artefact is whole, with what was found out while making it."""
    facts = {
        "metrics": [vars(m) for m in bench.metrics],
        "notes": bench.notes,
        "took": {name: asdict(t) for name, t in bench.took.items()},
    }
    bench.folder.write_json("made.json", facts)


def load_made(bench: Bench, model: torch.nn.Module) -> torch.nn.Module | None:
    """Return the base `model` turned into what an interrupted run had made; None if nothing yet."""
    facts = bench.folder.read_json("made.json")
    if facts is None:
        return None
    bench.metrics = [Metric(**m) for m in facts["metrics"]]
    bench.notes = facts["notes"]
    bench.took |= {name: Taken(**t) for name, t in facts["took"].items()}
    return bench.method.load(model, bench.folder.artefact, bench.context())


def finish(bench: Bench) -> Record:
    """Write the record and mark the run as finished."""
    seconds = time.time() - bench.started
    summary = bench.prediction().summary(bench.took, bench.base_bytes)
    bench.metrics.append(Metric("base_bytes", bench.base_bytes, "bytes", phase="start"))
    for name, phase in summary["phases"].items():
        if "error" in phase:
            error = Metric("plan_error", phase["error"], "", phase=name, obtained="modelled")
            bench.metrics.append(error)
    record = Record(
        schema=SCHEMA,
        key=bench.spec.key,
        label=bench.spec.label,
        stage=bench.spec.stage,
        spec=plain(bench.spec),
        environment=fingerprint(),
        parent=bench.spec.parent,
        started=datetime.fromtimestamp(bench.started, UTC).isoformat(timespec="milliseconds"),
        seconds=seconds,
        metrics=bench.metrics,
        plan=summary,
        notes=bench.notes,
        outcomes=bench.outcomes,
    )
    bench.folder.write_json("environment.json", record.environment)
    write(record, bench.store.records)
    bench.events.close()
    bench.folder.finish()
    return record


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)
