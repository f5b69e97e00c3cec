"""The training loop: short, exactly resumable, on accelerate."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from effbench.api.batch import Batch, by_length, collate
from effbench.api.examples import Example
from effbench.api.method_types import Context
from effbench.api.spec import TrainSpec
from effbench.data.dataset import Data
from effbench.nn.llama.layers import decoder_layers
from effbench.nn.llama.weights import cast_parameters
from effbench.resources.counting import LayerForwards
from effbench.results.events import read_events
from effbench.results.records import Metric
from effbench.runner.artefact import load_made, note_made, save_artefact
from effbench.runner.evaluation import evaluate
from effbench.runner.open import open_data, open_model
from effbench.runner.progress import duration
from effbench.runner.run import Bench, count_model, count_trained, mean
from effbench.runner.signals import stop_signal
from effbench.runner.stages.batching import passes_of, rows_of_step, window
from effbench.stats import median_interval
from effbench.util.errors import StoppedError, UserError
from effbench.util.files import open_atomic

FORESEEN_STEPS = 500
"""Steps whose batches are looked at to predict the peak."""
VALIDATION_TOKENS = 2048
"""Tokens of a batch of validation rows, padding included."""
WARMUP_STEPS = 3
"""Steps left out of the steady-state speed, where there are more."""


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


@dataclass
class Trainer:
    """Everything one training run holds."""

    bench: Bench
    model: torch.nn.Module
    examples: Sequence[Example]
    validation: Sequence[Example]
    ctx: Context
    accelerator: Accelerator
    optimizer: Any
    schedule: torch.optim.lr_scheduler.LambdaLR
    layer_forwards: LayerForwards
    validated: str
    """Operating point at which it is validated."""
    done: Progressed = field(default_factory=Progressed)
    best: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def settings(self) -> TrainSpec:
        """The training part of the spec."""
        return self.bench.spec.train


def train(bench: Bench) -> None:
    """Train, save and evaluate.

    Raises:
        StoppedError: After Ctrl-C or a termination signal, once the state is saved.
        UserError: For settings that cannot work, or a loss that is not finite.
    """
    data = open_data(bench)
    data.examples("train")  # held by the process before the model's memory is measured
    model = open_model(bench)
    model = load_made(bench, model) or _made(bench, model, data)
    if bench.method.weights == "float32":
        cast_parameters(model, bench.dtype)
    evaluate(bench, model, data)


def _made(bench: Bench, model: torch.nn.Module, data: Data) -> torch.nn.Module:
    """Train and save; the optimiser, gradients and other models are gone when this returns."""
    trainer = prepare(bench, model, data)
    with bench.phase("train"):
        _loop(trainer)
        trainer.layer_forwards.close()
        if trainer.best:
            _restore(bench, trainer.model, trainer.best)
        count_trained(bench, trainer.model)
        _count_state(bench, trainer)
        model = bench.method.finish(trainer.model, trainer.ctx)
    count_model(bench, model)
    save_artefact(bench, model)
    _summarise(bench, trainer.done)
    note_made(bench)
    trainer.optimizer.zero_grad(set_to_none=True)
    bench.method.release(model)
    return model


def _count_state(bench: Bench, trainer: Trainer) -> None:
    """Count what training holds beside the weights, from the tensors themselves."""
    states = trainer.optimizer.state.values()
    moments = [v for s in states for v in s.values() if isinstance(v, torch.Tensor)]
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    for name, tensors in (("optimizer_bytes", moments), ("gradient_bytes", gradients)):
        bench.count(name, sum(t.numel() * t.element_size() for t in tensors), "bytes")


def prepare(bench: Bench, model: torch.nn.Module, data: Data) -> Trainer:
    """Choose the data, put the method in, and make optimiser and schedule.

    Raises:
        UserError: When there is nothing to train, or nothing to train on.
    """
    spec, method = bench.spec, bench.method
    if spec.train.patience and not spec.train.validate_every:
        raise UserError(
            f"train.patience={spec.train.patience} waits for validations, but there are none.",
            "Set train.validate_every too.",
        )
    accelerator = Accelerator(
        mixed_precision=_mixed_precision(bench), cpu=bench.device.type == "cpu"
    )
    ctx = bench.context()
    ctx.total_steps = spec.train.max_steps
    ctx.backward = accelerator.backward
    ctx.autocast = accelerator.autocast
    ctx.clip = lambda parameters: _clip(accelerator, parameters, spec.train, ctx.step)

    bench.folder.write_json("data.json", data.ids("train"))
    chosen = method.dataset(data.examples("train"), model, ctx)
    if not chosen:
        raise UserError(f"{method.name} chose no training rows.", "Raise its budget.")
    model = method.prepare(model, ctx)
    if spec.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    model.train()
    groups = method.groups(model)
    if not any(parameters for parameters, _ in groups):
        raise UserError(f"{method.name} left nothing to train.", "Check its settings.")
    optimizer = _optimizer(spec.train, groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(spec.train, step))
    optimizer = accelerator.prepare(optimizer)
    examples = [method.unit(e) for e in chosen]
    bench.know(**_work(bench, examples))
    return Trainer(
        bench=bench,
        model=model,
        examples=examples,
        validation=_validation(bench, data),
        ctx=ctx,
        accelerator=accelerator,
        optimizer=optimizer,
        schedule=schedule,
        layer_forwards=LayerForwards(decoder_layers(model)),
        validated=method.validated(bench.start_shape()),
    )


def _work(bench: Bench, examples: Sequence[Example]) -> dict[str, Any]:
    """Return the micro-batches that training will have, as far as memory depends on them."""
    settings, seed = bench.spec.train, bench.spec.seed
    steps = min(settings.max_steps, FORESEEN_STEPS)
    size = settings.batch_size * settings.accumulation
    found, most = passes_of(examples, steps, seed, size, settings.batch_size, bench.device)
    return {"train": tuple(found), "micro_batches": most, "lengths": 0}


def _validation(bench: Bench, data: Data) -> list[Example]:
    """Return the rows that training is validated on, as training has its own."""
    if not bench.spec.train.validate_every:
        return []
    return [bench.method.unit(e) for e in data.examples("validation")]


def _mixed_precision(bench: Bench) -> str:
    if bench.dtype == torch.float16:
        return "fp16"
    masters = bench.method.weights == "float32"
    return "bf16" if masters and bench.dtype == torch.bfloat16 else "no"


def _clip(
    accelerator: Accelerator, parameters: Sequence[torch.Tensor], settings: TrainSpec, step: int
) -> None:
    """Clip, and refuse gradients that are not finite (float16 has its own way of skipping them)."""
    norm = accelerator.clip_grad_norm_(parameters, settings.clip_norm or math.inf)
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
    settings: TrainSpec, groups: Sequence[tuple[list[torch.nn.Parameter], float]]
) -> Any:
    """Return the optimiser over groups of parameters, each with its share of the learning rate."""
    rate, decay = settings.learning_rate, settings.weight_decay
    assert rate is not None
    parameters = [{"params": members, "lr": rate * share} for members, share in groups]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, weight_decay=decay)
    adam: dict[str, Any] = {
        "lr": rate,
        "betas": settings.betas,
        "eps": settings.epsilon,
        "weight_decay": decay,
    }
    if settings.optimizer == "adamw8bit":
        from bitsandbytes.optim.adamw import AdamW8bit

        return AdamW8bit(parameters, **adam)
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
    if first == 0:
        trainer.bench.method.start(trainer.model, window_of(trainer, 0), trainer.ctx)
    begun = time.perf_counter()
    with stop_signal() as stop:
        while done.step < settings.max_steps and not done.stopped:
            loss = one_step(trainer)
            if settings.validate_every and done.step % settings.validate_every == 0:
                _validate(trainer)
            _show(trainer, loss, first, begun)
            last = done.step == settings.max_steps or done.stopped
            due = done.step % settings.checkpoint_every == 0
            if stop.requested or (due and not last):
                _checkpoint(trainer)
            if stop.requested:
                raise StoppedError(f"step {done.step} of {settings.max_steps}")


def one_step(trainer: Trainer) -> float:
    """Make the next optimiser step; return its loss in nats per token.

    Raises:
        UserError: When the loss is not finite.
    """
    bench, ctx, done = trainer.bench, trainer.ctx, trainer.done
    start = time.perf_counter()
    batches = window_of(trainer, done.step)
    before = trainer.layer_forwards.count
    ctx.step = done.step
    bench.method.on_step(trainer.model, ctx)
    loss = float(bench.method.update(trainer.model, trainer.optimizer, batches, ctx))
    rate = trainer.schedule.get_last_lr()[0]
    trainer.schedule.step()
    _refuse_infinite("loss", loss, trainer.settings, done.step + 1)
    tokens = sum(int(b.attention_mask.sum()) for b in batches)
    done.step += 1
    done.tokens += tokens
    layer_forwards = trainer.layer_forwards.count - before
    done.layer_forwards += layer_forwards
    bench.events.append(
        "step",
        step=done.step,
        loss=loss,
        seconds=round(time.perf_counter() - start, 6),
        tokens=tokens,
        layer_forwards=layer_forwards,
        learning_rate=rate,
        **bench.method.facts(trainer.model, ctx),
    )
    return loss


def window_of(trainer: Trainer, step: int) -> list[Batch]:
    """Return the micro-batches of a step."""
    settings = trainer.settings
    size = settings.batch_size * settings.accumulation
    return window(
        trainer.examples,
        rows_of_step(len(trainer.examples), trainer.bench.spec.seed, step, size),
        settings.batch_size,
        trainer.bench.tokenizer.pad_token_id,
        trainer.ctx.device,
    )


def _show(trainer: Trainer, loss: float, first: int, begun: float) -> None:
    bench, done = trainer.bench, trainer.done
    elapsed = time.perf_counter() - begun
    left = elapsed / (done.step - first) * (trainer.settings.max_steps - done.step)
    speed = _speed(bench, done, first, elapsed)
    bench.progress.bar(
        "step",
        done.step,
        trainer.settings.max_steps,
        f"loss {loss:.4f}  {speed:.0f} tok/s  {bench.memory_now()}  {duration(left)} left",
    )


def _speed(bench: Bench, done: Progressed, first: int, elapsed: float) -> float:
    return done.tokens / done.step * (done.step - first) / max(elapsed, 1e-9)


@torch.no_grad()
def _validate(trainer: Trainer) -> None:
    """Measure the loss on the validation split; remember the best weights; decide to stop."""
    bench, model, done = trainer.bench, trainer.model, trainer.done
    model.eval()
    total, count = 0.0, 0
    with bench.method.at(model, trainer.validated):
        lengths = [e.longest * len(e.sequences) for e in trainer.validation]
        for group in by_length(lengths, VALIDATION_TOKENS):
            rows = [trainer.validation[i] for i in group]
            batch = collate(rows, bench.tokenizer.pad_token_id).to(trainer.ctx.device)
            with trainer.ctx.autocast():
                losses, over = bench.method.validation(model, batch, trainer.validated)
            total += float(losses.double().sum())
            count += over
    model.train()
    loss = total / count
    bench.events.append("validation", step=done.step, loss=loss)
    bench.progress.say(f"step {done.step}: validation loss {loss:.4f}")
    if not bench.method.settled(model, trainer.ctx):
        return
    if loss < done.best_loss:
        done.best_loss, done.waited = loss, 0
        if trainer.settings.patience:
            tensors = bench.method.tensors(trainer.model)
            trainer.best = {n: t.detach().clone() for n, t in tensors.items()}
    else:
        done.waited += 1
        if trainer.settings.patience and done.waited >= trainer.settings.patience:
            done.stopped = True
            bench.notes.append(
                f"stopped early at step {done.step}: no better validation loss in "
                f"{done.waited} validations"
            )


def _restore(bench: Bench, model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, target in bench.method.tensors(model).items():
        target.copy_(tensors[name])


# -- resume ----------------------------------------------------------------------------------------


def _checkpoint(trainer: Trainer) -> None:
    state = {
        "tensors": trainer.bench.method.tensors(trainer.model),
        "best": trainer.best,
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.schedule.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "draws": trainer.ctx.generator.get_state(),
        "method": trainer.ctx.state,
        "done": vars(trainer.done),
        "notes": trainer.bench.notes,
        "events": trainer.bench.events.position(),
    }
    with open_atomic(trainer.bench.folder.checkpoint) as file:
        torch.save(state, file)


def _resume(trainer: Trainer) -> None:
    """Put everything back to where the last checkpoint was, if there is one.

    Raises:
        UserError: When the checkpoint cannot be read.
    """
    bench = trainer.bench
    path = bench.folder.checkpoint
    if not path.is_file():
        return
    try:
        state = torch.load(path, map_location=bench.device, weights_only=True)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path} cannot be read: {reason}",
            "Start anew with --fresh.",
        ) from None
    trainer.ctx.state = state["method"]
    trainer.model = bench.method.rebuild(trainer.model, trainer.ctx)
    groups = bench.method.groups(trainer.model)
    for group, (members, _) in zip(trainer.optimizer.param_groups, groups, strict=True):
        group["params"] = members  # some may be new
    with torch.no_grad():
        _restore(bench, trainer.model, state["tensors"])
    trainer.best = state["best"]
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["random"].cpu())
    if state["random_cuda"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["random_cuda"]])
    trainer.ctx.generator.set_state(state["draws"].cpu())
    trainer.done.__dict__.update(state["done"])
    bench.notes[:] = state["notes"]
    bench.events.cut(state["events"])
    bench.progress.say(f"going on from step {trainer.done.step}")


def _summarise(bench: Bench, done: Progressed) -> None:
    """Turn the step events into metrics."""
    steps = list(read_events(bench.folder.path / "events.jsonl", "step"))
    losses = [s["loss"] for s in steps]
    tail = max(1, len(losses) // 10)
    steady = steps[WARMUP_STEPS:] or steps
    seconds = [s["seconds"] for s in steady]
    rates = [s["tokens"] / s["seconds"] for s in steady]
    step, low, high = median_interval(seconds, seed=bench.spec.seed)
    speed, slow, fast = median_interval(rates, seed=bench.spec.seed)
    counted: dict[str, Any] = {"phase": "train", "obtained": "counted"}
    bench.metrics += [
        Metric("train_loss_first", mean(losses[:tail]), "nats/token", n=tail, phase="train"),
        Metric("train_loss_last", mean(losses[-tail:]), "nats/token", n=tail, phase="train"),
        Metric("train_steps", done.step, "steps", **counted),
        Metric("train_tokens", done.tokens, "tokens", **counted),
        Metric("train_layer_forwards", done.layer_forwards, "positions x layers", **counted),
        Metric("step_seconds", step, "s", n=len(seconds), low=low, high=high, phase="train"),
        Metric(
            "train_tokens_per_second",
            speed,
            "tokens/s",
            n=len(rates),
            low=slow,
            high=fast,
            phase="train",
        ),
    ]
