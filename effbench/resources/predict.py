"""What a run will need before it runs: the peak of each phase by component, work, and least time.

Tensors are counted from shapes (`effbench.api.footprint` says what autograd keeps). What a CPU
process needs beside them is modelled from measurements, and is labelled so: scratch space of
kernels, and the pieces that the C library's allocator cannot use again. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from effbench.api.cost import Cost, cost_of
from effbench.api.footprint import POINTS_AT_ONCE, Pass, held_flops, step_flops, training_of
from effbench.api.method_types import CALIBRATION_ROWS
from effbench.api.plugins import make_evaluator
from effbench.api.shape import DTYPE_BYTES, LINEARS, AnyShape, ModelShape
from effbench.api.spec import Machine, Parallelism, Spec
from effbench.api.weights import is_packed
from effbench.config.compose import model_named
from effbench.methods.base import Method
from effbench.methods.chain import (
    chain,
    chain_shapes,
    inference_cost,
    last_shape,
    resolved,
    shape_of,
)
from effbench.methods.compresses import Compresses
from effbench.methods.trains import Trains
from effbench.models.load import known_shape
from effbench.resources.parallel import bucket_bytes, gathered_bytes, held_by_one
from effbench.resources.peaks import Caching, Components, Peaks, Spread
from effbench.resources.usage import PhaseUsage
from effbench.util.hardware import memory_bytes

MANY_ROWS = 10**6
"""Training rows, where their number is not known: more than one step."""
STORED_BYTES = 2
"""Bytes per weight of a checkpoint, where its files are not at hand."""


@dataclass(frozen=True)
class Workload:
    """What a run works on, as far as memory depends on it."""

    train: tuple[Pass, ...] = ()
    """Micro-batches of training; any of them can be the largest."""
    micro_batches: int = 1
    """Most micro-batches of one step."""
    lengths: int = 0
    """Different sizes of what is trained or calibrated on, where there are more than listed."""
    calibrate: tuple[Pass, ...] = ()
    """Rows that a compression may read."""
    evaluate: tuple[Pass, ...] = ()
    """Batches of the evaluators."""
    stored_bytes: int | None = None
    """Bytes of the checkpoint's files that are converted while loading; None when not known."""


@dataclass(frozen=True)
class Phase:
    """The predicted peak of one phase, by component, in bytes."""

    name: str
    memory: dict[str, int]

    @property
    def peak(self) -> int:
        """The sum of the components."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Prediction:
    """The prediction for one run. Bytes, FLOPs and seconds."""

    cost: Cost
    phases: tuple[Phase, ...]
    """In the order they run. Bytes are those beyond the process itself: Python, its libraries, the
    tokenizer and the data."""
    flops: float
    """FLOPs of all training steps (0 when nothing is trained)."""
    tokens: int
    """Most tokens that training can see."""
    seconds: float | None
    """Least time of training at the machine's ceilings; None when they are not known."""
    available: int
    """Bytes that the machine has."""
    notes: list[str] = field(default_factory=list)
    trained: int = 0
    """Parameters that train at the most; what is left of them is in `cost`."""
    reads: int = 0
    """Sequences that are read before the first step, as for a search; see `Trains.reads_first`."""
    read_flops: float = 0.0
    """FLOPs of that at the most."""
    read_seconds: float | None = None
    """Least time of that; None when the machine's ceilings are not known."""

    @property
    def largest(self) -> Phase:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda p: p.peak)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by component at the highest peak."""
        return self.largest.memory

    @property
    def peak(self) -> int:
        """Predicted peak in bytes."""
        return self.largest.peak

    @property
    def fits(self) -> bool | None:
        """Whether the peak fits; None when the machine's memory is not known."""
        return self.peak <= self.available if self.available else None

    def phase(self, name: str) -> Phase | None:
        """Return the prediction of a phase; None when the run has no such phase."""
        return next((p for p in self.phases if p.name == name), None)

    def summary(
        self, took: Mapping[str, PhaseUsage] | None = None, base: int = 0
    ) -> dict[str, Any]:
        """Return the prediction as plain values, for the record.

        Args:
            took: What each phase then took.
            base: Measured bytes of the process before the model was loaded.
        """
        phases: dict[str, Any] = {
            p.name: {"memory": p.memory, "peak_bytes": p.peak, **_held_against(p, took, base)}
            for p in self.phases
        }
        if self.seconds is not None and "measured_seconds" in phases.get("train", {}):
            train = phases["train"]
            train["seconds_error"] = self.seconds / train["measured_seconds"] - 1
        return {
            "peak_bytes": self.peak,
            "memory": self.memory,
            "base_bytes": base,
            "phases": phases,
            "flops": self.flops,
            "seconds": self.seconds,
            "cost": self.cost.told(),
        }


