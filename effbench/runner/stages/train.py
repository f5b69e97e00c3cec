"""Training: the loop, short and exactly resumable, and what comes before and after it."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from effbench.api.batch import Batch, by_length, collate
from effbench.data.dataset import Data
from effbench.methods.trains import Trains, begin_training
from effbench.nn.llama.weights import cast_parameters
from effbench.nn.model_kinds.base import kind_of
from effbench.runner import sharding
from effbench.runner.artefact import load_made, note_made, save_artefact
from effbench.runner.evaluation import evaluate
from effbench.runner.open import Opened, context, load_start, open_data, open_model
from effbench.runner.peers import spread
from effbench.runner.run import Run, count_model, count_trained, hold_against_plan
from effbench.runner.signals import stop_signal
from effbench.runner.stages.batching import rows_of_step, window
from effbench.runner.stages.checkpoints import restore, resume, save_checkpoint
from effbench.runner.stages.trainer import Progressed, Trainer, build_trainer, refuse_infinite
from effbench.util.errors import StoppedError

VALIDATION_TOKENS = 2048
"""Tokens of a batch of validation rows, padding included."""


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


def _loss_unit(method: Trains, model: torch.nn.Module) -> str:
    """Return what the losses were in; a token of a classifier is the class of its row."""
    unit = method.loss_unit
    return unit if kind_of(model).speaks else unit.replace("token", "row")


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
    note_made(run, loss_unit=_loss_unit(method, model))
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.ctx.aux.clear()
    return model


def _train(trainer: Trainer) -> None:
    """Make all steps; the model then has the weights that are to be kept."""
    _loop(trainer)
    trainer.layer_forwards.close()
    if trainer.best:
        restore(trainer, trainer.best)


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


# -- the loop --------------------------------------------------------------------------------------


def _loop(trainer: Trainer) -> None:
    done, settings = trainer.done, trainer.settings
    resume(trainer)
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
                save_checkpoint(trainer)
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
    refuse_infinite("loss", loss, trainer.settings, done.step + 1)
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
