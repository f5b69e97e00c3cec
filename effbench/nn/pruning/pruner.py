"""Pruning while training: masks and salience of a model, from the first search to the slice.

Source: Zhao et al., APT: Adaptive Pruning and Tuning, ICML 2024, arXiv 2401.12200.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch

from effbench.nn.llama.swap import Replace
from effbench.nn.pruning.blocks import Kind, Layout, search
from effbench.nn.pruning.masks import Masks, masks_of
from effbench.nn.pruning.salience import Average, Salience, outliers, ranked, salience_of
from effbench.nn.pruning.slicing import Kept, kept_blocks, layout_of, slice_model


@dataclass(frozen=True)
class Pruning:
    """The masks of a model, and what collects salience for them."""

    model: Any
    masks: Masks
    watcher: Salience

    @classmethod
    def put_in(cls, model: Any, beta: float, average: Average) -> Self:
        """Put masks of 1 and hooks for salience into a model with its adapters."""
        masks = Masks(model)
        return cls(model, masks, Salience(model, beta, average))

    @classmethod
    def of(cls, model: Any) -> Self | None:
        """Return those of a model; None once it is sliced."""
        masks, watcher = masks_of(model), salience_of(model)
        return cls(model, masks, watcher) if masks and watcher else None

    @property
    def layout(self) -> Layout:
        """The blocks of the model."""
        return self.masks.layout

    def salience(self, kurtosis: bool, normalise: bool) -> torch.Tensor:
        """Return what has been collected of every block, [N], with or without the outlier term."""
        protects = outliers(self.model, self.layout, self.watcher.inputs) if kurtosis else None
        return ranked(self.watcher.averaged(), protects, self.layout, normalise)

    def aim(
        self, salience: torch.Tensor, budget: float, prunable: Sequence[Kind], align: int
    ) -> None:
        """Have the masks move from now on towards the blocks of most salience within a budget.

        Args:
            salience: Of every block, [N].
            budget: Most weights that may stay.
            prunable: Kinds of blocks that may go.
            align: Neurons of a layer, and dimensions, go this many at a time.
        """
        found = search(self.layout, salience, budget, prunable=prunable, align=align)
        self.masks.wanted.copy_(found.kept)

    def cut(self, kept: Kept | None = None, replace: Replace | None = None) -> Kept:
        """Take masks and hooks out, slice the model in place, and return what it keeps.

        Args:
            kept: What stays; by default what the masks move towards.
            replace: Told of each parameter that is replaced.
        """
        kept = kept or kept_blocks(self.layout, self.masks.wanted)
        self.watcher.remove(self.model)
        self.masks.remove(self.model)
        slice_model(self.model, kept, replace)
        return kept

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint keeps, by name."""
        parts = {"masks": self.masks, "salience": self.watcher}
        return {f"{p}.{n}": b for p, part in parts.items() for n, b in part.named_buffers()}


@dataclass(frozen=True)
class BlockSearch:
    """How the blocks that stay are chosen."""

    keep: float
    """Share of all weights that stays in the end."""
    prunable: Sequence[Kind]
    """Kinds of blocks that may go."""
    align: int
    """Neurons of a layer, and dimensions, go this many at a time."""
    criterion: Literal["salience", "random"]
    """What blocks are ranked by."""
    kurtosis: bool
    """Whether outliers protect a block."""
    normalise: bool
    """Whether the outlier term is brought to the mean of the rest in each kind of block."""
    seed: int
    """Of random numbers in the place of the salience: the same blocks each time."""

    def aim(self, pruning: Pruning, budget: float) -> None:
        """Have the masks move from now on towards the blocks within a budget of weights."""
        if self.criterion == "random":
            draws = torch.Generator().manual_seed(self.seed)
            salience = torch.rand(pruning.layout.size, generator=draws)
        else:
            salience = pruning.salience(self.kurtosis, self.normalise)
        pruning.aim(salience, budget, self.prunable, self.align)


def weights_left(model: Any) -> float:
    """Return the weights of the decoder's linears that masks or a slice leave.

    Masks between 0 and 1 count in part.
    """
    masks = masks_of(model)
    if masks is not None:
        return masks.layout.weights(masks.values)
    layout = layout_of(model)
    return layout.weights(torch.ones(layout.size))
