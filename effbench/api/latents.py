"""Models whose cache keeps coordinates of keys and values, and whose projections are factorised."""

from __future__ import annotations

from dataclasses import replace

from effbench.api.parts import Adapter, Factor, LayerShape, Linear
from effbench.api.weights import COMPUTE

PROJECTIONS = ("k_proj", "v_proj")
"""Linears that give keys and values."""


def latent_layer(
    layer: LayerShape, own: tuple[int, int], held: tuple[int, int], absorbed: bool = False
) -> LayerShape:
    """Return a layer whose cache has few elements.

    Args:
        layer: With attention, or without.
        own: Elements of keys and of values that a token adds.
        held: Ranks of the factors of both projections; 0 where they are one matrix.
        absorbed: Whether the output projection takes coordinates of values.
    """
    mixer = layer.mixer
    if mixer is None:
        return layer
    cache = replace(mixer.cache, keys=own[0], values=own[1], width=1)
    # What queries mixed is expanded, if the output projection does not take it as it is.
    mixing = (0, 0 if absorbed else mixer.heads * mixer.head_dim * own[1])
    more = {name: (held[i], own[i], mixing[i]) for i, name in enumerate(PROJECTIONS)}

    def change(linear: Linear) -> Linear:
        if linear.name == "o_proj" and absorbed and held[1]:
            full = own[1] >= mixer.kv_heads * mixer.head_dim
            return _absorbing(linear, mixer.heads * held[1], 0 if full else mixer.heads * own[1])
        return _factorised(linear, *more[linear.name]) if linear.name in more else linear

    return replace(layer, mixer=replace(mixer, cache=cache)).map(change)


def _absorbing(linear: Linear, held: int, own: int) -> Linear:
    """Return an output projection beside one of `held` coordinates, `own` of which a token has.

    Without any of them it takes values itself.
    """
    absorbed = Adapter((Factor(held, linear.d_out, used=own * linear.d_out),), COMPUTE)
    made = replace(linear, adapter=replace(absorbed, trains=False))
    return replace(made, active=0) if own else made


def _factorised(linear: Linear, rank: int, own: int, mixing: int) -> Linear:
    """Return a projection with factors of a rank, of which a token's coordinates are `own`."""
    if not rank:
        return linear
    width = linear.d_out
    used = rank * width + (own * width + mixing if own < width else 0)
    up = Adapter((Factor(rank, width, used=used),), COMPUTE, gains=width * linear.bias)
    return replace(linear, d_out=rank, bias=False, adapter=replace(up, trains=False))
