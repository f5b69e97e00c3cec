"""What one training run holds, and how it is put together: data, method, optimiser, schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from effbench.api.examples import Example
from effbench.api.method_types import Context
from effbench.api.points import Point
from effbench.api.spec import TrainSpec
from effbench.data.dataset import Data
from effbench.data.overlap import kept
from effbench.methods.trains import Trains, begin_training, groups_of
from effbench.nn.llama.stack import decoder_layers
from effbench.resources.counting import LayerForwards
from effbench.runner import sharding
from effbench.runner.open import Opened, context
from effbench.runner.run import Run
from effbench.runner.stages.batching import passes_of
from effbench.util.errors import UserError

FORESEEN_STEPS = 500
"""Steps whose batches are looked at to predict the peak."""


@dataclass
class Progressed:
    """Counters of a training run; saved with checkpoints."""

    step: int = 0
    tokens: int = 0
    layer_forwards: int = 0
    """Positions through a decoder block, summed over blocks."""
    best_loss: float = math.inf
    waited: int = 0
    """Validations since the best loss."""
    stopped: bool = False
    """Whether early stopping ended the run."""
    devices: int = 1
    """On how many the last step was made."""


@dataclass
class Trainer:
    """Everything one training run holds."""

    run: Run
    method: Trains
    model: torch.nn.Module
    examples: Sequence[Example]
    validation: Sequence[Example]
    ctx: Context
    optimizer: Any
    schedule: torch.optim.lr_scheduler.LambdaLR
    layer_forwards: LayerForwards
    point: Point
    """Operating point at which it is validated."""
    settings: TrainSpec
    """The training part of the spec, its epochs counted in steps."""
    sharded: bool = False
    """Whether each process holds a part of the model."""
    done: Progressed = field(default_factory=Progressed)
    best: dict[str, torch.Tensor] = field(default_factory=dict)


def build_trainer(run: Run, opened: Opened, data: Data) -> Trainer:
    """Choose the data, put the method in, and make optimiser and schedule.

    Raises:
        UserError: When there is nothing to train, or nothing to train on.
    """
    spec, method, model = run.spec, opened.method, opened.model
    assert isinstance(method, Trains)
    if spec.train.patience and not spec.train.validate_every:
        raise UserError(
            f"train.patience={spec.train.patience} waits for validations, but there are none.",
            "Set train.validate_every too.",
        )
    accelerator = Accelerator(
        mixed_precision=_mixed_precision(run, method), cpu=run.device.type == "cpu"
    )
    ctx = context(run)
    ctx.backward = accelerator.backward
    ctx.autocast = accelerator.autocast
    ctx.reduce = run.group.reduce
    ctx.clip = lambda parameters: _clip(ctx, parameters, spec.train, accelerator.scaler is None)

    ctx.splits = {name: data.examples(name) for name in method.splits()}
    rows = [row for name in ("train", *ctx.splits) for row in data.rows(name)]
    run.folder.write_json("data.json", kept(rows))
    chosen = _chosen(run, method, data, model, ctx)
    if not chosen:
        raise UserError(f"{method.name} chose no training rows.", "Raise its budget.")
    settings = spec.train.over(len(chosen))
    ctx.total_steps = settings.max_steps
    run.progress.say(f"training: {spec.train.told(len(chosen))}")
    model = begin_training(method, model, ctx)
    if spec.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    model.train()
    if sharded := run.group.size > 1 and run.job.runtime.parallelism.sharding == "fsdp":
        sharding.shard(model, run.device, run.group.size)
    groups = groups_of(method, model)
    if not any(parameters for parameters, _ in groups):
        raise UserError(f"{method.name} left nothing to train.", "Check its settings.")
    optimizer = _optimizer(spec.train, groups, sharded)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(settings, step))
    optimizer = accelerator.prepare(optimizer)
    ctx.unscale = Unscaling(accelerator, optimizer, ctx)
    examples = [method.unit(e) for e in chosen]
    run.know(**_work(run, examples, settings))
    return Trainer(
        run=run,
        method=method,
        model=model,
        examples=examples,
        validation=_validation(run, method, data),
        ctx=ctx,
        optimizer=optimizer,
        schedule=schedule,
        layer_forwards=LayerForwards(decoder_layers(model)),
        point=method.validation_point(opened.start),
        settings=settings,
        sharded=sharded,
    )


def _chosen(
    run: Run, method: Trains, data: Data, model: torch.nn.Module, ctx: Context
) -> list[Example]:
    """Return the rows to train on; a choice that a method makes is a phase of its own."""
    rows = data.examples("train")
    if type(method).dataset is Trains.dataset:
        return method.dataset(rows, model, ctx)
    with run.phase("select"):
        return method.dataset(rows, model, ctx)


def _work(run: Run, examples: Sequence[Example], settings: TrainSpec) -> dict[str, Any]:
    """Return the micro-batches that training will have, as far as memory depends on them."""
    steps, seed = min(settings.max_steps, FORESEEN_STEPS), run.spec.seed
    size = settings.rows_per_step
    dealt = settings.batch_size, run.device, run.group.size
    found, most = passes_of(examples, steps, seed, size, *dealt)
    return {"train": tuple(found), "micro_batches": most, "lengths": 0}


def _validation(run: Run, method: Trains, data: Data) -> list[Example]:
    """Return the rows that training is validated on, as training has its own."""
    if not run.spec.train.validate_every:
        return []
    return [method.unit(e) for e in data.examples("validation")]


def _mixed_precision(run: Run, method: Trains) -> str:
    if run.dtype == torch.float16:
        return "fp16"
    masters = method.weights == "float32"
    return "bf16" if masters and run.dtype == torch.bfloat16 else "no"


class Unscaling:
    """Undoes in the gradients what a scaler multiplied a loss in float16 by, once a step.

    However often it is called: whoever looks at gradients first does so. Without a scaler nothing
    is done. Gradients that overflowed are dropped, as the scaler will skip their step.

    Args:
        accelerator: With the scaler, if there is one.
        optimizer: That it has prepared.
        ctx: Of the run.
    """

    def __init__(self, accelerator: Any, optimizer: Any, ctx: Context) -> None:
        self.accelerator, self.optimizer, self.ctx = accelerator, optimizer, ctx
        self.done: int | None = None
        """The last step whose gradients were freed."""

    def __call__(self) -> None:
        """Free the gradients of the step at work, if that is still to do."""
        if self.accelerator.scaler is None or self.done == self.ctx.step:
            return
        self.done = self.ctx.step
        self.accelerator.unscale_gradients(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            for parameter in parameters:
                parameter.grad = None


def _clip(
    ctx: Context, parameters: Sequence[torch.Tensor], settings: TrainSpec, refuse: bool
) -> None:
    """Clip, and refuse gradients that are not finite (float16 has its own way of skipping them)."""
    ctx.unscale()
    most = settings.clip_norm or math.inf
    norm: Any
    if sharding.is_sharded(parameters):
        norm = sharding.clip(parameters, most)
    else:
        norm = torch.nn.utils.clip_grad_norm_(parameters, most)
    if refuse:
        refuse_infinite("gradient norm", float(norm), settings, ctx.step + 1)


def refuse_infinite(what: str, value: float, settings: TrainSpec, step: int) -> None:
    """Refuse a value that is not finite.

    Raises:
        UserError: When it is not; it says at which step, and what may help.
    """
    if not math.isfinite(value):
        raise UserError(
            f"The {what} is {value} at step {step}.",
            f"Lower train.learning_rate ({settings.learning_rate}) or set "
            "train.clip_norm; the last checkpoint is kept.",
        )


def _optimizer(
    settings: TrainSpec,
    groups: Sequence[tuple[list[torch.nn.Parameter], float]],
    sharded: bool = False,
) -> Any:
    """Return the optimiser over groups of parameters, each with its share of the learning rate.

    Parts and whole parameters cannot be updated in one call of a kernel.
    """
    rate, decay = settings.learning_rate, settings.weight_decay
    assert rate is not None
    parameters = [{"params": members, "lr": rate * share} for members, share in groups]
    if settings.optimizer == "sgd":
        each = False if sharded else None
        return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, foreach=each)
    adam: dict[str, Any] = {
        "lr": rate,
        "betas": settings.betas,
        "eps": settings.epsilon,
        "weight_decay": decay,
    }
    if settings.optimizer == "adamw8bit":
        from bitsandbytes.optim.adamw import AdamW8bit

        return AdamW8bit(parameters, **adam)
    if sharded:
        return torch.optim.AdamW(parameters, foreach=False, **adam)
    # One pass over each weight instead of ten, and no temporaries.
    return torch.optim.AdamW(parameters, fused=True, **adam)


def rate_at(settings: TrainSpec, step: int) -> float:
    """Return the learning rate of a step (from 0) as a share of the peak."""
    warmup = math.ceil(settings.warmup * settings.max_steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    rest = (step - warmup) / max(1, settings.max_steps - warmup)
    return 1 - rest if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * rest))
