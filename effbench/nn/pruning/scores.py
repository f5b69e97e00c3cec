"""Scores of blocks for pruning in one shot: sums over the weights of a block, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from effbench.api.batch import Batch
from effbench.nn.llama.surgery import decoder_linears
from effbench.nn.pruning.blocks import Layout, add_layer_sums


@dataclass(frozen=True)
class BlockScores:
    """Scores of all blocks of a model, filled layer by layer.

    w^2              over the weights w of a block, without norms
    |w| * ||x||      over the weights that read the block's activations x, with them
    """

    model: Any
    layout: Layout
    scores: torch.Tensor
    """[N], zeros at first."""
    norms: Mapping[str, torch.Tensor] | None = None
    """||x||, [d_in], by the qualified name of a linear."""

    def draw(self, seed: int) -> None:
        """Fill in random numbers."""
        draws = torch.Generator().manual_seed(seed)
        self.scores.copy_(torch.rand(self.layout.size, generator=draws))

    def of_layer(self, index: int) -> dict[str, torch.Tensor]:
        """Return the scores of a layer's blocks, and of the stream's dimensions so far."""
        mine, reads = self.scores.clone(), self.norms is not None
        view, dims = list(self.layout.views(mine))[index], self.layout.dims(mine)
        size, layer = self.layout.layers[index], self.model.model.layers[index]
        named = {self.model.get_submodule(n): norm for n, norm in (self.norms or {}).items()}

        def of(linear: Any) -> torch.Tensor:
            weight = linear.weight.float()
            return weight.abs() * named[linear] if named else weight.square()

        add_layer_sums(layer, size, view, dims, of, reads)
        return {**{n: part.clone() for n, part in view._asdict().items()}, "dims": dims.clone()}

    def put(self, index: int, found: Mapping[str, torch.Tensor]) -> None:
        """Take in what `of_layer` returned."""
        view = list(self.layout.views(self.scores))[index]
        view.groups.copy_(found["groups"])
        view.neurons.copy_(found["neurons"])
        self.layout.dims(self.scores).copy_(found["dims"])


def input_squares(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """Return the squares of each input feature of every decoder linear, [d_in], by its name.

    Args:
        model: A causal language model.
        batch: What it reads; the squares are summed over tokens, and padding does not count.
    """
    found: dict[str, torch.Tensor] = {}
    real = batch.attention_mask.bool()

    def look(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        found[name] = inputs[0][real].float().square().sum(0)

    hooks = [
        linear.register_forward_pre_hook(lambda _, inputs, n=name: look(n, inputs))
        for name, linear in decoder_linears(model)
    ]
    try:
        with torch.no_grad():  # the head reads no block of the decoder
            model.model(batch.input_ids, batch.attention_mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def add_squares(sums: dict[str, torch.Tensor], squares: Mapping[str, torch.Tensor]) -> None:
    """Add the squares of one more batch to sums, in place."""
    for name, square in squares.items():
        sums[name] = sums[name] + square if name in sums else square
