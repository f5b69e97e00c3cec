"""A run at work: where it is kept, what it counts and measures, and the record at its end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import torch

from effbench.api.keys import sources_of
from effbench.api.schema import plain
from effbench.api.shape import AnyShape
from effbench.api.spec import Job, Spec
from effbench.api.stages import base as stages
from effbench.config.lineage import Lineage
from effbench.models import load as models
from effbench.nn.quant.linears import storage_bytes
from effbench.resources.counting import parameters
from effbench.resources.energy import Energy, Meter
from effbench.resources.environment import fingerprint
from effbench.resources.memory import PeakMemory, exact_blocks, memory_in_use, release
from effbench.resources.predict import Workload, at_most, predict
from effbench.resources.usage import PhaseUsage, format_bytes
from effbench.results.events import EventLog
from effbench.results.fold import Folded, fold
from effbench.results.records import SCHEMA, Metric, Outcomes, Record, write
from effbench.results.store import RunFolder, Store
from effbench.runner.group import Group
from effbench.runner.progress import Progress
from effbench.util.errors import UserError


@dataclass
class Run:
    """A run at work: what it is, where it is kept and what it has measured so far.

    What it works on is loaded by `runner.open`; a stage that needs no model never does.
    """

    job: Job
    store: Store
    folder: RunFolder
    lineage: Lineage
    events: EventLog
    progress: Progress
    device: torch.device
    dtype: torch.dtype
    started: float = field(default_factory=time.time)
    data: dict[str, Any] = field(default_factory=dict)
    """What became of the dataset's rows, as `Record.data`; each process finds it anew."""
    group: Group = field(default_factory=Group)
    """The processes of the run, while it trains on several devices."""
    workload: Workload | None = None
    """The batches of this run, as far as they are known; None for the largest possible ones."""

    @property
    def spec(self) -> Spec:
        """The spec of the run."""
        return self.job.spec

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the run's model."""
        return models.load_tokenizer(self.spec.model)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure wall time, peak memory and energy of a part of the run.

        Of several processes the peak is that of the one with the highest, the energy that of all.
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
                took = self._taken(name, meter.energy, memory.peak.peak_bytes)
                self.events.append("interrupted", name=name, **asdict(took))
            raise
        energy, peak = self.group.energy(meter.energy), self.group.most(memory.peak.peak_bytes)
        took = self._taken(name, energy, peak)
        self.events.append("phase", name=name, **asdict(took), source=energy.source)

    def _taken(self, name: str, energy: Energy, peak_bytes: int) -> PhaseUsage:
        """Return what a phase took, sessions before this one included."""
        kept = self.so_far().interrupted.get(name)
        before = taken(kept) if kept else PhaseUsage(0, 0.0, 0.0, energy.obtained)
        measured = before.energy == energy.obtained == "measured"
        return PhaseUsage(
            max(peak_bytes, before.peak_bytes),
            energy.seconds + before.seconds,
            energy.joules + before.joules,
            "measured" if measured else "modelled",
        )

    def so_far(self) -> Folded:
        """Return what the events amount to by now."""
        return fold(self.events.so_far(), self.spec.seed)

    def add(self, metrics: Iterable[Metric]) -> None:
        """Add metrics to the record."""
        for metric in metrics:
            self.events.append("metric", **asdict(metric))

    def count(self, name: str, value: float, unit: str, point: str = "") -> None:
        """Add an exact count to the record."""
        self.add([Metric(name, value, unit, point=point, obtained="counted")])

    def note(self, text: str) -> None:
        """Add a sentence to the record."""
        self.events.append("note", text=text)

    def know(self, **parts: Any) -> None:
        """Put what was found out about the run's batches in the place of what is possible."""
        self.workload = replace(self.workload or at_most(self.spec, self.group.size), **parts)

    def memory_now(self) -> str:
        """Return the memory in use, for the progress line."""
        return format_bytes(memory_in_use(self.device))


