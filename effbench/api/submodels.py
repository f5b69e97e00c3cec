"""Models trained at several depths: what a step computes of them, and exits beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from effbench.api.parts import Linear, Norm, Objective, Readout, portion
from effbench.api.shape import ModelShape
from effbench.api.weights import WeightFormat

Layers = Sequence[int]
"""The layers of a sub-model, counted from 0."""


def one_of(whole: ModelShape, subs: Sequence[Layers]) -> ModelShape:
    """Return a model of whose sub-models a step runs one: a mean over what it may draw."""
    having = _having(subs)
    return whole.map(lambda i, x: x.running(portion(having[i], len(subs))))


def all_of(whole: ModelShape, subs: Sequence[Layers], *, nested: bool) -> ModelShape:
    """Return a model of whose sub-models a step runs each.

    Args:
        whole: With every layer.
        subs: The layers of each sub-model.
        nested: Whether all are exits of one pass; otherwise they run one after the other.
    """
    having = _having(subs)
    whole = whole.map(lambda i, x: x.running(min(1, having[i]) if nested else having[i]))
    readout = replace(whole.readout, runs=1 if nested else len(subs))
    return replace(whole, readout=readout, objective=Objective(exits=len(subs)))


def with_layers_left_out(
    whole: ModelShape, subs: Sequence[Layers], rates: Sequence[float]
) -> ModelShape:
    """Return a model of which a step leaves out layers at some rates, and reads two exits at most.

    Args:
        whole: With every layer.
        subs: The layers of each sub-model.
        rates: How often each layer is left out.
    """
    having = _having(subs)
    whole = whole.map(lambda i, x: x.running(1 - rates[i] if having[i] else 0))
    return replace(whole, objective=Objective(exits=min(2, len(subs))))


def own_readout(base: ModelShape, weights: WeightFormat) -> Readout:
    """Return a norm and a head of an exit's own, which train, held in a format."""
    head = Linear("lm_head", base.hidden_size, base.vocab_size, weights, trains=True)
    return Readout(Norm(base.hidden_size, weights, trains=True), head)


def with_exits(model: ModelShape, own: Readout, count: int) -> ModelShape:
    """Return a model with so many exits in memory beside it, none of which is computed."""
    return replace(model, exits=(replace(own, runs=0),) * count)


def training_exits(model: ModelShape, depths: Sequence[int], *, trunk: bool) -> ModelShape:
    """Return a model whose exits train: a step runs its layers up to the deepest of them.

    Args:
        model: With its exits.
        depths: Of the exits, ascending.
        trunk: Whether all its layers learn too, and the last one's logits with them.
    """
    if not trunk:
        model = model.map(lambda i, x: x.running(int(i < depths[-1])))
    return replace(model, objective=Objective(exits=len(depths) + trunk))


def _having(subs: Sequence[Layers]) -> Counter[int]:
    """Return how many sub-models have each layer."""
    return Counter(index for layers in subs for index in layers)
