"""Models trained at several depths: what a step computes of them, and exits beside them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from effbench.api.parts import Linear, Norm, Objective, Readout, portion
from effbench.api.shape import ModelShape
from effbench.api.weights import WeightFormat
from effbench.util.errors import UserError

Layers = Sequence[int]
"""The layers of a sub-model, counted from 0."""


def depth_set(num_layers: int, shallowest: float) -> tuple[int, ...]:
    """Return every ceil(L / 10)-th depth down from L layers, none below a share of them.

    40 layers and 0.3 give the paper's 12, 16, ... 40.
    """
    step = math.ceil(num_layers / 10)
    least = math.ceil(shallowest * num_layers - 1e-9)
    return tuple(range(num_layers, max(1, least) - 1, -step))[::-1]


def check_depths(key: str, depths: Sequence[int], num_layers: int) -> None:
    """Refuse depths that do not rise, or that a model does not have.

    Raises:
        UserError: Naming `method.<key>`.
    """
    if list(depths) != sorted(set(depths)):
        raise UserError(
            f"method.{key}={list(depths)} does not rise.",
            "Give different depths, the shallowest first.",
        )
    if depths and depths[-1] > num_layers:
        raise UserError(
            f"method.{key} lists depth {depths[-1]}, but the model has {num_layers} layers.",
            f"Choose depths from 1 to {num_layers}.",
        )


def check_trained(depths: Sequence[int], num_layers: int) -> None:
    """Refuse depths to train as `check_depths` does, and several without the full model.

    Raises:
        UserError: Naming `method.depths`.
    """
    check_depths("depths", depths, num_layers)
    if len(depths) > 1 and max(depths) < num_layers:
        raise UserError(
            f"method.depths={list(depths)} does not hold {num_layers}, the number of layers, so "
            "the full model would never be trained.",
            f"Add {num_layers}.",
        )


def refuse_exits(decoding: Sequence[str], objective: str) -> None:
    """Refuse what needs exits, which sub-models without middle layers do not have.

    Raises:
        UserError: Naming `method.decoding` or `method.objective`.
    """
    needing = {f"decoding={list(decoding)}": "method.decoding=[]"} if decoding else {}
    if objective == "layerskip":
        needing["objective=layerskip"] = "another method.objective"
    for setting, instead in needing.items():
        raise UserError(
            f"method.{setting} needs exits on the way through the layers, which sub-models without "
            "middle layers do not have.",
            f"Set method.layout=prefix, or {instead}.",
        )


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
