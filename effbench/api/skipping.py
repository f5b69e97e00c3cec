"""Layers that most tokens skip: what is left of a model's work, and how much faster it can be."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from effbench.api.parts import LayerShape, low_rank, portion
from effbench.api.shape import ModelShape


def with_stand_ins(
    base: ModelShape, layers: Collection[int], rank: int, *, active: bool
) -> ModelShape:
    """Return a model with a map B A beside each droppable layer; tokens go through both.

    Args:
        base: Without them.
        layers: The droppable layers.
        rank: Of each map.
        active: Whether the maps are computed.
    """
    stand_in = replace(low_rank(base.hidden_size, base.hidden_size, rank), active=int(active))
    return base.map(lambda i, x: replace(x, bypass=stand_in) if i in layers else x)


def skipping(
    base: ModelShape, layers: Collection[int], rank: int, window: int, *, mapped: bool, fill: bool
) -> ModelShape:
    """Return a model whose droppable layers run on one of `window` + 1 tokens.

    Args:
        base: Without maps.
        layers: The droppable layers.
        rank: Of the map in the place of each.
        window: Dropped tokens between two refreshes.
        mapped: Whether the maps are computed for dropped tokens.
        fill: Whether dropped tokens enter the cache all the same, so that attention is computed.
    """
    runs = portion(1, window + 1)
    stand_in = low_rank(base.hidden_size, base.hidden_size, rank)
    stand_in = replace(stand_in, active=1 - runs if mapped else 0)

    def skipped(index: int, layer: LayerShape) -> LayerShape:
        if index not in layers:
            return layer
        mixer, mlp = layer.mixer, layer.mlp and replace(layer.mlp, runs=runs)
        if mixer and not fill:
            mixer = replace(mixer, runs=runs, cache=mixer.cache.shared_out(runs))
        return replace(layer, mixer=mixer, mlp=mlp, bypass=stand_in)

    return base.map(skipped)


def speed_ceiling(share: float, window: int) -> float:
    """Return the largest possible speed-up of decoding, 1 / (1 - f + f / w) with w = k + 1.

    It takes stand-ins for free; a measured speed-up above it is a mistake in the measurement.

    Args:
        share: Share f of the base's time per token that is spent in droppable layers; their share
            of the weight bytes where weights alone are what is read.
        window: k.
    """
    return 1 / (1 - share + share / (window + 1))
