"""Pruning and growing while a model trains: blocks go, ranks of adapters rise, the model is sliced.

Each step, once its gradients are there: salience is collected; on a pruning step, blocks are chosen
anew; masks move; on a growth step, the more important adapters grow; when all masks are 0 or 1 and
the window is over, the model is sliced. Source: Zhao et al., APT: Adaptive Pruning and Tuning, ICML
2024, arXiv 2401.12200.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from effbench.api.evolution import Evolution
from effbench.api.method_types import Context
from effbench.nn.adapters.growth import Growth, Moments, OptimizerRemap, adapter_parameters, merge
from effbench.nn.adapters.lowrank import copy_adapters, low_rank_layers
from effbench.nn.pruning.masks import masks_of
from effbench.nn.pruning.pruner import BlockSearch, Pruning, weights_left
from effbench.nn.pruning.schedule import PruningSchedule
from effbench.nn.pruning.slicing import Kept


class PruneAndGrow(Evolution):
    """Prunes blocks, grows adapters and slices the model where it is time.

    Args:
        model: Prepared: with adapters, masks, and what collects salience.
        ctx: Of the run.
        schedule: When it is time.
        search: Chooses the blocks that stay.
        growth: Of the adapters.
        mask_step: How far a mask moves in a step.
        moments: What becomes of Adam's moments when a parameter changes its shape.
        distill: Whether the model learns from itself as it was: it is then sliced at the end.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        ctx: Context,
        schedule: PruningSchedule,
        search: BlockSearch,
        growth: Growth,
        mask_step: float,
        moments: Moments,
        distill: bool,
    ) -> None:
        self.model, self.ctx, self.schedule = model, ctx, schedule
        self.search, self.growth = search, growth
        self.mask_step, self.moments, self.distill = mask_step, moments, distill
        self.whole = weights_left(model)
        """Weights of the decoder's linears before any is pruned."""
        self.searched = 1.0
        """Share of the weights that the last choice of blocks aimed at."""
        self.kept: dict[str, Any] | None = None
        """What the slice kept, once the model is sliced."""
        self.teacher: dict[str, list[torch.Tensor]] | None = None
        """The adapters before pruning, where the model learns from itself."""

    @property
    def pruning(self) -> Pruning | None:
        """Masks and salience, while the model is not sliced."""
        return Pruning.of(self.model)

    def after_backward(self, optimizer: torch.optim.Optimizer) -> None:
        """Prune, grow and slice where it is time."""
        step, pruning, remap = self.ctx.step, self.pruning, OptimizerRemap(optimizer, self.moments)
        if pruning:
            self._prune(pruning, step)
        self.growth.after_backward(step, remap)
        if pruning and not self.distill and pruning.masks.hard and self.schedule.over(step):
            self.kept = pruning.cut(replace=remap).plain()
        if step < self.schedule.warm:
            for parameter in self.model.parameters():
                parameter.grad = None

    def _prune(self, pruning: Pruning, step: int) -> None:
        pruning.watcher.finish_step()
        if self.distill and (self.teacher is None or not self.schedule.share(step)):
            self.teacher = copy_adapters(self.model)
        if step in self.schedule.pruning_steps:
            self.aim(pruning, self.schedule.ratio(step, self.search.keep))
        pruning.masks.move(self.mask_step)

    def aim(self, pruning: Pruning, ratio: float) -> None:
        """Choose the blocks that stay, `ratio` of all weights."""
        self.search.aim(pruning, ratio * self.whole)
        self.searched = ratio

    def cut(self) -> dict[str, Any]:
        """Slice the model, unless it is sliced, to the budget; return what was kept."""
        pruning = self.pruning
        if pruning:
            if self.searched != self.search.keep:
                self.aim(pruning, self.search.keep)
            self.kept = pruning.cut().plain()
        assert self.kept is not None
        return self.kept

    def merged(self) -> torch.nn.Module:
        """Return the sliced model with its adapters merged, dense and frozen; it knows its facts.

        Those are what was kept, and the ranks that the adapters had.
        """
        kept = self.cut()
        if hasattr(self.model, "transfer"):
            del self.model.transfer
        ranks = {name: layer.control.max_rank for name, layer in low_rank_layers(self.model)}
        vars(self.model)["pruned"] = {"ranks": ranks, "kept": kept}
        return merge(self.model).requires_grad_(False)

    @property
    def final(self) -> bool:
        """Whether the model is sliced, or would be but for the teacher, and no rank will grow."""
        masks, step = masks_of(self.model), self.ctx.step
        pruned = masks is None or (masks.hard and self.schedule.over(step))
        return pruned and not self.growth.goes_on(step)

    def metrics(self) -> dict[str, float]:
        """Return the share of weights that masks or the slice leave, and the adapters' size."""
        return {
            "kept": weights_left(self.model) / self.whole,
            "adapter_params": float(adapter_parameters(self.model)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what was found and done so far."""
        own = {"searched": self.searched, "kept": self.kept, "teacher": self.teacher}
        return own | self.growth.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back, and slice and grow the prepared model as it tells."""
        self.searched, self.kept, self.teacher = (state[n] for n in ("searched", "kept", "teacher"))
        pruning = self.pruning
        if pruning and self.kept is not None:
            pruning.cut(Kept.from_plain(self.kept))
        self.growth.load_state_dict(state)
