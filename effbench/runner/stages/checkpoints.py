"""Checkpoints of a training: all that changes, written whole, and how it is put back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from effbench.methods.trains import groups_of
from effbench.runner import sharding
from effbench.runner.run import Run
from effbench.runner.stages.trainer import Trainer
from effbench.util.errors import UserError


def save_checkpoint(trainer: Trainer) -> None:
    """Write the state after a step; of several processes the first one alone writes."""
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


def resume(trainer: Trainer) -> None:
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
    groups = groups_of(method, trainer.model)
    for group, (members, _) in zip(trainer.optimizer.param_groups, groups, strict=True):
        group["params"] = members  # some may be new
    with torch.no_grad():
        restore(trainer, state["tensors"])
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


def restore(trainer: Trainer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give the trained tensors of the model these values, by name."""
    for name, target in trainer.method.trained_tensors(trainer.model).items():
        target.copy_(sharding.like(target, tensors[name]))