def open_run(job: Job, folder: RunFolder, store: Store, progress: Progress | None = None) -> Run:
    """Set the process up for a run: seeds, threads, logs.

    Raises:
        UserError: When its device is not there, or the code of another package was edited.
    """
    spec = job.spec
    lineage = Lineage.of(spec, store, folder.artefact)
    if spec.sources and sources_of(spec, lineage.methods) != spec.sources:
        raise UserError(
            f"The code of {' or '.join(spec.sources)} was edited after the command was given.",
            "Give it again.",
        )
    if stages.find(spec.stage).loads:
        models.check_device(spec.hardware.device)
    if spec.hardware.threads:
        torch.set_num_threads(spec.hardware.threads)
    torch.manual_seed(spec.seed)
    if job.runtime.exact_memory:
        exact_blocks()
    return Run(
        job=job,
        store=store,
        folder=folder,
        lineage=lineage,
        events=EventLog(folder.path / "events.jsonl", job),
        progress=progress or Progress(job.runtime.progress),
        device=torch.device(spec.hardware.device),
        dtype=getattr(torch, spec.hardware.dtype),
    )


def count_model(run: Run, model: torch.nn.Module) -> None:
    """Count what the model in memory really holds."""
    run.count("params_total", parameters(model).total, "parameters")
    run.count("resident_bytes", storage_bytes(model), "bytes")


def count_trained(run: Run, model: torch.nn.Module) -> None:
    """Count what trains, before a method puts it away."""
    run.count("trainable_params", parameters(model).trainable, "parameters")
    trained = [p for p in model.parameters() if p.requires_grad]
    run.count("trainable_bytes", sum(p.numel() * p.element_size() for p in trained), "bytes")


def hold_against_plan(run: Run, base: AnyShape, base_bytes: int) -> None:
    """Keep what the run was predicted to take, for the batches that it had, and how far off it was.

    Args:
        run: Before its record is written.
        base: Shape of the base model.
        base_bytes: Memory of the process before the model was loaded.
    """
    runtime, lineage = run.job.runtime, run.lineage
    prediction = predict(
        run.spec,
        base,
        runtime.machine,
        lineage.earlier,
        run.workload,
        runtime.exact_memory and exact_blocks(),
        lineage.artefacts,
        parallelism=runtime.parallelism,
    )
    took = {name: taken(facts) for name, facts in run.so_far().phases.items()}
    plan = prediction.summary(took, base_bytes)
    run.add([Metric("base_bytes", base_bytes, "bytes", phase="start")])
    errors = {name: p["error"] for name, p in plan["phases"].items() if "error" in p}
    run.add(Metric("plan_error", e, "", phase=n, obtained="modelled") for n, e in errors.items())
    run.events.append("plan", **plan)


def taken(facts: Mapping[str, Any]) -> PhaseUsage:
    """Return what the event of a phase says that it took."""
    return PhaseUsage(**{part.name: facts[part.name] for part in fields(PhaseUsage)})


def finish(run: Run) -> Record:
    """Write the record, which is what the events amount to, and mark the run as finished."""
    seconds, found = time.time() - run.started, run.so_far()
    before = run.store.ancestors(run.spec)
    record = Record(
        schema=SCHEMA,
        key=run.spec.key,
        label=run.spec.label,
        stage=run.spec.stage,
        spec=plain(run.spec),
        environment={**fingerprint(), "command": run.job.command, **_spread(run)},
        parent=run.spec.parent,
        started=datetime.fromtimestamp(run.started, UTC).isoformat(timespec="milliseconds"),
        seconds=seconds,
        metrics=found.metrics,
        plan=found.plan,
        notes=found.notes,
        outcomes=[o for name in found.evaluated for o in outcomes_in(run.folder, name)],
        data=run.data,
        seeds=[run.spec.seed, *(spec.seed for spec in reversed(before.values()))],
    )
    run.folder.write_json("environment.json", record.environment)
    write(record, run.store.records)
    run.events.close()
    run.folder.finish()
    return record


def _spread(run: Run) -> dict[str, Any]:
    """Return over how many devices the run was spread, where it was more than one."""
    found = run.job.runtime.parallelism
    return {"parallelism": plain(found)} if found.devices > 1 else {}


def outcomes_in(folder: RunFolder, name: str) -> list[Outcomes]:
    """Return the outcomes of items in the file of an evaluator's result."""
    return [Outcomes(**o) for o in folder.read_json(f"evaluations/{name}.json")["outcomes"]]
