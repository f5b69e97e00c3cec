"""What changes a model beside the optimiser while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from effbench.api.batch import Batch
from effbench.util.lazy import torch


class Evolution:
    """Schedules, draws, and structure that changes while a model trains.

    One object a run, made once the method's structure is in the model. The training loop calls it,
    keeps its state in checkpoints and gives the state back. As it stands here it changes nothing.
    """

    def begin(self, window: Sequence[Batch]) -> None:
        """Look at data before anything trains; called once in a run, before its first step.

        Args:
            window: The micro-batches of the first step.
        """

    def before_step(self) -> None:
        """Set what the coming step's passes depend on."""

    def after_backward(self, optimizer: torch.optim.Optimizer) -> None:
        """Change the structure once a step's gradients are there, before they are clipped.

        They are those of the loss: what a loss in float16 was multiplied by is undone, and a step
        whose gradients overflowed has none.

        Parameters may be replaced here, as long as the optimiser is told
        (`nn.adapters.growth.OptimizerRemap`) and `load_state_dict` can do the same again.
        """

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Change weights after the optimiser has; the step's gradients are still there."""

    @property
    def final(self) -> bool:
        """Whether the structure will change no more: early stopping counts from then on."""
        return True

    def metrics(self) -> dict[str, float]:
        """Return what the event of each training step says besides loss and time."""
        return {}

    def costs(self) -> dict[str, tuple[float, str]]:
        """Return what the training took beside computing, with units: labels, judgements.

        Each is a count of the record.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return all that a checkpoint must keep: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a checkpoint's state, and give the prepared model the structure that it tells of.

        The checkpoint's tensors are put into the model after that.
        """


class UntilNeeded(Evolution):
    """Lets go of auxiliary models before the first step that needs none of them.

    Args:
        aux: The models by name, which is emptied.
        needed: Whether the coming step needs any.
    """

    def __init__(self, aux: dict[str, torch.nn.Module], needed: Callable[[], bool]) -> None:
        self.aux, self.needed = aux, needed

    def before_step(self) -> None:
        """Let go of them where it is time."""
        if not self.needed():
            self.aux.clear()
