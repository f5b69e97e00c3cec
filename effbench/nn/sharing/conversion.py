"""A model turned, layer by layer and while it trains, into one whose layers share states.

    k = (1 - a) k_own + a k_source,    v likewise,    a = 1/M, 2/M ... 1

during the M steps of a layer's conversion; then its projections are removed, which changes nothing
more. Source: Dialameh et al., ECHO-LLaMA, arXiv 2505.17331.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from effbench.api.evolution import Evolution
from effbench.api.method_types import Context
from effbench.api.sharing import TAKEN, LayerMap
from effbench.nn.adapters.growth import drop
from effbench.nn.llama.shared_attention import SharingAttention, convert, sharing_layers


def spans(consumers: Sequence[int], steps: int) -> dict[int, tuple[int, int]]:
    """Return the first step of each consumer's conversion and the one after its last.

    Args:
        consumers: In the order in which they are converted.
        steps: Steps that they have in all, in equal parts.
    """
    count = len(consumers)
    return {
        layer: (place * steps // count, (place + 1) * steps // count)
        for place, layer in enumerate(consumers)
    }


def share_at(step: int, first: int, end: int) -> float:
    """Return a in a step (from 0) of a layer that is converted from step `first` until `end`."""
    if step < first:
        return 0.0
    return min(1.0, (step + 1 - first) / (end - first)) if end > first else 1.0


class LayerByLayer(Evolution):
    """Converts each consumer within its span of steps: its share rises, then it is converted.

    Args:
        model: Ready to share.
        ctx: Of the run.
        spans: First step of each consumer's conversion and the one after its last; a consumer that
            shares already is left alone.
    """

    def __init__(
        self, model: torch.nn.Module, ctx: Context, spans: Mapping[int, tuple[int, int]]
    ) -> None:
        self.model, self.ctx, self.spans = model, ctx, spans

    def _coming(self) -> Iterator[tuple[SharingAttention, int, int]]:
        """Yield the layers that are still to be converted, with their spans."""
        for attention in sharing_layers(self.model):
            if attention.layer in self.spans and not attention.takes:
                yield attention, *self.spans[attention.layer]

    def before_step(self) -> None:
        """Set a of the layers that are on their way."""
        for attention, first, end in self._coming():
            attention.share = share_at(self.ctx.step, first, end)

    def after_backward(self, optimizer: torch.optim.Optimizer) -> None:
        """Remove the projections of layers whose conversion ends with this step."""
        for attention, _, end in list(self._coming()):
            if end <= self.ctx.step + 1:
                drop(optimizer, convert(self.model, attention.layer))

    @property
    def final(self) -> bool:
        """Whether every consumer is converted."""
        return not any(True for _ in self._coming())

    def metrics(self) -> dict[str, float]:
        """Return how many layers are converted, those on their way in part."""
        return {"converted": sum(m.share for m in sharing_layers(self.model))}

    def state_dict(self) -> dict[str, Any]:
        """Return the layers that are converted."""
        coming = {attention.layer for attention, *_ in self._coming()}
        return {"converted": sorted(self.spans.keys() - coming)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Convert the layers that were."""
        for attention, *_ in list(self._coming()):
            if attention.layer in state["converted"]:
                convert(self.model, attention.layer)


def convert_rest(model: torch.nn.Module) -> None:
    """Convert every consumer that is not converted yet, at once."""
    for attention in sharing_layers(model):
        if attention.source != attention.layer and not attention.takes:
            convert(model, attention.layer)


def average_sources(model: Any, sharing: LayerMap) -> None:
    """Set the projections of each source to the mean over itself and its consumers, in place."""
    layers = model.model.layers
    for source in sharing.givers:
        group = [i for i, s in enumerate(sharing.sources) if s == source]
        for name in TAKEN[sharing.mode]:
            parts = [getattr(layers[i].self_attn, name) for i in group]
            for mine, *others in zip(*(p.parameters() for p in parts), strict=True):
                mean = torch.stack([mine.data, *(o.data for o in others)]).float().mean(0)
                mine.data = mean.to(mine.dtype)
