"""One run at work: what it holds, counts and measures, and the record at its end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from effbench.api.batch import Batch, make_batch
from effbench.api.cost import Cost
from effbench.api.method_types import Context
from effbench.api.plugins import make_method
from effbench.api.schema import plain
from effbench.api.shape import ModelShape, Shape
from effbench.api.spec import Job, ModelSpec, Spec
from effbench.data.tokenise import Example
from effbench.methods.base import Method
from effbench.methods.chain import chain, chain_shapes, inference_cost
from effbench.models import load as models
from effbench.nn.quant.linears import storage_bytes
from effbench.resources.counting import parameters
from effbench.resources.energy import Energy, Meter, energy_name
from effbench.resources.environment import fingerprint
from effbench.resources.memory import PeakMemory, exact_blocks, memory_in_use, release
from effbench.resources.predict import Prediction, Workload, at_most, predict
from effbench.resources.usage import Taken, gib
from effbench.results.events import EventLog
from effbench.results.records import SCHEMA, Metric, Outcomes, Record, write
from effbench.results.store import RunFolder, Store
from effbench.runner.progress import Progress


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

    def start_shape(self) -> ModelShape:
        """Return the sizes of what the method starts from; an evaluation goes through it again."""
        assert self.base_shape is not None
        methods = chain(self.spec, self.earlier())[:-1]
        base = ModelShape.of(self.base_shape)
        return [base, *chain_shapes(methods, base, self.folders())][-1]

    @property
    def shape(self) -> ModelShape:
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
        from effbench.config.compose import compose

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


def as_batch(example: Example, pad: int) -> Batch:
    """Return one example as a batch of one sequence."""
    return make_batch([(example.ids, example.labels())], pad)


def count_model(bench: Bench, model: torch.nn.Module) -> None:
    """Count what the model in memory really holds."""
    bench.count("params_total", parameters(model).total, "parameters")
    bench.count("resident_bytes", storage_bytes(model), "bytes")


def count_trained(bench: Bench, model: torch.nn.Module) -> None:
    """Count what trains, before a method puts it away."""
    bench.count("trainable_params", parameters(model).trainable, "parameters")
    trained = [p for p in model.parameters() if p.requires_grad]
    bench.count("trainable_bytes", sum(p.numel() * p.element_size() for p in trained), "bytes")


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
