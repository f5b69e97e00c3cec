"""Layers that run on some tokens only, in our decode engine.

A dropped token is a step that leaves the droppable blocks out, with a stand-in for each; a refresh
is a step of all blocks, which gives the stand-ins their anchors. On a CUDA device these are two
graphs over one state. Droppable layers are a lane of their own: their caches are shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from effbench.api.session import Cycle
from effbench.nn.decode.cache import StaticLayer
from effbench.nn.decode.static import StaticSession
from effbench.nn.decode.step import Runs, StandIn
from effbench.nn.depth.droppable import DroppableLayers, LowRankMap
from effbench.nn.llama.walk import why_not


def why_not_static(model: torch.nn.Module, droppable: DroppableLayers) -> str:
    """Return what keeps our engine from dropping layers of `model`; empty when nothing does."""
    if droppable.fill:
        return "dropped tokens enter the cache"
    if droppable.start == "residual":
        return "dropped tokens add what a layer added"
    return why_not(model)


class StaticTemporalSession(StaticSession):
    """Decodes with droppable layers and a static cache; gives what `TemporalSession` gives.

    Args:
        model: Laid out as Llama is, in evaluation mode.
        droppable: Its stand-ins and their policy, as they are now.
        use_native: Whether the C++ kernel may be used.

    Raises:
        ValueError: When the engine does not apply.
    """

    def __init__(self, model: Any, droppable: DroppableLayers, use_native: bool = True) -> None:
        if reason := why_not_static(model, droppable):
            raise ValueError(f"the engine does not apply: {reason}")
        stand_ins = {index: _stand_in(droppable, index) for index in droppable.indices}
        super().__init__(model, use_native, stand_ins)
        self.cycle = Cycle(droppable.window, len(self.blocks), len(stand_ins))
        self.kept: Runs = tuple(index not in stand_ins for index in range(len(self.blocks)))
        """A step that drops."""
        for index in stand_ins:
            cache = self.caches[index]
            if cache is not None:
                cache.lane = 1

    @torch.inference_mode()
    def prefill(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read prompts [B, P] with every layer; return the logits after the last position."""
        layers = self.model.model.layers
        hooks = [
            layers[index].register_forward_hook(lambda _, __, out, s=stand_in: s.note(out))
            for index, stand_in in self.stand_ins.items()
        ]
        try:
            return super().prefill(input_ids, attention_mask)
        finally:
            for hook in hooks:
                hook.remove()

    @torch.inference_mode()
    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Read one token per sequence, [B, 1]; return logits [B, V]."""
        return self.advance(input_ids, self.kept if self.cycle.turn() else self.every)

    def routes(self) -> Sequence[Runs]:
        """Return the step that drops and the one that refreshes."""
        return [self.kept, self.every]

    def room(self, layer: StaticLayer, length: int, prompt: int) -> int:
        """Return how many of `length` positions a layer will hold; a prompt of 0 is not known."""
        if layer.lane == 0 or prompt == 0:
            return length
        return prompt + (length - prompt) // (self.cycle.window + 1)


def _stand_in(droppable: DroppableLayers, index: int) -> StandIn:
    found = StandIn(anchored=droppable.start != "input", running=droppable.start == "previous")
    low_rank = droppable.layers[str(index)]
    if droppable.mapped and isinstance(low_rank, LowRankMap):
        found.a, found.b, found.scale = low_rank.A.detach(), low_rank.B.detach(), low_rank.scale
    return found