def _held_against(
    phase: Phase, took: Mapping[str, PhaseUsage] | None, base: int
) -> dict[str, float]:
    """Return measurement and error of a phase; the error is relative to what was measured.

    `error` is that of the whole peak, with the measured base on both sides; `own_error` is that of
    what the run added to the base.
    """
    if not took or phase.name not in took:
        return {}
    measured = took[phase.name].peak_bytes
    own = measured - base
    return {
        "measured_bytes": measured,
        "measured_seconds": took[phase.name].seconds,
        "error": (base + phase.peak) / measured - 1,
        "own_error": phase.peak / own - 1 if own > 0 else 0.0,
    }


@dataclass(frozen=True)
class RunShapes:
    """What a run makes of its model, from shapes."""

    methods: tuple[Method, ...]
    """All that the model goes through, first to last, fitted."""
    base: ModelShape
    """The base model."""
    start: ModelShape
    """What its method starts from."""
    working: ModelShape
    """The model while it trains, at the most."""
    left: ModelShape
    """What it leaves, as far as it is known, with all that is in memory."""
    before: Cost | None
    """Of what earlier runs made, as it is used; None for the base model."""
    training: Cost
    """While it trains, at the most."""
    cost: Cost
    """Of what it leaves, as it is evaluated."""
    used: Cost
    """The same with all that is in memory beside it, and the largest cache of its points."""
    caching: tuple[Caching, ...]
    """What its layers keep at each of its points."""

    @property
    def own(self) -> Method:
        """The method of the run."""
        return self.methods[-1]

    @classmethod
    def of(
        cls, spec: Spec, shape: AnyShape, earlier: Sequence[Method], folders: Sequence[Path] = ()
    ) -> RunShapes:
        """Return the shapes of a run; see `predict`."""
        methods, dtype = chain(spec, earlier), spec.hardware.dtype
        shapes = [ModelShape.of(shape), *chain_shapes(methods, shape, folders)]
        *first, own = methods = [resolved(m, s) for m, s in zip(methods, shapes, strict=False)]
        start, left = shapes[-2], shapes[-1]
        working = shape_of(own, start, phase="train") if spec.stage == "train" else left
        costs = {p: inference_cost(methods, shape, dtype, p, folders) for p in own.points()}
        cost = costs[own.default_point()]
        used = inference_cost(methods, shape, dtype, own.full_point(left), folders)
        return cls(
            methods=tuple(methods),
            base=shapes[0],
            start=start,
            working=working,
            left=left,
            before=cost_of(start, dtype) if first else None,
            training=cost_of(working, dtype) if spec.stage == "train" else cost,
            cost=cost,
            caching=tuple(
                Caching.of(last_shape(methods, shape, p, folders).used(), own.decoder(p))
                for p in own.points()
            ),
            used=replace(
                used,
                kv_bytes_per_token=max(c.kv_bytes_per_token for c in costs.values()),
                kv_bytes_per_sequence=max(c.kv_bytes_per_sequence for c in costs.values()),
                caches=max(costs.values(), key=lambda c: c.cached(left.max_positions)).caches,
            ),
        )


def predict(
    spec: Spec,
    shape: AnyShape,
    machine: Machine,
    earlier: Sequence[Method] = (),
    workload: Workload | None = None,
    exact: bool = False,
    folders: Sequence[Path] = (),
    rows: int = 0,
    parallelism: Parallelism | None = None,
) -> Prediction:
    """Return what a run will need.

    Args:
        spec: The run.
        shape: Its model's shape.
        machine: Stated ceilings; zeros are left open.
        earlier: The methods that made what the run starts from, first to last.
        workload: The batches it really has; None takes the largest that its settings allow.
        exact: Whether the allocator gives blocks back at once.
        folders: Artefacts of the earlier methods.
        rows: Training rows; 0 where their number is not known, and so not how long epochs are.
        parallelism: Over how many devices it trains; bytes are then those of one of them, and the
            ceilings of the machine too. None is one.
    """
    train = spec.stage == "train" and (rows > 0 or not spec.train.epochs)
    spec = replace(spec, train=spec.train.over(rows or MANY_ROWS))
    shapes = RunShapes.of(spec, shape, earlier, folders)
    spread = parallelism or Parallelism()
    work = workload or at_most(spec, spread.devices)
    total = spec.train.max_steps * spec.train.rows_per_step
    tokens = total * spec.dataset.max_length if train else 0
    flops = tokens * _flops_per_trained_token(spec, shapes) if train else 0.0
    ceiling = machine.tflops * 1e12 * spread.devices
    seconds = flops / ceiling if ceiling and flops else None
    reads, read_flops = _first_reads(spec, shapes, rows)
    available = int(machine.memory_gib * 2**30) or free_memory(spec.hardware.device)
    if spec.hardware.device == "cpu":
        available //= spread.devices  # they share the main memory
    return Prediction(
        shapes.cost,
        _phases(spec, shapes, work, exact, spread),
        flops,
        tokens,
        seconds,
        available,
        _notes(spec, shapes.methods, shapes.cost),
        shapes.training.trainable,
        reads,
        read_flops,
        read_flops / ceiling if ceiling and read_flops else None,
    )


