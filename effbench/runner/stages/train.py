"""The training loop: short, exactly resumable, on accelerate."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from effbench.api.batch import Batch, by_length, collate
from effbench.api.examples import Example
from effbench.api.method_types import Context
from effbench.api.points import Point
from effbench.api.spec import TrainSpec
from effbench.data.dataset import Data
from effbench.data.overlap import kept
from effbench.methods.trains import Trains, begin_training
from effbench.nn.llama.stack import decoder_layers
from effbench.nn.llama.weights import cast_parameters
from effbench.resources.counting import LayerForwards
from effbench.runner import sharding
from effbench.runner.artefact import load_made, note_made, save_artefact
from effbench.runner.evaluation import evaluate
from effbench.runner.open import Opened, context, load_start, open_data, open_model
from effbench.runner.peers import spread
from effbench.runner.run import Run, count_model, count_trained, hold_against_plan
from effbench.runner.signals import stop_signal
from effbench.runner.stages.batching import passes_of, rows_of_step, window
from effbench.util.errors import StoppedError, UserError

FORESEEN_STEPS = 500
"""Steps whose batches are looked at to predict the peak."""
VALIDATION_TOKENS = 2048
"""Tokens of a batch of validation rows, padding included."""


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
    accelerator: Accelerator
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


def perform(run: Run) -> None:
    """Train, save and evaluate.

    Raises:
        StoppedError: After Ctrl-C or a termination signal, once the state is saved.
        UserError: For settings that cannot work, or a loss that is not finite.
    """
    data = open_data(run)
    data.examples("train")  # held by the process before the model's memory is measured
    with spread(run):
        opened = open_model(run)
        made = load_made(run, opened.method, opened.model) or _made(run, opened, data)
    opened = replace(opened, model=made)
    if opened.method.weights == "float32":
        cast_parameters(made, run.dtype)
    evaluate(run, opened, data)
    hold_against_plan(run, opened.base, opened.base_bytes)


def assist(run: Run) -> None:
    """Train beside the run's own process, which alone saves and evaluates.

    Raises:
        StoppedError: When the run was asked to stop.
        UserError: As for `perform`.
    """
    data = open_data(run)
    data.examples("train")
    trainer = build_trainer(run, open_model(run), data)
    with run.phase("train"):
        _train(trainer)
        _whole_model(trainer)


def _made(run: Run, opened: Opened, data: Data) -> torch.nn.Module:
    """Train and save; the optimiser, gradients and other models are gone when this returns."""
    trainer = build_trainer(run, opened, data)
    method = trainer.method
    with run.phase("train"):
        _train(trainer)
        states = _states(trainer)
        trained = _whole_model(trainer)
        count_trained(run, trained)
        for name, size in states.items():
            run.count(name, size, "bytes")
        model = method.finalize(trained, trainer.ctx)
    for name, (amount, unit) in trainer.ctx.evolution.costs().items():
        run.count(name, amount, unit)
    count_model(run, model)
    save_artefact(run, method, model)
    note_made(run)
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.ctx.aux.clear()
    return model


def _train(trainer: Trainer) -> None:
    """Make all steps; the model then has the weights that are to be kept."""
    _loop(trainer)
    trainer.layer_forwards.close()
    if trainer.best:
        _restore(trainer, trainer.best)


def _whole_model(trainer: Trainer) -> torch.nn.Module:
    """Return the model with all that was learnt; what others hold parts of is loaded once more."""
    run, method = trainer.run, trainer.method
    if not trainer.sharded:
        return trainer.model
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.optimizer.state.clear()
    first, model = run.group.rank == 0, trainer.model
    if first:
        model = begin_training(method, load_start(run, method).model, context(run))
    targets = method.trained_tensors(model)
    with torch.no_grad():
        for name, part in method.trained_tensors(trainer.model).items():
            tensor = sharding.whole(part, first)
            if first:
                targets[name].copy_(tensor)
    return model


def _states(trainer: Trainer) -> dict[str, int]:
    """Return the bytes that training holds beside the weights, from the tensors themselves."""
    states = trainer.optimizer.state.values()
    moments = [v for s in states for v in s.values() if isinstance(v, torch.Tensor)]
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    kinds = {"optimizer_bytes": moments, "gradient_bytes": gradients}
    return {n: sum(t.numel() * t.element_size() for t in tensors) for n, tensors in kinds.items()}


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
    ctx.clip = lambda parameters: _clip(accelerator, parameters, spec.train, ctx.step)

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
    groups = method.param_groups(model)
    if not any(parameters for parameters, _ in groups):
        raise UserError(f"{method.name} left nothing to train.", "Check its settings.")
    optimizer = _optimizer(spec.train, groups, sharded)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(settings, step))
    optimizer = accelerator.prepare(optimizer)
    examples = [method.unit(e) for e in chosen]
    run.know(**_work(run, examples, settings))
    return Trainer(
        run=run,
        method=method,
        model=model,
        examples=examples,
        validation=_validation(run, method, data),
        ctx=ctx,
        accelerator=accelerator,
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


def _clip(
    accelerator: Accelerator, parameters: Sequence[torch.Tensor], settings: TrainSpec, step: int
) -> None:
    """Clip, and refuse gradients that are not finite (float16 has its own way of skipping them)."""
    most = settings.clip_norm or math.inf
    norm: Any
    if sharding.is_sharded(parameters):
        norm = sharding.clip(parameters, most)
    else:
        norm = accelerator.clip_grad_norm_(parameters, most)
    if accelerator.scaler is None and norm is not None:
        _refuse_infinite("gradient norm", float(norm), settings, step + 1)


def _refuse_infinite(what: str, value: float, settings: TrainSpec, step: int) -> None:
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


# -- the loop --------------------------------------------------------------------------------------


def _loop(trainer: Trainer) -> None:
    done, settings = trainer.done, trainer.settings
    _resume(trainer)
    first = done.step
    _note_devices(trainer)
    if first == 0:
        trainer.ctx.evolution.begin(window_of(trainer, 0))
    begun = time.perf_counter()
    trainer.run.progress.bar("step", first, settings.max_steps)
    with stop_signal() as stop:
        while done.step < settings.max_steps and not done.stopped:
            loss = one_step(trainer)
            if settings.validate_every and done.step % settings.validate_every == 0:
                _validate(trainer)
            _show(trainer, loss, first, begun)
            last = done.step == settings.max_steps or done.stopped
            due = done.step % settings.checkpoint_every == 0
            stop.requested = trainer.run.group.any(stop.requested)
            if stop.requested or (due and not last):
                _checkpoint(trainer)
            if stop.requested:
                raise StoppedError(f"step {done.step} of {settings.max_steps}")


def _note_devices(trainer: Trainer) -> None:
    """Say from which step on there is another number of devices; draw apart from other processes.

    What torch draws by itself, as for dropout, must differ between their rows.
    """
    run, done = trainer.run, trainer.done
    if run.group.size != done.devices:
        count = f"{run.group.size} devices" if run.group.size > 1 else "one device"
        run.note(f"trained on {count} from step {done.step + 1} on")
        done.devices = run.group.size
    if run.group.rank:
        torch.manual_seed((run.spec.seed * 1_000_003 + done.step * 1009 + run.group.rank) % 2**63)


def one_step(trainer: Trainer) -> float:
    """Make the next optimiser step; return its loss in nats per token.

    Raises:
        UserError: When the loss is not finite.
    """
    run, method, ctx, done = trainer.run, trainer.method, trainer.ctx, trainer.done
    start = time.perf_counter()
    batches = window_of(trainer, done.step)
    before = trainer.layer_forwards.count
    ctx.step = done.step
    ctx.evolution.before_step()
    loss = float(method.update(trainer.model, trainer.optimizer, batches, ctx))
    rate = trainer.schedule.get_last_lr()[0]
    trainer.schedule.step()
    _refuse_infinite("loss", loss, trainer.settings, done.step + 1)
    tokens = _tokens(trainer, done.step)
    done.step += 1
    done.tokens += tokens
    layer_forwards = run.group.total(trainer.layer_forwards.count - before)
    done.layer_forwards += layer_forwards
    run.events.append(
        "step",
        step=done.step,
        loss=loss,
        seconds=round(time.perf_counter() - start, 6),
        tokens=tokens,
        layer_forwards=layer_forwards,
        learning_rate=rate,
        **ctx.evolution.metrics(),
    )
    return loss


def window_of(trainer: Trainer, step: int) -> list[Batch]:
    """Return this process's part of the micro-batches of a step."""
    run = trainer.run
    return window(
        trainer.examples,
        _rows(trainer, step),
        trainer.settings.batch_size,
        run.tokenizer.pad_token_id,
        trainer.ctx.device,
        run.group.rank,
        run.group.size,
    )


