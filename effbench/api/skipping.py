"""Layers that most tokens skip: what is left of a model's work, and how much faster it can be."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from effbench.api.parts import LayerShape, low_rank, portion
from effbench.api.shape import ModelShape
from effbench.util.errors import UserError


def candidates(num_layers: int) -> range:
    """Return the layers that may be droppable: all but the first three and the last one.

    Below 12 layers fewer first ones are left out, but always layer 0.
    """
    return range(max(1, min(3, num_layers // 4)), num_layers - 1)


def evenly_spaced(num_layers: int, fraction: float) -> tuple[int, ...]:
    """Return droppable layers, ascending: a share of the candidates."""
    among = candidates(num_layers)
    count = int(fraction * len(among) + 0.5)
    return tuple(among[(2 * i + 1) * len(among) // (2 * count)] for i in range(count))


def check_droppable(layers: Sequence[int], num_layers: int, fraction: float) -> None:
    """Refuse layers that a model does not have, that are listed twice, or that may not be dropped.

    Args:
        layers: Listed ones, or those of `evenly_spaced`.
        num_layers: Of the model.
        fraction: What they were to be of all, where they are not listed; 0 may be none.

    Raises:
        UserError: Naming `method.layers` or `method.fraction`.
    """
    if 0 in layers:
        raise UserError(
            "method.layers lists layer 0, which must run on every token: its cache is the "
            "record of all positions.",
            "Leave 0 out of method.layers.",
        )
    for layer in layers:
        if not 0 < layer < num_layers:
            raise UserError(
                f"method.layers lists layer {layer}, but the model has {num_layers}.",
                f"Choose layers from 1 to {num_layers - 1}.",
            )
    if len(set(layers)) < len(layers):
        raise UserError("method.layers lists a layer twice.", "List each layer once.")
    if not layers and fraction > 0:
        raise UserError(
            f"method.fraction={fraction} of {num_layers} layers is no layer at all.",
            "Raise method.fraction, or list the layers in method.layers.",
        )


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

    It takes stand-ins for free. It is a bound where f is a share of measured times; a share of the
    weight bytes makes it an estimate, which is passed where layers take more time than bytes.

    Args:
        share: Share f of the base's time per token that is spent in droppable layers, or their
            share of the weight bytes.
        window: k.
    """
    return 1 / (1 - share + share / (window + 1))