def at_most(spec: Spec, devices: int = 1) -> Workload:
    """Return the largest work that the settings of a run allow one of several devices."""
    rows, tokens = -(-spec.train.batch_size // devices), spec.dataset.max_length
    passes = [p for e in spec.evaluators for p in make_evaluator(e).work(spec)]
    steps = spec.train.max_steps * spec.train.accumulation
    return Workload(
        (Pass("train", rows, tokens, rows * (tokens - 1)),),
        spec.train.accumulation,
        min(tokens, steps if spec.stage == "train" else CALIBRATION_ROWS),
        (Pass("score", 1, tokens, 1),),
        tuple(passes),
    )


def _phases(
    spec: Spec, shapes: RunShapes, work: Workload, exact: bool, spread: Parallelism
) -> tuple[Phase, ...]:
    """Return the phases of a run in their order."""
    dtype, own = spec.hardware.dtype, shapes.own
    cpu, size = spec.hardware.device == "cpu", DTYPE_BYTES[dtype]
    base, start, left = (
        Peaks(s, size, cpu, exact) for s in (shapes.base, shapes.start, shapes.left)
    )
    loaded = _loaded(spec, shapes.base, shapes.methods, work)
    found = {"load": base.load(*loaded, bool(shapes.left.formats))}
    trained, kernels = spec.stage == "train", 0
    if trained and isinstance(own, Trains) and own.consults():
        found["select"] = _selecting(spec, shapes, loaded[0], exact)
    if trained:
        saved = training_of(shapes.working, dtype)
        others = _bytes_of(own.holds(), shapes.start, size)
        several = work.micro_batches > 1
        kernels = start.kernels(work.train, 1 + saved.head_gradients, work.lengths)
        shared = shapes.training, shapes.working, dtype, spread
        cost, around = held_by_one(*shared), Spread(bucket_bytes(*shared), gathered_bytes(*shared))
        steps = (
            start.step(spec.train, cost, saved, p, others, several, kernels, around)
            for p in work.train
        )
        found["train"] = max(steps, key=_total)
    if spec.stage == "compress":
        weights = shapes.before.resident_bytes if shapes.before else shapes.start.params * size
        longest, tokens, graded = None, 0, None
        if isinstance(own, Compresses) and own.calibrates:
            longest = max(work.calibrate, key=lambda p: p.size, default=None)
            graded = training_of(_graded(shapes.start), dtype) if own.backward else None
            kernels = start.kernels(work.calibrate, 3 if graded else 1, work.lengths)
            tokens = CALIBRATION_ROWS * (longest.size if longest else 0)
        held = own.held(shapes.start, tokens, size) if isinstance(own, Compresses) else 0
        found["compress"] = start.compress(weights, longest, kernels, held, graded)
    if spec.evaluators:
        every = not all(own.forward(point).shares_prefixes for point in own.points())
        passes = work.evaluate or (Pass("score", 1, 1, 1),)
        kernels += left.kernels(passes)
        together = min(len(own.points()), POINTS_AT_ONCE) if own.in_one_pass else 1
        expands = cpu or not all(x.fused for x in shapes.left.formats)
        alone = [
            left.inference(
                shapes.used, p, every, trained, together, kernels, expands, shapes.caching
            )
            for p in passes
        ]
        beside = [_bytes_of(p.beside, shapes.base, size) for p in passes]
        found["evaluate"] = max(
            _beside(shapes.used.resident_bytes, max(beside), loaded[1]),
            *(m | {"other models": b} for m, b in zip(alone, beside, strict=True)),
            key=_total,
        )
    return tuple(Phase(n, {k: int(v) for k, v in m.items() if v}) for n, m in found.items())


def _selecting(spec: Spec, shapes: RunShapes, weights: int, exact: bool) -> Components:
    """Return the peak of choosing rows beside other models: of loading them, or of reading rows.

    Args:
        spec: The run.
        shapes: Of its model.
        weights: Bytes of the model as it is held.
        exact: Whether the allocator gives blocks back at once.
    """
    own, dtype = shapes.own, spec.hardware.dtype
    assert isinstance(own, Trains)
    cpu, size = spec.hardware.device == "cpu", DTYPE_BYTES[dtype]
    others = _other_shapes(own.consults(), shapes.start)
    beside = sum(s.params * size for s in others)
    files = 0 if size == STORED_BYTES else sum(s.params for s in others) * STORED_BYTES
    length = spec.dataset.max_length
    rows = max(1, own.read_tokens // length)
    one = Pass("score", rows, length, rows if own.read_tokens else length)
    reading = (
        Peaks(ModelShape.of(s), size, cpu, exact).inference(cost_of(s, dtype), one)
        for s in (shapes.start, *others)
    )
    return max(
        _beside(weights, beside, files),
        *(found | {"weights": weights, "other models": beside} for found in reading),
        key=_total,
    )


def _graded(shape: AnyShape) -> ModelShape:
    """Return a model of whose blocks all linears have gradients, and nothing else."""
    model = ModelShape.of(shape)
    return model.map_linears(lambda _, x: replace(x, trains=True), model.chosen(LINEARS))


def _total(memory: Components) -> float:
    return sum(memory.values())


def _loaded(
    spec: Spec, shape: AnyShape, methods: Sequence[Method], work: Workload
) -> tuple[int, int]:
    """Return the bytes of the weights as they are first held, and of what they are made from."""
    masters = spec.stage == "train" and methods[-1].weights == "float32"
    packed = is_packed(methods[0].weights)
    size = 4 if masters and not packed else DTYPE_BYTES[spec.hardware.dtype]
    made_from = work.stored_bytes
    if spec.model.source == "random":
        made_from = 4 * shape.vocab_size * shape.hidden_size  # drawn matrix by matrix, in float32
    elif made_from is None:
        made_from = 0 if size == STORED_BYTES else shape.params * STORED_BYTES
    return shape.params * size, made_from


def _beside(weights: int, other: int, files: int) -> Components:
    """Return the peak of loading another model beside one, from files of so many bytes."""
    return {"weights": weights, "other models": other, "files": files if other else 0}


def _bytes_of(names: Sequence[str], start: AnyShape, element: int) -> int:
    """Return the bytes of other models; see `_other_shapes`."""
    return sum(s.params * element for s in _other_shapes(names, start))


def _other_shapes(names: Sequence[str], start: AnyShape) -> list[AnyShape]:
    """Return the shapes of other models, as far as they are known.

    Args:
        names: Of their configs; an empty one is a copy of `start`.
        start: A model that is there.
    """
    shapes = (known_shape(model_named(name)) if name else start for name in names)
    return [s for s in shapes if s]


def _flops_per_trained_token(spec: Spec, shapes: RunShapes) -> float:
    """Return the FLOPs of a training step per token, with rows of full length.

    0 where they are not counted.
    """
    if not shapes.training.per_token:
        return 0.0
    rows, length = spec.train.batch_size, spec.dataset.max_length
    work = training_of(shapes.working, spec.hardware.dtype)
    batch = Pass("train", rows, length, rows * length)
    own = step_flops(work, batch, spec.train.gradient_checkpointing)
    beside = _other_shapes(shapes.own.holds(), shapes.start)
    others = (held_flops(s, shapes.working, length // 2) for s in beside)
    return own / batch.size + sum(others)


def _first_reads(spec: Spec, shapes: RunShapes, rows: int) -> tuple[int, float]:
    """Return the sequences that are read before the first step, and the FLOPs of full ones.

    Who reads is the other model that training holds, where there is one, and both the model and
    those that are consulted. Where the number of rows is not known it is taken to be their limit.
    """
    rows = rows or spec.dataset.limit.get("train", 0)
    count = shapes.own.reads_first(rows) if isinstance(shapes.own, Trains) else 0
    if not count or not isinstance(shapes.own, Trains):
        return 0, 0.0
    held = _other_shapes(shapes.own.holds(), shapes.start)
    consulted = _other_shapes(shapes.own.consults(), shapes.start)
    readers = [shapes.start, *consulted] if consulted else [next(iter(held), shapes.start)]
    length, each = spec.dataset.max_length, -(-count // len(readers))
    counted = [r for r in readers if not ModelShape.of(r).encoder]
    return count, sum(each * length * r.flops_per_token(length // 2) for r in counted)


def _notes(spec: Spec, methods: Sequence[Method], cost: Cost) -> list[str]:
    notes = []
    if cost.saving == "simulated":
        notes.append("The saving is simulated: it is computed, but not held, in fewer bytes.")
    if not cost.per_token:
        notes.append("FLOPs are not counted: a token goes through encoder or decoder alone.")
        notes.append("Memory is modelled as if each went through both.")
    if spec.hardware.device == "cpu" and any(is_packed(m.weights) for m in methods):
        notes.append("On a CPU, 4-bit weights save memory, not time.")
    return notes


def free_memory(device: str) -> int:
    """Return the bytes that are free on this machine's CPU side; 0 where that is not known."""
    return memory_bytes()[1] if device == "cpu" else 0