def _rows(trainer: Trainer, step: int) -> list[int]:
    """Return the rows of a step, over all processes."""
    size = trainer.settings.rows_per_step
    return rows_of_step(len(trainer.examples), trainer.run.spec.seed, step, size)


def _tokens(trainer: Trainer, step: int) -> int:
    """Return the tokens of a step, over all processes."""
    rows = (trainer.examples[i] for i in _rows(trainer, step))
    return sum(len(s.ids) for row in rows for s in row.sequences)


def _show(trainer: Trainer, loss: float, first: int, begun: float) -> None:
    run, done = trainer.run, trainer.done
    elapsed = time.perf_counter() - begun
    speed = _speed(run, done, first, elapsed)
    run.progress.bar(
        "step",
        done.step,
        trainer.settings.max_steps,
        f"loss {loss:.4f}  {speed:.0f} tok/s  {run.memory_now()}",
    )


def _speed(run: Run, done: Progressed, first: int, elapsed: float) -> float:
    return done.tokens / done.step * (done.step - first) / max(elapsed, 1e-9)


@torch.no_grad()
def _validate(trainer: Trainer) -> None:
    """Measure the loss on the validation split; remember the best weights; decide to stop."""
    run, method, done = trainer.run, trainer.method, trainer.done
    model = trainer.model
    model.eval()
    total, count = 0.0, 0
    with method.at(model, trainer.point):
        lengths = [e.longest * len(e.sequences) for e in trainer.validation]
        for group in by_length(lengths, VALIDATION_TOKENS):
            rows = [trainer.validation[i] for i in group]
            batch = collate(rows, run.tokenizer.pad_token_id).to(trainer.ctx.device)
            with trainer.ctx.autocast():
                losses, over = method.validation(model, batch, trainer.point)
            total += float(losses.double().sum())
            count += over
    model.train()
    loss = run.group.told(total / count)
    run.events.append("validation", step=done.step, loss=loss)
    run.progress.say(f"step {done.step}: validation loss {loss:.4f}")
    if not trainer.ctx.evolution.final:
        return
    if loss < done.best_loss:
        done.best_loss, done.waited = loss, 0
        if trainer.settings.patience:
            tensors = method.trained_tensors(trainer.model)
            trainer.best = {n: t.detach().clone() for n, t in tensors.items()}
    else:
        done.waited += 1
        if trainer.settings.patience and done.waited >= trainer.settings.patience:
            done.stopped = True
            run.note(
                f"stopped early at step {done.step}: no better validation loss in "
                f"{done.waited} validations"
            )


