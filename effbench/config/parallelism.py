"""What may be trained on several devices, said before anything is loaded."""

from __future__ import annotations

from effbench.api.plugins import make_method
from effbench.api.shape import ModelShape
from effbench.api.spec import Parallelism, Spec
from effbench.api.stages import base as stages
from effbench.methods.trains import data_parallel
from effbench.models.load import known_shape
from effbench.util.errors import UserError


def check_parallelism(spec: Spec, parallelism: Parallelism) -> None:
    """Refuse several devices for a run that has no use for them, or was not shown to work on them.

    Args:
        spec: The run.
        parallelism: What was asked for.

    Raises:
        UserError: Naming the setting.
    """
    devices, sharding = parallelism.devices, parallelism.sharding
    if devices == 1:
        if sharding != "none":
            raise UserError(
                f"hardware.sharding={sharding} has parts for several devices, and there is one.",
                "Set hardware.devices too.",
            )
        return
    _check_training(spec, devices)
    shape = known_shape(spec.model)
    if shape and ModelShape.of(shape).encoder:
        raise UserError(
            f"{spec.model.called} has an encoder, and was not shown to train on several devices as "
            "on one.",
            "Leave hardware.devices out.",
        )
    if sharding not in (ways := data_parallel(make_method(spec.method))):
        name = spec.method.name
        where = "on several devices" if not ways else f"with hardware.sharding={sharding}"
        raise UserError(
            f"{name} was not shown to train {where} as on one.",
            f"Use hardware.sharding={min(ways)}." if ways else "Leave hardware.devices out.",
        )
    if sharding == "fsdp":
        _check_sharded(spec)


def _check_training(spec: Spec, devices: int) -> None:
    """Refuse stages without training, and micro-batches with fewer rows than there are devices."""
    if not stages.find(spec.stage).trains:
        raise UserError(
            f"hardware.devices={devices} is for a training; effbench {spec.stage} uses one device.",
            "Leave hardware.devices out.",
        )
    if spec.train.batch_size < devices:
        raise UserError(
            f"train.batch_size={spec.train.batch_size} has no row for each of "
            f"hardware.devices={devices}: it is the batch of all devices together.",
            f"Set train.batch_size={devices} or more.",
        )


def _check_sharded(spec: Spec) -> None:
    """Refuse what does not work on parts of tensors."""
    if spec.train.optimizer == "adamw8bit":
        raise UserError(
            "train.optimizer=adamw8bit cannot update parts of tensors (hardware.sharding=fsdp).",
            "Use train.optimizer=adamw, or hardware.sharding=none.",
        )
    if spec.hardware.dtype == "float16":
        raise UserError(
            "hardware.dtype=float16 scales the loss on each device by itself, which "
            "hardware.sharding=fsdp does not allow.",
            "Use bfloat16 or float32, or hardware.sharding=none.",
        )
