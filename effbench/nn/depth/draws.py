"""Depths of a model that are drawn while it trains, and what makes up for layers that run less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from effbench.api.evolution import Evolution
from effbench.nn.llama.stack import decoder_layers

Sampling = Literal["cycle", "uniform"]


class DepthDraws(Evolution):
    """Draws a depth for each micro-batch.

    Args:
        depths: To draw from.
        sampling: `cycle` draws all of them in random order, again and again; `uniform`
            independently.
        generator: CPU generator.
    """

    def __init__(
        self, depths: Sequence[int], sampling: Sampling, generator: torch.Generator
    ) -> None:
        self.depths, self.sampling, self.generator = depths, sampling, generator
        self.left: list[int] = []
        """Depths that are still to be drawn before all of them have been."""

    def draw(self) -> int:
        """Return the depth of the next micro-batch."""
        if self.sampling == "uniform":
            return self.depths[int(torch.randint(len(self.depths), (), generator=self.generator))]
        if not self.left:
            order = torch.randperm(len(self.depths), generator=self.generator)
            self.left.extend(self.depths[i] for i in order.tolist())
        return self.left.pop()

    def state_dict(self) -> dict[str, Any]:
        """Return the depths that are still to be drawn."""
        return {"left": self.left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.left = state["left"]


def rarities(
    model: torch.nn.Module, subs: Sequence[Sequence[int]]
) -> list[tuple[torch.nn.Parameter, float]]:
    """Return 1 / P(layer runs) for every trained parameter of a layer.

    Args:
        model: A causal language model.
        subs: The layers of each sub-model; a step runs one of them, all equally likely.
    """
    found = []
    for index, layer in enumerate(decoder_layers(model)):
        count = sum(index in layers for layers in subs)
        trained = (p for p in layer.parameters() if p.requires_grad)
        found += [(parameter, len(subs) / count) for parameter in trained]
    return found