def _restore(trainer: Trainer, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, target in trainer.method.trained_tensors(trainer.model).items():
        target.copy_(sharding.like(target, tensors[name]))


# -- resume ----------------------------------------------------------------------------------------


def _checkpoint(trainer: Trainer) -> None:
    first = trainer.run.group.rank == 0
    state = {
        "tensors": sharding.whole(trainer.method.trained_tensors(trainer.model), first),
        "best": sharding.whole(trainer.best, first),
        "optimizer": sharding.whole(trainer.optimizer.state_dict(), first),
        "schedule": trainer.schedule.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "draws": trainer.ctx.generator.get_state(),
        "method": trainer.ctx.state,
        "evolution": trainer.ctx.evolution.state_dict(),
        "done": vars(trainer.done),
        "events": trainer.run.events.position(),
    }
    if not first:
        return
    folder = trainer.run.folder
    with folder.writing(folder.checkpoint.name) as path, path.open("xb") as file:
        torch.save(state, file)


def _checked_checkpoint(run: Run) -> Path | None:
    """Return the file of the last checkpoint, as it was written; None where there is none."""
    path = run.folder.checkpoint
    if not path.exists():
        return None
    return run.folder.check(path.name, hint="Delete it, or say --fresh, to train from the start.")


def _resume(trainer: Trainer) -> None:
    """Put everything back to where the last checkpoint was, if there is one.

    Raises:
        UserError: When the checkpoint cannot be read.
    """
    run, method = trainer.run, trainer.method
    path = run.group.told(_checked_checkpoint(run))
    if path is None:
        run.events.cut()
        return
    try:
        state = torch.load(path, map_location=run.device, weights_only=True)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path} cannot be read: {reason}",
            "Delete it, or say --fresh, to train from the first step.",
        ) from None
    trainer.ctx.state = state["method"]
    trainer.ctx.evolution.load_state_dict(state["evolution"])
    groups = method.param_groups(trainer.model)
    for group, (members, _) in zip(trainer.optimizer.param_groups, groups, strict=True):
        group["params"] = members  # some may be new
    with torch.no_grad():
        _restore(trainer, state["tensors"])
    trainer.best = state["best"]
    trainer.optimizer.load_state_dict(
        sharding.parts_of_states(trainer.optimizer, state["optimizer"])
    )
    trainer.schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["random"].cpu())
    if state["random_cuda"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["random_cuda"]])
    trainer.ctx.generator.set_state(state["draws"].cpu())
    trainer.done.__dict__.update(state["done"])
    if not run.group.rank:
        run.events.cut(state["events"])
    run.progress.say(f"going on from step {trainer.done.step}")
